// Markdown, code, formulas: what becomes an element, and that nothing else ever does.

import assert from "node:assert/strict";
import { test } from "node:test";
import { elements, written } from "./fake_dom.js";
import { VECTORS } from "./vectors.js";

globalThis.self = globalThis; // as in a browser, for KaTeX
const WEB = new URL("../../../src/internlm2/serve/web/js/", import.meta.url);
const { h, setAttribute } = await import(new URL("dom.js", WEB));
const { codeElement } = await import(new URL("text/code.js", WEB));
const { formulaElement, loadFormulas } = await import(new URL("text/formula.js", WEB));
const { safeLink, safePicture } = await import(new URL("text/links.js", WEB));
const { addMarkup } = await import(new URL("text/markup.js", WEB));
const { addTokens, parse } = await import(new URL("text/markdown.js", WEB));
const { StreamedText } = await import(new URL("text/streamed.js", WEB));
await loadFormulas();

const label = (key) => key;
const TAGS = new Set([
  "p", "ul", "ol", "li", "blockquote", "thead", "tbody", "tr", "th", "td", "table", "em", "strong", "s", "a", "img", "br", "hr",
  "code", "pre", "button", "div", "span", "h3", "h4", "h5", "h6", "math", "semantics", "annotation", "svg", "path", "line",
  "mrow", "mi", "mo", "mn", "mtext", "mstyle", "mspace", "msup", "msub", "mfrac", "msqrt", "mpadded", "mtable", "mtr", "mtd",
]);
const ATTRIBUTES = new Set([
  "class", "dir", "href", "target", "rel", "title", "src", "alt", "loading", "start", "tabindex", "role", "aria-label", "aria-hidden",
  "data-action", "data-t", "data-aria", "type", "encoding", "display", "displaystyle", "scriptlevel", "mathcolor", "mathvariant",
  "width", "height", "viewBox", "preserveAspectRatio", "d", "stretchy", "fence", "lspace", "rspace", "separator", "voffset",
  "mathbackground", "columnalign", "rowspacing", "columnspacing", "x1", "x2", "y1", "y2", "stroke-width", "minsize", "maxsize",
]);

function rendered(text) {
  const box = h("div");
  addTokens(box, parse(text), label);
  return box;
}

