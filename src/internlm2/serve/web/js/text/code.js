// Code with colours. highlight.js writes the spans, `addMarkup` makes elements of them.

import highlighter from "../../vendor/highlight-11.12.0/core.js";
import bash from "../../vendor/highlight-11.12.0/languages/bash.js";
import c from "../../vendor/highlight-11.12.0/languages/c.js";
import cpp from "../../vendor/highlight-11.12.0/languages/cpp.js";
import css from "../../vendor/highlight-11.12.0/languages/css.js";
import diff from "../../vendor/highlight-11.12.0/languages/diff.js";
import go from "../../vendor/highlight-11.12.0/languages/go.js";
import java from "../../vendor/highlight-11.12.0/languages/java.js";
import javascript from "../../vendor/highlight-11.12.0/languages/javascript.js";
import json from "../../vendor/highlight-11.12.0/languages/json.js";
import latex from "../../vendor/highlight-11.12.0/languages/latex.js";
import markdown from "../../vendor/highlight-11.12.0/languages/markdown.js";
import python from "../../vendor/highlight-11.12.0/languages/python.js";
import rust from "../../vendor/highlight-11.12.0/languages/rust.js";
import sql from "../../vendor/highlight-11.12.0/languages/sql.js";
import typescript from "../../vendor/highlight-11.12.0/languages/typescript.js";
import xml from "../../vendor/highlight-11.12.0/languages/xml.js";
import yaml from "../../vendor/highlight-11.12.0/languages/yaml.js";
import { h } from "../dom.js";
import { addMarkup } from "./markup.js";

const LANGUAGES = {
  bash, c, cpp, css, diff, go, java, javascript, json, latex, markdown, python, rust, sql, typescript, xml, yaml,
};
const MAX_LENGTH = 60_000; // longer code keeps its one colour: highlighting it would hold up the page
const RULES = { tags: new Map([["span", "html"]]), attributes: new Set() };

for (const [name, grammar] of Object.entries(LANGUAGES)) highlighter.registerLanguage(name, grammar);

/** A `<code>` element that shows `text`, with colours where the language is known. */
export function codeElement(text, language) {
  const made = h("code");
  if (language && text.length <= MAX_LENGTH && highlighter.getLanguage(language)) {
    try {
      addMarkup(made, highlighter.highlight(text, { language, ignoreIllegals: true }).value, RULES);
      return made;
    } catch {
      // shown as plain text
    }
  }
  made.append(text);
  return made;
}
