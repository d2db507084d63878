// Formulas. KaTeX is loaded with the first one; until then, and where it fails, the source stands there.

import { h } from "../dom.js";
import { addMarkup } from "./markup.js";

const MATH_TAGS = [
  "annotation", "math", "menclose", "mfrac", "mglyph", "mi", "mlabeledtr", "mmultiscripts", "mn", "mo", "mover",
  "mpadded", "mphantom", "mroot", "mrow", "ms", "mspace", "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable",
  "mtd", "mtext", "mtr", "munder", "munderover", "none", "semantics",
];
const RULES = {
  tags: new Map([
    ["span", "html"],
    ...MATH_TAGS.map((tag) => [tag, "math"]),
    ...["svg", "path", "line", "g"].map((tag) => [tag, "svg"]),
  ]),
  attributes: new Set([
    "accent", "accentunder", "aria-hidden", "columnalign", "columnlines", "columnspacing", "d", "depth", "display",
    "displaystyle", "encoding", "fence", "form", "frame", "height", "linebreak", "linethickness", "lspace",
    "mathbackground", "mathcolor", "mathsize", "mathvariant", "maxsize", "minsize", "movablelimits", "notation",
    "preserveAspectRatio", "rowalign", "rowlines", "rowspacing", "rspace", "scriptlevel", "separator", "side",
    "stretchy", "stroke-width", "symmetric", "viewBox", "voffset", "width", "x1", "x2", "y1", "y2",
  ]),
  styles: new Set([
    "background-color", "border-bottom-width", "border-color", "border-right-style", "border-right-width",
    "border-style", "border-top-width", "border-width", "bottom", "color", "height", "left", "margin", "margin-left",
    "margin-right", "margin-top", "min-width", "padding", "padding-left", "padding-right", "position",
    "text-shadow", "top", "vertical-align", "width", "font-size", "right", "border-left-width", "border-left-style",
    "border-bottom-style", "border-top-style",
  ]),
};
const MAX_LENGTH = 8000;

let loading = null;

/** Loads KaTeX, once. */
export function loadFormulas() {
  loading ??= import("../../vendor/katex-0.19.1/katex.js").then(() => globalThis.katex);
  return loading;
}

function fill(target, source, isBlock) {
  const options = { displayMode: isBlock, throwOnError: true, trust: false, strict: "ignore", maxSize: 12, maxExpand: 300 };
  try {
    const made = h("span");
    addMarkup(made, globalThis.katex.renderToString(source, options), RULES);
    target.replaceChildren(...made.childNodes);
    target.classList.remove("formula-source");
  } catch {
    // not understood by KaTeX: the source stays
  }
}

/** A formula. The element is there at once; its look comes when KaTeX is there. */
export function formulaElement(source, isBlock) {
  const target = h(isBlock ? "div" : "span", { class: `formula formula-source${isBlock ? " formula-block" : ""}` }, source);
  if (source.length > MAX_LENGTH) return target;
  if (globalThis.katex) fill(target, source, isBlock);
  else loadFormulas().then(() => fill(target, source, isBlock), () => {});
  return target;
}
