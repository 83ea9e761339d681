/* The beam as a tree: codes that were followed, how probable each was, items at the leaves. */

import { bar, el, nameOf, percent, plural, shortCodes } from "./elements.js";

/** A closed fold with the tree; `rankOf` maps the ids of the recommended items to their ranks. */
export function beamTree(branches, rankOf) {
  const leaves = branches.reduce((sum, branch) => sum + countLeaves(branch), 0);
  return el(
    "details",
    { class: "beam" },
    el("summary", {}, "Beam tree ", el("span", { class: "soft" }, plural(leaves, "leaf").replace("leafs", "leaves"))),
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
  return el(
    "ul",
    { class: "tree" },
    ...branches.filter((branch) => !branch.left).map((branch) => grown([branch], rankOf)),
    left.length ? leftBehind(left) : null,
  );
}

/** A branch; codes after which only one other came stand with it on one line. */
function grown(path, rankOf) {
  const last = path.at(-1);
  if (last.id !== null) return el("li", {}, ...codes(path), leaf(last, rankOf));
  if (last.children.length === 1) return grown([...path, last.children[0]], rankOf);
  return el(
    "li",
    {},
    el("details", { open: true }, el("summary", {}, ...codes(path)), level(last.children, rankOf)),
  );
}

function codes(path) {
  return path.map((branch) =>
    el(
      "span",
      { class: "step" },
      bar(branch.probability),
      el("code", {}, shortCodes(branch.code)),
      ` ${percent(branch.probability)} `,
    ),
  );
}

function leaf(branch, rankOf) {
  const rank = rankOf.get(branch.id);
  return el(
    "span",
    { class: rank ? "leaf listed" : "leaf" },
    rank ? el("span", { class: "rank" }, el("span", { class: "unseen" }, "rank "), `${rank}`) : null,
    el("span", { class: "name" }, nameOf(branch)),
    el("span", { class: "soft" }, ` ${percent(Math.exp(branch.log_prob))}`),
  );
}

function leftBehind(branches) {
  const number = branches.length;
  return el(
    "li",
    { class: "left" },
    el(
      "details",
      {},
      el("summary", {}, `${number} that the beam followed and left`),
      el("ul", { class: "tree" }, ...branches.map((branch) => el("li", {}, ...codes([branch])))),
    ),
  );
}
