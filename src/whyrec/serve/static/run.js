/* One recommendation on the page: its thought as it comes, its items, its beam tree. */

import { ApiError, recommend } from "./api.js";
import { el, plural, say } from "./elements.js";
import { factList, marked } from "./facts.js";
import { compared, itemList } from "./items.js";
import { beamTree } from "./tree.js";

/** A card that shows one recommendation. */
export class Run {
  #thoughts = []; // by sample: {block, text}
  #log = el("div", { class: "thoughts", role: "log", "aria-live": "polite", "aria-label": "Thought" });
  #time = el("span", { class: "soft" });
  #error = el("p", { class: "error", role: "alert", hidden: true });
  #note = el("p", { class: "soft", hidden: true });
  #items = el("div");
  #tree = el("div");
  #names;

  /** `think` is "on" or "off"; `names` are those of the history's items, for facts about them. */
  constructor({ think, title, names }) {
    this.think = think;
    this.#names = names;
    this.answer = null;
    this.card = el(
      "article",
      { class: "panel run waiting", "aria-label": title },
      el("div", { class: "heading" }, el("h2", {}, title), this.#time),
      think === "on" ? this.#log : null,
      this.#note,
      this.#error,
      this.#items,
      this.#tree,
    );
  }

  /** Asks the server and shows what comes; whether it came to its end. */
  async start(body, signal) {
    try {
      const onWords = ({ sample, text }) => this.#hear(sample, text);
      this.answer = await recommend({ ...body, think: this.think, tree: true, facts: true }, { signal, onWords });
      this.#show();
    } catch (error) {
      if (signal.aborted) say(this.#note, "Stopped.");
      else if (error instanceof ApiError) say(this.#error, error.message);
      else throw error;
      this.error = signal.aborted ? null : error;
    } finally {
      this.card.classList.remove("waiting");
    }
    return this.answer !== null;
  }

  /** Tells of each item what became of it beside another run's. */
  compareWith(other) {
    const { items } = this.answer;
    this.#items.replaceChildren(itemList(items, compared(items, other.answer.items)));
  }

  #hear(sample, text) {
    this.#thoughts[sample] ??= this.#newThought(sample);
    this.#thoughts[sample].text.append(text);
  }

  #newThought(sample) {
    const text = el("p", { class: "thought" });
    const label = el("span", { class: "soft label" }, `Thought ${sample + 1}`);
    const block = el("div", { class: "one" }, label, text);
    this.#log.append(block);
    this.#log.classList.toggle("several", this.#log.children.length > 1);
    return { block, text, label };
  }

  #show() {
    const { items, trace, facts, timings_ms: ms, tree } = this.answer;
    this.#time.textContent = `${(ms.total / 1000).toFixed(2)} s`;
    const several = this.#thoughts.length > 1;
    const chosen = this.#thoughts.find((thought) => thought?.text.textContent === trace);
    if (several && chosen) {
      chosen.block.classList.add("chosen");
      chosen.label.append(" · speaks most for the first item");
    }
    if (chosen && facts?.length) {
      this.#log.setAttribute("aria-live", "off"); // what was said is not to be said again
      chosen.text.replaceChildren(...marked(trace, facts));
      chosen.block.append(factList(facts, this.#names));
    }
    if (this.think === "on" && trace === "") say(this.#note, "The thought was empty.");
    if (several) say(this.#note, "The items mix what the thoughts lead to; the tree is that of one.");
    if (items.length === 0) say(this.#note, "No item is left that could be recommended.");
    this.#items.replaceChildren(itemList(items));
    const ranks = new Map(items.map((item, place) => [item.id, place + 1]));
    this.#tree.replaceChildren(beamTree(tree ?? [], ranks));
  }
}

/** How two answers' items compare, in a sentence. */
export function inWords(thinking, plain) {
  const moves = [...compared(thinking, plain).values()];
  const came = moves.filter((gained) => gained === null).length;
  const stayed = moves.filter((gained) => gained === 0).length;
  const moved = moves.length - came - stayed;
  return (
    `With the thought ${plural(came, "item")} came in, ${moved} moved and ${stayed} stayed in place.`
  );
}
