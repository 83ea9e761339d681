/* The beam as a tree: codes that were followed, how probable each was, items at the leaves. */

import { bar, el, nameOf, percent, plural, shortCodes } from "./elements.js";

/** A closed fold with the tree; `rankOf` maps the ids of the recommended items to their ranks. */
export function beamTree(branches, rankOf) {
  const leaves = branches.reduce((sum, branch) => sum + countLeaves(branch), 0);
  return el(
    "details",
    { class: "beam" },
    el("summary", {}, "Beam tree ", el("span", { class: "soft" }, plural(leaves, "item"))),
    el(
      "p",
      { class: "soft" },
      "Codes of semantic IDs that the beam followed, each with its probability among those that " +
        "may stand there. Along the path to an item they multiply to its probability.",
    ),
    level(branches, rankOf),
  );
}

const countLeaves = (branch) =>
  (branch.id === null ? 0 : 1) + branch.children.reduce((sum, child) => sum + countLeaves(child), 0);

function level(branches, rankOf) {
  const left = branches.filter((branch) => branch.left);
  const most = likeliest(branches);
  return el(
    "ul",
    { class: "tree" },
    ...branches.filter((branch) => !branch.left).map((branch) => grown([branch], most, rankOf)),
    left.length ? leftBehind(left, most) : null,
  );
}

/** A branch; codes after which only one other came stand with it on one line. */
function grown(path, most, rankOf) {
  const last = path.at(-1);
  if (last.id !== null) return el("li", {}, ...codes(path, most), leaf(last, rankOf));
  if (last.children.length === 1) return grown([...path, last.children[0]], most, rankOf);
  return el(
    "li",
    {},
    el("details", { open: true }, el("summary", {}, ...codes(path, most)), level(last.children, rankOf)),
  );
}

/** Codes with their probabilities, before the first a bar beside those of its siblings. */
function codes(path, most) {
  return path.map((branch, place) =>
    el(
      "span",
      { class: "step" },
      place === 0 ? bar(branch.probability / most) : null,
      el("code", {}, shortCodes(branch.code)),
      el("span", { class: "share" }, percent(branch.probability)),
    ),
  );
}

const likeliest = (branches) => Math.max(...branches.map((branch) => branch.probability), 1e-12);

function leaf(branch, rankOf) {
  const rank = rankOf.get(branch.id);
  return el(
    "span",
    { class: rank ? "leaf listed" : "leaf" },
    el("span", { class: "rank" }, rank ? el("span", { class: "unseen" }, "rank ") : null, rank ?? ""),
    el("span", { class: "name" }, nameOf(branch)),
    el("span", { class: "soft" }, ` ${percent(Math.exp(branch.log_prob))}`),
  );
}

function leftBehind(branches, most) {
  const number = branches.length;
  return el(
    "li",
    { class: "left" },
    el(
      "details",
      {},
      el("summary", {}, `${number} that the beam followed and left`),
      el("ul", { class: "tree" }, ...branches.map((branch) => el("li", {}, ...codes([branch], most)))),
    ),
  );
}
