// The words of the page, in the reader's language.

import en from "./en.js";
import zh from "./zh.js";
import { preferences } from "../keep/preferences.js";

const TABLES = { en, zh };

/** The languages there are, by their own names. */
export const LANGUAGES = { en: "English", zh: "中文" };

function first() {
  const wanted = [preferences.language, ...(globalThis.navigator?.languages ?? [])];
  for (const each of wanted) {
    const found = String(each ?? "").toLowerCase().split("-")[0];
    if (Object.hasOwn(TABLES, found)) return found;
  }
  return "en";
}

let current = first();

/** The language now. */
export function language() {
  return current;
}

/** Words by their key; {name} stands for `values.name`. */
export function t(key, values = {}) {
  const found = TABLES[current][key];
  if (found === undefined) throw new Error(`There are no words for ${key}.`);
  return found.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

/** Puts words into every element below `root` that asks for some: data-t, data-aria (also as its title), data-hint. */
export function translate(root) {
  for (const each of root.querySelectorAll("[data-t]")) each.textContent = t(each.dataset.t);
  for (const each of root.querySelectorAll("[data-aria]")) each.setAttribute("aria-label", t(each.dataset.aria));
  for (const each of root.querySelectorAll("[data-tip]")) {
    each.setAttribute("aria-label", t(each.dataset.tip));
    each.title = t(each.dataset.tip);
  }
  for (const each of root.querySelectorAll("[data-hint]")) each.placeholder = t(each.dataset.hint);
}

/** Changes the language of the page, and remembers it. */
export function setLanguage(next) {
  current = next;
  preferences.language = next;
  show();
}

/** Writes the language into the document. */
export function show() {
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  translate(document);
}
