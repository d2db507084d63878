// Emphasis beside Chinese, Japanese and Korean, which is written without spaces: CommonMark takes `**“重点”**是` for
// stars, because a closing mark after punctuation needs a space or punctuation behind it. Here an ideograph will do.

const IDEOGRAPH = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}\u3000-\u303f\uff00-\uffef]/u;

function before(text, at) {
  const low = text.charCodeAt(at - 1);
  return low >= 0xdc00 && low <= 0xdfff ? text.slice(at - 2, at) : text.slice(at - 1, at);
}

/** Lets emphasis of a markdown-it parser begin and end beside ideographs. */
export function relaxEmphasis(parser) {
  const Plain = parser.inline.State;
  parser.inline.State = class extends Plain {
    scanDelims(start, canSplitWord) {
      const found = super.scanDelims(start, canSplitWord);
      if (this.src[start] !== "*" && this.src[start] !== "~") return found;
      const ahead = start + found.length;
      const [left, right] = [before(this.src, start), String.fromCodePoint(this.src.codePointAt(ahead) ?? 32)];
      const isInner = (side) => side !== "" && !/\s/u.test(side);
      if (IDEOGRAPH.test(left) && ahead < this.posMax && isInner(right)) found.can_open = true;
      if (IDEOGRAPH.test(right) && ahead < this.posMax && isInner(left)) found.can_close = true;
      return found;
    }
  };
}
