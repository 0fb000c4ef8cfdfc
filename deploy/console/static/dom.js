// Makes elements; what is shown is always text, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes, listeners (`onclick`) and children; null children are left out. */
export function h(name, given = {}, ...children) {
  return filled(document.createElement(name), given, children);
}

/** Likewise, of SVG. */
export function s(name, given = {}, ...children) {
  return filled(document.createElementNS(SVG, name), given, children);
}

function filled(element, given, children) {
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((one) => one !== null && one !== undefined && one !== false));
  return element;
}

export const at = (id) => document.getElementById(id);

/** The parts of a text in which code stands between backticks, as in the messages of commands. */
export function marked(text) {
  const parts = String(text).split("`");
  return parts.length % 2 ? parts.map((part, place) => (place % 2 ? h("code", {}, part) : part)) : [text];
}

/** Sets a text, see `marked`, only where it is another one: what did not change is not drawn, read out or selected again. */
export function tell(element, text) {
  const parts = marked(text);
  if (element.textContent !== parts.map((one) => one.textContent ?? one).join("")) element.replaceChildren(...parts);
}

/** Rows of a table whose columns have names; a cell is text or an element. */
export function table(element, head, rows, none) {
  if (!rows.length) {
    element.replaceChildren(h("tbody", {}, h("tr", {}, h("td", { class: "quiet text" }, marked(none)))));
    return;
  }
  element.replaceChildren(
    h("thead", {}, h("tr", {}, head.map(([name, kind]) => h("th", { scope: "col", class: kind }, typeof name === "function" ? name() : name)))),
    h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, place) => h("td", { class: head[place][1] }, cell))))),
  );
}
