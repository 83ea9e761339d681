/* Recommended items: ranks, titles, probabilities, and what became of each beside another list. */

import { bar, el, nameOf, percent, shortCodes } from "./elements.js";

/** The list; `moves` maps ids to what became of them (see `compared`), or is null. */
export function itemList(items, moves = null) {
  const most = Math.max(...items.map((item) => Math.exp(item.score)), 1e-12);
  return el(
    "ol",
    { class: "items" },
    ...items.map((item) => {
      const probability = Math.exp(item.score);
      return el(
        "li",
        {},
        el(
          "span",
          { class: "words" },
          el("span", { class: "name" }, nameOf(item)),
          el(
            "span",
            { class: "facts" },
            el("code", { class: "soft" }, shortCodes(item.sid)),
            moves ? move(moves.get(item.id)) : null,
          ),
        ),
        el(
          "span",
          { class: "score" },
          bar(probability / most),
          el("span", { class: "number" }, percent(probability)),
          el(
            "span",
            { class: "soft number" },
            el("span", { class: "unseen" }, "log-probability "),
            item.score.toFixed(2).replace("-", "−"),
          ),
        ),
      );
    }),
  );
}

/** What became of each item of a list beside another one: by id, ranks gained; null came in. */
export function compared(items, others) {
  const before = new Map(others.map((item, place) => [item.id, place]));
  return new Map(
    items.map((item, place) => [item.id, before.has(item.id) ? before.get(item.id) - place : null]),
  );
}

function move(gained) {
  if (gained === null) return el("span", { class: "move in" }, "+ came in");
  if (gained === 0) return el("span", { class: "move" }, "= stays");
  const up = gained > 0;
  return el("span", { class: "move" }, `${up ? "▲ up" : "▼ down"} ${Math.abs(gained)}`);
}
