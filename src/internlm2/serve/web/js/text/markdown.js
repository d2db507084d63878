// Markdown to elements: markdown-it reads, and each kind of token that is known becomes an element here. HTML in the
// text is text. No string of the model ever meets a parser of HTML.

import MarkdownIt from "../../vendor/markdown-it-15.0.3/markdown-it.js";
import { h } from "../dom.js";
import { codeElement } from "./code.js";
import { relaxEmphasis } from "./emphasis.js";
import { formulaElement } from "./formula.js";
import { safeLink, safePicture } from "./links.js";
import { addMathRules } from "./math_rules.js";

const SIMPLE = {
  paragraph_open: "p", bullet_list_open: "ul", list_item_open: "li", blockquote_open: "blockquote",
  thead_open: "thead", tbody_open: "tbody", tr_open: "tr", em_open: "em", strong_open: "strong", s_open: "s",
};
const ALIGNMENTS = { "text-align:left": "left", "text-align:center": "center", "text-align:right": "right" };

const parser = new MarkdownIt({ html: false, linkify: true, breaks: true, typographer: false, maxNesting: 60 });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
relaxEmphasis(parser);
addMathRules(parser);

/** The text as tokens. */
export function parse(text) {
  return parser.parse(text, {});
}

/** A code block with its language and a button that copies it. `label`: gives words in the reader's language. */
function codeBlock(text, info, label) {
  const language = (info.trim().split(/\s+/)[0] ?? "").toLowerCase().replace(/[^\w+#.-]/g, "").slice(0, 30);
  const copy = h("button", { type: "button", class: "quiet small", "data-action": "copy-code", "data-t": "copy" }, label("copy"));
  const code = codeElement(text.replace(/\n$/, ""), language);
  const area = h("pre", { dir: "ltr", tabindex: "0", role: "group", "aria-label": label("code"), "data-aria": "code" }, code);
  return h("div", { class: "code-block" }, h("div", { class: "code-head" }, h("span", {}, language || label("code")), copy), area);
}

function picture(token) {
  const source = token.attrGet("src") ?? "";
  const shown = safePicture(source);
  const words = token.content || source;
  // A path of this server is for outputs of tools; the words of a model load nothing at all.
  if (shown?.startsWith("data:")) return h("img", { src: shown, alt: token.content, class: "picture", loading: "lazy" });
  const link = safeLink(source); // of another host: a link, so that nothing is loaded unasked
  return link === null ? h("span", { class: "muted" }, words) : anchor(link, null, `🖼 ${words}`);
}

function anchor(address, title, ...children) {
  const shown = { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: title || address };
  return h("a", shown, ...children);
}

/** The element that a token opens, and where its children go; null for tokens without an element of their own. */
function opened(token) {
  const dir = token.level === 0 ? "auto" : null; // blocks within others follow those
  if (SIMPLE[token.type]) return token.hidden ? null : h(SIMPLE[token.type], { dir: token.block ? dir : null });
  switch (token.type) {
    case "heading_open": // below the page's own headings
      return h(`h${Math.min(6, Number(token.tag.slice(1)) + 2)}`, { class: `size-${token.tag.slice(1)}`, dir });
    case "ordered_list_open":
      return h("ol", { start: token.attrGet("start"), dir });
    case "th_open":
    case "td_open": {
      const alignment = ALIGNMENTS[token.attrGet("style")];
      return h(token.type.slice(0, 2), { class: alignment && `align-${alignment}` });
    }
    case "link_open": {
      const address = safeLink(token.attrGet("href") ?? "");
      return address === null ? h("span") : anchor(address, null);
    }
    default:
      return h("span");
  }
}

function single(token, label) {
  switch (token.type) {
    case "fence": return codeBlock(token.content, token.info, label);
    case "code_block": return codeBlock(token.content, "", label);
    case "code_inline": return h("code", { class: "inline-code" }, token.content);
    case "formula": return formulaElement(token.content, token.meta.isBlock);
    case "formula_block": return formulaElement(token.content, true);
    case "hr": return h("hr");
    case "softbreak":
    case "hardbreak": return h("br");
    case "image": return picture(token);
    default: return token.content;
  }
}

/** Adds what the tokens say to `target`. */
export function addTokens(target, tokens, label) {
  const open = [target];
  for (const token of tokens) {
    const top = open[open.length - 1];
    if (token.nesting < 0) {
      open.pop();
    } else if (token.type === "inline") {
      addTokens(top, token.children, label);
    } else if (token.nesting === 0) {
      top.append(single(token, label));
    } else if (token.type === "table_open") {
      const table = h("table", { dir: "auto" });
      const frame = { class: "table-frame", tabindex: "0", role: "group", "aria-label": label("table"), "data-aria": "table" };
      top.append(h("div", frame, table));
      open.push(table);
    } else {
      const made = opened(token);
      if (made !== null) top.append(made);
      open.push(made ?? top);
    }
  }
}
