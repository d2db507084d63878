// From the markup that KaTeX and highlight.js write to elements, without a parser that could run anything.
// Only what they are known to write is understood; everything else is an error, and the caller shows plain text.

import { element, setAttribute } from "../dom.js";

const PIECE = /<(\/?)([a-zA-Z][a-zA-Z0-9]*)((?:\s+[a-zA-Z:_-][\w:-]*="[^"<>]*")*)\s*(\/?)>|([^<>]+)/y;
const ATTRIBUTE = /([a-zA-Z:_-][\w:-]*)="([^"]*)"/g;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', "#x27": "'", "#39": "'", nbsp: "\u00a0" };

function decoded(text) {
  return text.replace(/&([a-z]+|#x27|#39);/g, (whole, name) => ENTITIES[name] ?? whole);
}

function fill(made, attributes, rules) {
  for (const [, name, raw] of attributes.matchAll(ATTRIBUTE)) {
    const value = decoded(raw);
    if (name === "style" && rules.styles) {
      for (const [property, given] of declarations(value, rules.styles)) made.style.setProperty(property, given);
    } else if (name === "class" || rules.attributes?.has(name)) {
      setAttribute(made, name, value);
    } else if (name !== "xmlns") {
      throw new Error(`The attribute ${name} is unknown.`);
    }
  }
}

/** Whether a size would move or stretch things far over their surroundings. */
function isHuge(property, value) {
  const limit = /^(margin|padding|left|right)/.test(property) ? 60 : 1000;
  return Math.abs(Number.parseFloat(value)) > limit;
}

/** Pairs of property and value; `styles` names the properties that may be set. A policy forbids style attributes. */
function* declarations(text, styles) {
  for (const part of text.split(";")) {
    const [property, value] = [part.slice(0, part.indexOf(":")).trim(), part.slice(part.indexOf(":") + 1).trim()];
    if (!part.trim()) continue;
    if (!styles.has(property) || !/^[-+#%.,\w ]*$|^calc\([-+\d.\w% ]+\)$/.test(value) || isHuge(property, value)) {
      throw new Error(`The style ${property} is unknown.`);
    }
    yield [property, value];
  }
}

/**
 * Adds what `markup` says to `target`. rules: tags (a Map from a tag to its name space), attributes and styles
 * (Sets of names). Throws, and adds nothing, where the markup holds anything else.
 */
export function addMarkup(target, markup, rules) {
  const found = element("span");
  const open = [[found, "", ]];
  PIECE.lastIndex = 0;
  while (PIECE.lastIndex < markup.length) {
    const match = PIECE.exec(markup);
    if (match === null) throw new Error("The markup is not understood.");
    const [, closing, tag, attributes, isEmpty, text] = match;
    const top = open[open.length - 1][0];
    if (text !== undefined) {
      top.append(decoded(text));
    } else if (closing) {
      if (open.length < 2 || open.pop()[1] !== tag) throw new Error(`</${tag}> closes nothing.`);
    } else {
      if (!rules.tags.has(tag)) throw new Error(`The element ${tag} is unknown.`);
      const made = element(tag, rules.tags.get(tag));
      fill(made, attributes, rules);
      top.append(made);
      if (!isEmpty) open.push([made, tag]);
    }
  }
  if (open.length !== 1) throw new Error("The markup does not end.");
  target.append(...found.childNodes);
}
