// Where a formula begins and ends in Markdown: $...$, $$...$$, \(...\), \[...\], and bare environments.

const PAIRS = [
  { open: "$$", close: "$$", isBlock: true },
  { open: "\\[", close: "\\]", isBlock: true },
  { open: "\\(", close: "\\)", isBlock: false },
  { open: "$", close: "$", isBlock: false },
];

function closing(source, from, close, end) {
  for (let at = from; at < end; at += 1) {
    if (source.startsWith(close, at)) return at;
    if (source[at] === "\\") at += 1;
  }
  return -1;
}

/** "$5 and $6" is money: a single dollar encloses a formula only without spaces inside and digits after. */
function isMoney(source, from, to) {
  const inner = source.slice(from, to);
  return /^\s|\s$|\n\s*\n/.test(inner) || inner.includes("`") || /[0-9]/.test(source[to + 1] ?? "");
}

function inlineRule(state, silent) {
  const { src, pos, posMax } = state;
  const pair = PAIRS.find((each) => src.startsWith(each.open, pos));
  if (pair === undefined) return false;
  const from = pos + pair.open.length;
  const to = closing(src, from, pair.close, posMax);
  if (to < 0 || to + pair.close.length > posMax || !src.slice(from, to).trim()) return false;
  if (pair.open === "$" && isMoney(src, from, to)) return false;
  if (!silent) {
    const token = state.push("formula", "", 0);
    token.content = src.slice(from, to).trim();
    token.meta = { isBlock: pair.isBlock };
  }
  state.pos = to + pair.close.length;
  return true;
}

/** `$$` or `\[` at the start of a line, over any number of lines; open to the end where nothing closes it yet. */
function blockRule(state, startLine, endLine, silent) {
  const lineText = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
  const first = lineText(startLine);
  const pair = PAIRS.slice(0, 2).find((each) => first.startsWith(each.open));
  if (pair === undefined || state.sCount[startLine] - state.blkIndent >= 4) return false;
  const parts = [];
  for (let line = startLine; line < endLine; line += 1) {
    if (line > startLine && state.sCount[line] < state.blkIndent && lineText(line)) return false;
    const text = line === startLine ? first.slice(pair.open.length) : lineText(line);
    const at = closing(text, 0, pair.close, text.length);
    if (at >= 0) {
      if (text.slice(at + pair.close.length).trim()) return false; // words follow: a matter of the line
      parts.push(text.slice(0, at));
      if (!silent) push(state, startLine, line + 1, parts.join("\n"));
      return true;
    }
    if (line > startLine && !text.trim()) return false;
    parts.push(text);
  }
  return false;
}

function push(state, from, to, source) {
  const token = state.push("formula_block", "", 0);
  token.block = true;
  token.content = source.trim();
  token.map = [from, to];
  state.line = to;
}

/** Teaches a markdown-it parser the rules. */
export function addMathRules(parser) {
  parser.inline.ruler.before("escape", "formula", inlineRule);
  parser.block.ruler.before("fence", "formula_block", blockRule, { alt: ["paragraph", "reference", "blockquote", "list"] });
}
