// The only place where elements come into being. Text becomes text nodes; there is no way from a string to markup,
// and what could run or load something is refused whoever asks for it.

import { safeLink, safePicture } from "./text/links.js";

const SPACES = { svg: "http://www.w3.org/2000/svg", math: "http://www.w3.org/1998/Math/MathML" };
const REFUSED = new Set(["script", "style", "iframe", "object", "embed", "base", "link", "meta", "frame", "template"]);

/** Sets one attribute; throws for those that run code, hold markup or lead to an unsafe address. */
export function setAttribute(element, name, value) {
  const lower = name.toLowerCase();
  const isCode = lower.startsWith("on") || lower === "style" || lower === "srcdoc" || lower.startsWith("xmlns");
  if (isCode || lower.endsWith(":href") || lower === "action" || lower === "formaction") {
    throw new Error(`The attribute ${name} is refused.`);
  }
  if (lower === "href" && safeLink(value) === null) throw new Error("The link is refused.");
  if (lower === "src" && safePicture(value) === null) throw new Error("The picture is refused.");
  element.setAttribute(name, value);
}

/** An element of a name space: "html", "svg" or "math". */
export function element(tag, space = "html") {
  if (REFUSED.has(tag.toLowerCase())) throw new Error(`The element ${tag} is refused.`);
  return space === "html" ? document.createElement(tag) : document.createElementNS(SPACES[space], tag);
}

/**
 * An element with attributes and children. Strings become text nodes; null and false are left out. `on`: listeners
 * by event. Properties that are `true` become empty attributes, `false` and null none.
 */
export function h(tag, { on = {}, ...attributes } = {}, ...children) {
  const made = element(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value != null) setAttribute(made, name, value === true ? "" : String(value));
  }
  for (const [event, listener] of Object.entries(on)) made.addEventListener(event, listener);
  for (const child of children.flat()) {
    if (child !== null && child !== false && child !== undefined) made.append(child);
  }
  return made;
}
