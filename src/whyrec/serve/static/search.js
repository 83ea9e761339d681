/* The search for items: a combobox with the server's suggestions, after ARIA's pattern for one. */

import { searchItems } from "./api.js";
import { el, nameOf } from "./elements.js";

const SHOWN = 8;
const PAUSE_MS = 120; // between the last key and the question

/** Turns an input and a list into a search; `onChoose(item)` for what is chosen. */
export function startSearch({ input, list, onChoose, onError }) {
  let items = [];
  let active = -1;
  let asked = null;
  let timer = 0;

  async function ask() {
    asked?.abort();
    asked = new AbortController();
    const { signal } = asked;
    const words = input.value.trim();
    try {
      const found = await searchItems(words, { limit: SHOWN, signal });
      if (!signal.aborted) show(found, words);
    } catch (error) {
      if (!signal.aborted) onError(error);
    }
  }

  function show(found, words) {
    items = found;
    list.replaceChildren(
      ...items.map((item, place) =>
        el(
          "li",
          {
            id: `${list.id}-${place}`,
            role: "option",
            "aria-selected": "false",
            onpointerdown: (event) => event.preventDefault(), // the input keeps the focus
            onclick: () => choose(place),
          },
          el("span", { class: "name" }, nameOf(item)),
          el("span", { class: "soft" }, item.categories.join(" · ") || item.brand),
        ),
      ),
    );
    if (items.length === 0) {
      const sentence = `No item has “${words}” in its title.`;
      list.append(el("li", { class: "soft", role: "option", "aria-disabled": "true" }, sentence));
    }
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    activate(items.length && words ? 0 : -1);
  }

  function close() {
    clearTimeout(timer);
    asked?.abort();
    items = [];
    list.hidden = true;
    list.replaceChildren();
    input.setAttribute("aria-expanded", "false");
    activate(-1);
  }

  function activate(place) {
    list.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
    active = place;
    const option = list.children[place];
    if (!option) {
      input.removeAttribute("aria-activedescendant");
      return;
    }
    option.setAttribute("aria-selected", "true");
    option.scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", option.id);
  }

  function choose(place) {
    const item = items[place];
    input.value = "";
    close();
    onChoose(item);
  }

  /** What is marked; before the server has suggested anything, its first suggestion. */
  async function chooseActive() {
    clearTimeout(timer);
    if (active < 0 && items.length === 0 && input.value.trim() !== "") await ask();
    if (active >= 0) choose(active);
  }

  function step(by) {
    if (items.length) activate((active + by + items.length) % items.length);
    else ask();
  }

  input.addEventListener("input", () => {
    clearTimeout(timer);
    if (input.value.trim() === "") close();
    else timer = setTimeout(ask, PAUSE_MS);
  });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    const keys = {
      ArrowDown: () => step(1),
      ArrowUp: () => step(active < 0 ? 0 : -1),
      Escape: close,
      Enter: chooseActive, // never sends the form
    };
    if (!(event.key in keys) || event.isComposing) return;
    event.preventDefault();
    keys[event.key]();
  });
}
