// Calls of tools and what came out of them: foldable, with text, code and pictures.

import { h } from "../dom.js";
import { CODE_TOOLS, picturesOf, textOf } from "../keep/tree.js";
import { t } from "../lang/words.js";
import { codeElement } from "../text/code.js";
import { safePicture } from "../text/links.js";
import { icon } from "./icons.js";
import { fit, isComposing, wordButton } from "./parts.js";

const LONG_OUTPUT = 2000; // characters; longer outputs begin folded

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function block(key, shown) {
  return [h("p", { class: "label", "data-t": key }, t(key)), h("pre", { tabindex: "0", role: "group", "aria-label": t(key) }, shown)];
}

/** What a call is given: its code, or its arguments as JSON. */
function given(call) {
  const { name, arguments: text } = call.function;
  const found = parsed(text);
  if (CODE_TOOLS.has(name) && typeof found?.code === "string") return block("code_of_call", codeElement(found.code, "python"));
  return block("arguments", codeElement(found === null ? text : JSON.stringify(found, null, 2), "json"));
}

/** Text and pictures of a result. */
export function resultParts(message) {
  const text = textOf(message);
  const parts = [];
  if (text) {
    const found = parsed(text);
    const isJson = found !== null && typeof found === "object";
    parts.push(...block("result", isJson ? codeElement(JSON.stringify(found, null, 2), "json") : codeElement(text, "")));
  }
  for (const address of picturesOf(message)) {
    const shown = safePicture(address);
    const words = t("result");
    parts.push(shown ? h("img", { src: shown, alt: words, class: "picture" }) : h("p", { class: "muted" }, address.slice(0, 200)));
  }
  return parts;
}

function resultForm(call, send) {
  const label = t("give_result", { name: call.function.name });
  const area = h("textarea", { rows: "2", "aria-label": label, placeholder: label });
  const form = h(
    "form", { class: "stack result-form" },
    h("p", { class: "muted small-text", "data-t": "give_result_hint" }, t("give_result_hint")), area,
    h("div", { class: "row end" }, wordButton("send_result", () => {}, { type: "submit", class: "primary" })),
  );
  area.addEventListener("input", () => fit(area));
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
    event.preventDefault();
    form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(call.id, area.value);
  });
  return form;
}

/**
 * The card of one call. result: the message with what came out, if any; send: takes a result, where one is due;
 * isLast: whether no answer has followed.
 */
export function callCard(call, result, send, isLast) {
  const isCode = CODE_TOOLS.has(call.function.name);
  const title = isCode ? t("tool_code") : t("tool_call", { name: call.function.name });
  const state = result ? icon("check") : send && h("span", { class: "muted small-text" }, t("tool_waits"));
  const isOpen = !result || Boolean(picturesOf(result).length) || (isLast && textOf(result).length < LONG_OUTPUT);
  return h(
    "details", { class: "card", open: isOpen },
    h("summary", {}, icon("tool"), h("span", { class: "card-title" }, title), state),
    h("div", { class: "card-body" }, given(call), result && resultParts(result), !result && send && resultForm(call, send)),
  );
}

/** The card of an output that belongs to no call. */
export function outputCard(message) {
  const name = message.name ? ` · ${message.name}` : "";
  return h(
    "details", { class: "card", open: textOf(message).length < LONG_OUTPUT },
    h("summary", {}, icon("tool"), h("span", { class: "card-title" }, t("environment") + name)),
    h("div", { class: "card-body" }, resultParts(message)),
  );
}
