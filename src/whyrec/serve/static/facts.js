/* Facts that a thought names: marked in its text as true or not, and listed with who bears them. */

import { el } from "./elements.js";

const NAMED = 3; // items of the history that are named; the others are counted
const ABOUT = { next: "what comes next", turn: "the newest items" };

/** The text in pieces, facts marked; places are in Unicode characters, as the server counts. */
export function marked(trace, facts) {
  const characters = [...trace];
  const pieces = [];
  let end = 0;
  for (const fact of facts) {
    if (fact.start < end) continue; // inside another one
    pieces.push(characters.slice(end, fact.start).join(""));
    const sign = el("span", { class: "sign" }, fact.true ? "\u00a0✓" : "\u00a0✗\u00a0untrue");
    const text = characters.slice(fact.start, fact.end).join("");
    pieces.push(el("mark", { class: fact.true ? "true" : "false" }, text, sign));
    end = fact.end;
  }
  return [...pieces, characters.slice(end).join("")];
}

/** A fold with every fact, the items of the history that bear it, and the ranks of new ones. */
export function factList(facts, names) {
  const untrue = facts.filter((fact) => !fact.true).length;
  const verdict = untrue ? `${untrue} of ${facts.length} untrue` : "all true";
  return el(
    "details",
    { class: "facts-of" },
    el("summary", {}, "Its facts ", el("span", { class: "soft" }, verdict)),
    el(
      "ul",
      {},
      ...facts.map((fact) =>
        el(
          "li",
          {},
          el("span", { class: fact.true ? "good" : "bad" }, fact.true ? "✓ " : "✗ untrue: "),
          el("strong", {}, fact.name),
          el("span", { class: "soft" }, ` of ${ABOUT[fact.clause] ?? "the history"}. `),
          el("span", { class: "soft" }, `${bornBy(fact, names)} ${follows(fact)}`),
        ),
      ),
    ),
  );
}

/** The newest items of the history that bear a fact. */
function bornBy(fact, names) {
  const found = fact.history.map((place) => names[place]).reverse();
  if (found.length === 0) return "No item of the history bears it.";
  const others = found.length - NAMED;
  const more = others > 0 ? ` and ${others} more` : "";
  return `In ${found.slice(0, NAMED).join("; ")}${more}.`;
}

function follows(fact) {
  if (fact.ranks.length === 0) return "No recommended item bears it.";
  return `Recommended: ${fact.ranks.join(", ")}.`;
}
