/* The history: a list of items, the oldest first, that can be added to, cut and put in order. */

import { item as askItem } from "./api.js";
import { count, el, nameOf, plural } from "./elements.js";

const LOOKUPS = 6; // questions at once about the items of a pasted list

/** A history shown in `list`. `note` says in words how much of it the model reads. */
export class History {
  #list;
  #note;
  #onChange;
  #entries = []; // {id, title, categories}; of what the server could not name, the words as `id`
  #read = Infinity;
  #older = 0; // events that the server knows of and has not told
  #wrong = -1;

  constructor({ list, note, onChange }) {
    this.#list = list;
    this.#note = note;
    this.#onChange = onChange;
    this.#show();
  }

  /** What is sent: ids, or titles where they were pasted. */
  get ids() {
    return this.#entries.map((entry) => entry.id);
  }

  get names() {
    return this.#entries.map(nameOf);
  }

  /** How many of the newest items the model reads. */
  set read(number) {
    this.#read = number;
    this.#show();
  }

  add(entry) {
    this.#replace([...this.#entries, entry]);
    this.#list.lastElementChild.scrollIntoView({ block: "nearest" });
  }

  /** Other entries in place of these; `older` events stand before them unseen. */
  set(entries, { older = 0 } = {}) {
    this.#older = older;
    this.#replace(entries);
    this.#list.scrollTop = this.#list.scrollHeight;
  }

  /** Ids or titles in place of these; what the server knows by its id gets its title. */
  async paste(names) {
    const entries = names.map((id) => ({ id, title: "" }));
    this.set(entries);
    const todo = [...entries.keys()];
    const look = async () => {
      for (let place = todo.pop(); place !== undefined; place = todo.pop()) {
        const found = await askItem(entries[place].id).catch(() => null); // it may be a title
        if (found) Object.assign(entries[place], found);
      }
    };
    await Promise.all(Array.from({ length: LOOKUPS }, look));
    this.#show();
  }

  /** Marks the entry that an error's `param` names, as `history.3`; none for null. */
  mark(param) {
    const place = /^history\.(\d+)/.exec(param ?? "")?.[1];
    this.#wrong = place === undefined ? -1 : Number(place);
    this.#show();
    this.#list.children[this.#wrong]?.scrollIntoView({ block: "nearest" });
  }

  #replace(entries) {
    this.#entries = entries;
    this.#wrong = -1;
    this.#show();
    this.#onChange();
  }

  #show() {
    const unread = Math.max(this.#entries.length - this.#read, 0);
    this.#list.replaceChildren(
      ...this.#entries.map((entry, place) => this.#row(entry, place, place < unread)),
    );
    this.#list.hidden = this.#entries.length === 0;
    this.#note.textContent = this.#inWords(unread);
  }

  #inWords(unread) {
    const number = this.#entries.length;
    if (number === 0) return "Empty: the model will know nothing about this person.";
    const older = this.#older ? ` ${plural(this.#older, "still older event")} stay on the server.` : "";
    if (unread === 0) return `${plural(number, "item")}, the oldest first.${older}`;
    return (
      `${plural(number, "item")}, the oldest first. The model reads the newest ` +
      `${count(this.#read)}; the ${count(unread)} before them are only kept from coming again.` +
      older
    );
  }

  #row(entry, place, unread) {
    const name = nameOf(entry);
    const button = (what, sign, act, disabled = false) =>
      el(
        "button",
        { type: "button", class: "icon", "aria-label": `${what}: ${name}`, disabled, onclick: act },
        sign,
      );
    const wrong = place === this.#wrong;
    const details = entry.categories?.join(" · ") || (wrong ? "unknown to the server" : null);
    return el(
      "li",
      { class: `${unread ? "unread" : ""} ${wrong ? "wrong" : ""}`.trim() },
      el(
        "span",
        { class: "words" },
        el("span", { class: "name" }, name),
        details && el("span", { class: "soft" }, details),
      ),
      button("Earlier", "↑", () => this.#move(place, -1), place === 0),
      button("Later", "↓", () => this.#move(place, 1), place === this.#entries.length - 1),
      button("Remove", "×", () => this.#remove(place)),
    );
  }

  #move(place, by) {
    const entries = [...this.#entries];
    entries.splice(place + by, 0, ...entries.splice(place, 1));
    this.#replace(entries);
    const buttons = this.#list.children[place + by].querySelectorAll("button");
    const same = buttons[by < 0 ? 0 : 1];
    (same.disabled ? buttons[by < 0 ? 1 : 0] : same).focus();
  }

  #remove(place) {
    this.#replace(this.#entries.filter((_, other) => other !== place));
    const next = this.#list.children[Math.min(place, this.#entries.length - 1)];
    next?.querySelector("button:last-child").focus();
  }
}
