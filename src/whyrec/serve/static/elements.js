/* Elements made in one expression. Text is only ever a text node: no title can become markup. */

/** An element with attributes, listeners (`onclick: …`) and children: nodes or text. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** The element of the page with an id. */
export const byId = (id) => document.getElementById(id);

/** Shows a sentence in an element, or hides the element when there is none. */
export function say(element, sentence) {
  element.textContent = sentence ?? "";
  element.hidden = !sentence;
}

/** What an item is called: its title, or its id where it has none. */
export const nameOf = (item) => item.title?.trim() || item.id;

/** 1349 → "1,349". */
export const count = (number) => number.toLocaleString("en");

/** "1 item", "3 items". */
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** A probability as people read it, with a bound in place of very many zeros. */
export function percent(probability) {
  if (probability < 0.0001) return "< 0.01 %";
  if (probability > 0.9995) return "100 %";
  return `${(100 * probability).toFixed(probability < 0.01 ? 2 : 1)} %`;
}

/** "<s_b_17>" → "b17", and a whole SID's codes with spaces between. */
export function shortCodes(text) {
  return [...text.matchAll(/<s_([a-z])_(\d+)>/g)].map(([, level, code]) => level + code).join(" ");
}

/** A bar as long as a share of its line; what it says stands beside it as a number. */
export function bar(share) {
  const element = el("span", { class: "bar", "aria-hidden": "true" });
  element.style.setProperty("--share", `${(100 * Math.min(share, 1)).toFixed(1)}%`);
  return element;
}