function checkHarmless(box, source) {
  for (const each of elements(box)) {
    assert.ok(TAGS.has(each.tag), `<${each.tag}> from ${source}`);
    assert.deepEqual(each.listeners, []);
    for (const [name, value] of each.attributes) {
      assert.ok(ATTRIBUTES.has(name), `${name} from ${source}`);
      if (name === "href") assert.match(value, /^(https?:\/\/|mailto:)/i, source);
      if (name === "src") assert.match(value, /^data:image\/(png|jpeg|gif|webp);base64,/, source);
    }
    for (const [name, value] of each.style.set) {
      assert.doesNotMatch(`${name}:${value}`, /url|expression|fixed|;|javascript|var\(/i, source);
      const size = /^-?([\d.]+)em$/.exec(value);
      if (size) assert.ok(Number(size[1]) < 61, `${name}: ${value} from ${source}`);
    }
  }
}

test("there are many attacks", () => assert.ok(new Set(VECTORS).size >= 80));

for (const [n, vector] of VECTORS.entries()) {
  test(`attack ${n} stays text: ${JSON.stringify(vector)}`, () => {
    checkHarmless(rendered(vector), vector);
    const box = h("div");
    const streamed = new StreamedText(box, label);
    for (let at = 1; at <= vector.length; at += 1) {
      streamed.update(vector.slice(0, at));
      checkHarmless(box, vector.slice(0, at));
    }
    streamed.finish(vector);
    checkHarmless(box, vector);
  });
}

test("Markdown becomes what it says", () => {
  const cases = [
    ["# One\n\ntwo", '<h3 class="size-1">One</h3><p>two</p>'],
    ["a *b* **c** ~~d~~ `e`", '<p>a <em>b</em> <strong>c</strong> <s>d</s> <code class="inline-code">e</code></p>'],
    ["- a\n- b\n  1. c", "<ul><li>a</li><li>b<ol><li>c</li></ol></li></ul>"],
    ["3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'],
    ["> a\n> b", "<blockquote><p>a<br></br>b</p></blockquote>"],
    ["a\n\n---\n\nb", "<p>a</p><hr></hr><p>b</p>"],
    ["| a | b |\n|---|--:|\n| 1 | 2 |",
      '<div class="table-frame" tabindex="0" role="group" aria-label="table" data-aria="table"><table><thead><tr><th>a</th><th class="align-right">b</th></tr></thead>' +
      '<tbody><tr><td>1</td><td class="align-right">2</td></tr></tbody></table></div>'],
    ["<b>x</b> &amp; &copy;", "<p>&lt;b&gt;x&lt;/b&gt; &amp; ©</p>"],
    ["2 < 3 & 4 > 1", "<p>2 &lt; 3 &amp; 4 &gt; 1</p>"],
    ["See https://e.example/a_b.", '<p>See <a href="https://e.example/a_b" target="_blank" rel="noopener noreferrer nofollow" title="https://e.example/a_b">https://e.example/a_b</a>.</p>'],
    ["![k](data:image/png;base64,AAAA)", '<p><img src="data:image/png;base64,AAAA" alt="k" class="picture" loading="lazy"></img></p>'],
    ["**“重点”**是", "<p><strong>“重点”</strong>是</p>"],
    ["请看**《书》**。他说**“好”**了", "<p>请看<strong>《书》</strong>。他说<strong>“好”</strong>了</p>"],
    ["a**b**c ** d **", "<p>a<strong>b</strong>c ** d **</p>"],
    ["2 * 3 * 4", "<p>2 * 3 * 4</p>"],
  ];
  for (const [source, expected] of cases) assert.equal(written(rendered(source)).replaceAll(' dir="auto"', ""), expected, source);
});

test("each block runs in the direction of its own words, and code from left to right", () => {
  const box = rendered("# a\n\nb\n\n- c\n\n1. d\n\n> e\n\n| f |\n|---|\n| g |\n\n```\nh\n```\n");
  const found = elements(box).filter((each) => each.attributes.has("dir")).map((each) => [each.tag, each.attributes.get("dir")]);
  const blocks = ["h3", "p", "ul", "ol", "blockquote", "table"].map((tag) => [tag, "auto"]);
  assert.deepEqual(found, [...blocks, ["pre", "ltr"]]); // no block within another: it would not count for the outer one
});

test("a picture of another host is a link, and nothing is loaded", () => {
  const box = rendered("![a cat](https://e.example/cat.png)");
  assert.deepEqual(elements(box).map((each) => each.tag), ["p", "a"]);
  assert.match(box.textContent, /a cat/);
});

test("formulas are found, money is not", () => {
  const formulas = (source) => elements(rendered(source)).filter((each) => /\bformula\b/.test(each.attributes.get("class") ?? ""));
  const counts = [
    ["$a+b$", 1], ["\\(a+b\\)", 1], ["$$a$$", 1], ["\\[a\\]", 1], ["$$\na\n$$", 1], ["\\[\na\n+ b\n\\]", 1], ["a $x$ b $y$", 2],
    ["- $$x^2$$\n- b", 1], ["设 $x$，则 $y$。", 2], ["$5 and $6", 0], ["$5-$10", 0], ["`$a$`", 0], ["\\$a\\$", 0],
    ["```\n$a$\n```", 0], ["$ a $", 0], ["$$ open", 0], ["$x", 0], ["a\n$$b$$\nc", 1],
  ];
  for (const [source, count] of counts) assert.equal(formulas(source).length, count, source);
});

test("a formula has MathML for readers of the screen, and its source where it is wrong", () => {
  const good = formulaElement("\\frac{a}{b} + \\sqrt{x} \\begin{aligned} a&=b \\end{aligned} \\fbox{y} \\cancel{z} \\underbrace{q}_{r}", true);
  const tags = new Set(elements(good).map((each) => each.tag));
  for (const tag of ["math", "mfrac", "msqrt", "svg"]) assert.ok(tags.has(tag), tag);
  assert.ok(elements(good).some((each) => each.style.set.length), "styles are set one by one");
  const wrong = formulaElement("\\frac{a", false);
  assert.equal(written(wrong), "\\frac{a");
  assert.match(wrong.attributes.get("class"), /formula-source/);
});

test("KaTeX's markup is understood whole", () => {
  const sources = [
    "\\sum_{i=1}^n i^2", "\\int_0^\\infty e^{-x^2}\\,dx", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\overrightarrow{AB}", "\\hat{x}\\vec{v}\\bar{y}",
    "\\begin{cases}a&b\\\\c&d\\end{cases}", "\\left\\{\\frac12\\right\\}", "\\mathbb{R}\\mathcal{F}\\mathfrak{g}", "\\text{中文}", "\\boxed{42}",
    "\\binom{n}{k}", "\\xrightarrow{f}", "\\color{red}x", "\\colorbox{yellow}{x}", "\\begin{array}{|c|c|}\\hline a&b\\\\\\hline\\end{array}",
    "\\lim_{x\\to0}", "\\substack{a\\\\b}", "\\tag{1} x", "\\overline{z}\\underline{w}", "\\sqrt[3]{x}", "\\not=", "\\oint\\iint", "a'", "x^{y^z}",
    "\\bigl(\\Bigr]", "\\stackrel{d}{=}", "\\operatorname{argmax}", "\\dots\\cdots\\ddots", "\\phantom{x}\\hspace{1em}", "\\cancel{x}\\bcancel{y}\\sout{z}",
    "\\begin{CD}A@>a>>B\\end{CD}", "\\utilde{a}\\widehat{abc}", "\\overbrace{a}^{b}", "\\rule{1em}{2em}", "\\raisebox{1em}{x}", "\\angl n", "\\Huge x",
  ];
  for (const source of sources) {
    const made = formulaElement(source, true);
    assert.doesNotMatch(made.attributes.get("class"), /formula-source/, source);
  }
});

test("code has colours, and its text is the same", () => {
  const samples = {
    python: 'def f(x: "a<b&\'"):\n    return x  # <script>', html: "<a href='x'>&amp;</a>", json: '{"a": [1, null]}', js: "`${x}` => </script>",
    bash: "echo \"$HOME\" && ls", cpp: "#include <vector>\nint main() { return 1 < 2; }", rust: "fn f<'a>(x: &'a str) {}", sql: "SELECT '<' FROM t",
    yaml: "a: &b <x>", diff: "- <a>\n+ <b>", css: "a > b { color: red }", unknown: "<x>",
  };
  for (const [language, source] of Object.entries(samples)) {
    const made = codeElement(source, language);
    assert.equal(made.textContent, source, language);
    if (language !== "unknown") assert.ok(elements(made).some((each) => /^hljs-/.test(each.attributes.get("class"))), language);
  }
});

test("markup that nobody should write is refused", () => {
  const rules = { tags: new Map([["span", "html"]]), attributes: new Set(), styles: new Set(["color"]) };
  const wrong = [
    "<b>x</b>", "<script>x</script>", '<span onclick="x">y</span>', '<span id="ask">y</span>', '<span style="position:fixed">y</span>', '<span style="color:url(x)">y</span>',
    "<span>x", "</span>", "<span>x</div>", "<span", "a < b", "<!-- x -->", "<span class=x>y</span>", '<span class="a"onclick="x">y</span>',
  ];
  for (const markup of wrong) {
    const box = h("div");
    assert.throws(() => addMarkup(box, markup, rules), markup);
    assert.equal(written(box), "", markup);
  }
  const box = h("div");
  addMarkup(box, '<span class="a" style="color:red;">x &lt; &amp;amp; &quot;</span>', rules);
  assert.equal(written(box), '<span class="a">x &lt; &amp;amp; &quot;</span>');
  assert.deepEqual(box.childNodes[0].style.set, [["color", "red"]]);
});

test("no element or attribute that runs or loads can be made", () => {
  for (const tag of ["script", "SCRIPT", "style", "iframe", "object", "embed", "base", "link", "meta", "template"]) assert.throws(() => h(tag), tag);
  const made = h("a");
  const wrong = [["onclick", "x"], ["ONCLICK", "x"], ["style", "x"], ["srcdoc", "x"], ["href", "javascript:x"], ["src", "http://e.example/x"],
    ["xlink:href", "x"], ["formaction", "x"], ["HREF", "javascript:x"], ["action", "x"]];
  for (const [name, value] of wrong) assert.throws(() => setAttribute(made, name, value), name);
});

test("links and pictures: what is safe", () => {
  for (const good of ["https://e.example/a?b=c#d", "http://e.example", "mailto:a@e.example", "https://例子.中国/路"]) assert.equal(safeLink(good), good);
  for (const bad of ["/a", "a", "#a", "javascript:1", "ftp://e.example", "tel:1", " https://e.example", "https://e.example/\n", "https:\\\\e.example", "", "https://ann:secret@e.example", "https://ann@e.example"]) {
    assert.equal(safeLink(bad), null, bad);
  }
  for (const good of ["data:image/png;base64,AAAA", "/files/a.png", "files/a-b_c.png", "a.png"]) assert.equal(safePicture(good), good);
  for (const bad of ["https://e.example/a.png", "//e.example/a.png", "data:image/svg+xml;base64,AAAA", "data:image/png,x", "../a.png", "/../a", "/a//b",
    "javascript:1", "blob:x", "/\\e.example", "/a?b", "", "/"]) assert.equal(safePicture(bad), null, bad);
});

const LONG = `# Title

A paragraph with **bold** and a [link][1] and $x^2$.

- one
- two

  still two

1. first
2. second
   \`\`\`python
   def f(): pass
   \`\`\`

> quote
> goes on

| a | b |
|---|---|
| 1 | 2 |

$$
a + b
$$

\`\`\`js
const a = 1;

// b
\`\`\`
Setext
======
\\[
x = \\frac{1}{2}
\\]

    indented

***
end[^1] 中文**“结束”**了。

[1]: https://e.example/late
`;

test("an answer that grows ends as the whole one, however it is cut", () => {
  const whole = written(rendered(LONG));
  for (const step of [1, 2, 3, 7, 50, 1000]) {
    const box = h("div");
    const streamed = new StreamedText(box, label);
    for (let at = step; at < LONG.length; at += step) streamed.update(LONG.slice(0, at));
    streamed.finish(LONG);
    assert.equal(written(box), whole, `step ${step}`);
  }
});

test("at each moment a growing answer is what it would be, read anew", () => {
  const text = LONG.replace(/\[link\]\[1\]/, "link").replace(/\[1\]:.*\n/, "");
  const box = h("div");
  const streamed = new StreamedText(box, label);
  for (let at = 1; at <= text.length; at += 1) {
    streamed.update(text.slice(0, at));
    assert.equal(written(box), written(rendered(text.slice(0, at))), text.slice(Math.max(0, at - 40), at));
  }
});

test("only the last block is made anew", () => {
  const box = h("div");
  const told = [];
  const streamed = new StreamedText(box, label, (words) => told.push(words));
  streamed.update("one\n\ntwo");
  const [first] = box.childNodes;
  streamed.update("one\n\ntwo\n\nthree");
  assert.equal(box.childNodes[0], first);
  assert.deepEqual(told, ["one", "two"]);
  streamed.finish("one\n\ntwo\n\nthree");
  assert.deepEqual(told, ["one", "two", "three"]);
  assert.equal(written(box), ["one", "two", "three"].map((word) => `<p dir="auto">${word}</p>`).join(""));
});
