// One message: its words, its calls, what can be done with it.

import { h } from "../dom.js";
import { isWhole, textOf, versions } from "../keep/tree.js";
import { t } from "../lang/words.js";
import { StreamedText } from "../text/streamed.js";
import { copyText, fit, iconButton, isComposing } from "./parts.js";
import { callCard, outputCard } from "./tools.js";
import { icon } from "./icons.js";

/** Tokens, rate, and the time to the first token, as far as they are known. */
function figures(message) {
  const count = message.usage?.completion_tokens;
  const words = [];
  if (count) {
    words.push(t("stats_tokens", { count }));
    if (count > 1 && message.seconds > 0.01) words.push(t("stats_rate", { rate: ((count - 1) / message.seconds).toFixed(1) }));
  }
  if (message.firstSeconds !== undefined) words.push(t("stats_first", { seconds: message.firstSeconds.toFixed(1) }));
  return words.length ? h("span", { class: "figures" }, words.join(" · ")) : null;
}

function versionButtons(conversation, node, actions) {
  const { index, count } = versions(conversation, node.id);
  if (count < 2) return null;
  const go = (step) => () => actions.choose(node.id, step);
  return h(
    "span", { class: "versions" },
    iconButton("back", "previous_version", go(-1), { disabled: index === 0 }),
    h("span", {}, t("version_of", { index: index + 1, count })),
    iconButton("forward", "next_version", go(1), { disabled: index === count - 1 }),
  );
}

function copyButton(message) {
  const button = iconButton("copy", "copy", async () => {
    if (!(await copyText(textOf(message)))) return;
    button.replaceChildren(icon("check"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** A form in place of a message of the reader; `whenDone` gets the new text, or null. */
function editForm(message, whenDone) {
  const area = h("textarea", { class: "edit-area", dir: "auto", "aria-label": t("edit"), rows: "1" });
  area.value = textOf(message);
  const form = h(
    "form", { class: "edit-form stack" }, area,
    h(
      "div", { class: "row end" },
      h("button", { type: "button", on: { click: () => whenDone(null) } }, t("cancel")),
      h("button", { type: "submit", class: "primary" }, t("save_and_send")),
    ),
  );
  area.addEventListener("input", () => fit(area));
  area.addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      whenDone(null);
    } else if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (area.value.trim()) whenDone(area.value);
  });
  return { form, area };
}

/** A message of the reader, or of the system within a conversation. actions: edit, choose. */
export function readerMessage(conversation, node, actions) {
  const { message } = node;
  const isUser = message.role === "user";
  const bubble = h("div", { class: "bubble", dir: "auto" }, textOf(message));
  const bar = h("div", { class: "actions" });
  const made = h("article", { class: `message ${isUser ? "reader" : "system"}`, "aria-label": t(isUser ? "you" : "system"), "data-node": node.id }, bubble, bar);
  const edit = () => {
    const { form, area } = editForm(message, (text) => {
      form.replaceWith(bubble);
      bar.hidden = false;
      document.getElementById("ask").focus();
      if (text !== null) actions.edit(node.id, text);
    });
    bubble.replaceWith(form);
    bar.hidden = true;
    fit(area);
    area.focus();
  };
  made.addEventListener("edit-message", edit);
  const buttons = [versionButtons(conversation, node, actions), copyButton(message), iconButton("edit", "edit", edit)];
  bar.append(...buttons.filter(Boolean));
  return made;
}

/** An answer. results: messages of tools by the id of their call. actions: regenerate, goOn, choose, giveResult. */
export class AnswerView {
  constructor(conversation, node, { results, actions, isRunning, isLast, announce = () => {} }) {
    const { message } = node;
    this.node = node;
    this._text = h("div", { class: "prose" });
    this._cards = h("div", { class: "cards" });
    this.element = h("article", { class: "message answer", "aria-label": t("answer"), "data-node": node.id }, this._text, this._cards);
    this._streamed = new StreamedText(this._text, t, isRunning ? announce : undefined);
    this._given = { results, actions, isLast };
    this._numCalls = 0;
    this._shown = null;
    if (isRunning) {
      this.element.classList.add("running");
      this.element.setAttribute("aria-busy", "true");
      this.element.append(h("div", { class: "waiting", "aria-hidden": "true" }, h("i"), h("i"), h("i")));
      this.update();
    } else {
      this._streamed.finish(textOf(message));
      this._showCalls();
      this._showEnd(conversation);
    }
  }

  /** Shows what has come since. */
  update() {
    const text = textOf(this.node.message);
    if (text !== this._shown) this._streamed.update(text);
    this._shown = text;
    this._showCalls();
    this.element.classList.toggle("has-words", text !== "" || this._numCalls > 0);
  }

  /** Tells the last words to those who listen. */
  complete() {
    this._streamed.finish(textOf(this.node.message));
  }

  _showCalls() {
    const { results, actions, isLast } = this._given;
    const calls = this.node.message.tool_calls ?? [];
    for (const call of calls.slice(this._numCalls)) {
      const mayGive = isLast && !this.element.classList.contains("running") && call.id && isWhole(call);
      this._cards.append(callCard(call, results.get(call.id), mayGive ? actions.giveResult : null, isLast));
    }
    this._numCalls = calls.length;
  }

  _showEnd(conversation) {
    const { actions, isLast } = this._given;
    const { message, id } = this.node;
    const notes = [message.isStopped && t("stopped"), message.finish === "length" && t("length_reached")].filter(Boolean);
    if (notes.length) this.element.append(h("p", { class: "note muted" }, notes.join(" · ")));
    if (message.error) {
      const retry = h("button", { type: "button", class: "small", on: { click: () => actions.regenerate(id) } }, t("retry"));
      this.element.append(h("div", { class: "failure", role: "alert" }, icon("warning"), h("span", {}, message.error), isLast && retry));
    }
    const isCut = isLast && !message.tool_calls && textOf(message) && (message.isStopped || message.finish === "length" || message.error);
    const goOn = isCut && h("button", { type: "button", class: "small quiet", on: { click: () => actions.goOn(id) } }, t("continue"));
    const turns = versionButtons(conversation, this.node, actions);
    if (message.tool_calls && !isLast) { // the answer goes on below
      if (turns) this.element.append(h("div", { class: "actions" }, turns));
      return;
    }
    const buttons = [
      turns, textOf(message) && copyButton(message),
      !(message.error && isLast) && iconButton("again", "regenerate", () => actions.regenerate(id)), goOn, figures(message),
    ];
    this.element.append(h("div", { class: "actions" }, buttons.filter(Boolean)));
  }
}

/** An output that no answer asked for. */
export function outputMessage(node) {
  return h("article", { class: "message answer", "aria-label": t("environment"), "data-node": node.id }, outputCard(node.message));
}
