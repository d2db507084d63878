// An answer that grows. Blocks that are complete are rendered once; only the last one is made anew.

import { element } from "../dom.js";
import { addTokens, parse } from "./markdown.js";

const REFERENCE = /^ {0,3}\[[^\]]+\]:/m; // such a line can change any block before it

/** Tokens of each top-level block, with the line on which it begins. */
function blocks(tokens) {
  const found = [];
  for (const token of tokens) {
    if (token.level === 0 && token.nesting >= 0) found.push({ line: token.map?.[0] ?? 0, tokens: [] });
    found[found.length - 1].tokens.push(token);
  }
  return found;
}

function offsetOfLine(text, line) {
  let at = 0;
  for (let n = 0; n < line; n += 1) at = text.indexOf("\n", at) + 1;
  return at;
}

/** Shows Markdown in `target`. `whenComplete`: told the words of each block that will not change any more. */
export class StreamedText {
  constructor(target, label, whenComplete = () => {}) {
    this._target = target;
    this._label = label;
    this._whenComplete = whenComplete;
    this._start = 0; // where the last block begins
    this._open = []; // its nodes
  }

  /** Takes the whole text so far. */
  update(given) {
    const text = given.replace(/\r\n?/g, "\n");
    const tail = text.slice(this._start);
    const found = blocks(parse(tail));
    for (const node of this._open) node.remove();
    this._open = [];
    for (const [n, block] of found.entries()) {
      const box = element("div");
      addTokens(box, block.tokens, this._label);
      const nodes = [...box.childNodes];
      this._target.append(...nodes);
      if (n === found.length - 1) this._open = nodes;
      else this._whenComplete(nodes.map((node) => node.textContent).join(" "));
    }
    if (found.length > 1) this._start += offsetOfLine(tail, found[found.length - 1].line);
  }

  /** Takes the complete text. */
  finish(text) {
    if (REFERENCE.test(text)) this._start = 0;
    if (this._start === 0) this._target.replaceChildren();
    this.update(text);
    this._whenComplete(this._open.map((node) => node.textContent).join(" "));
  }
}
