// The messages that are shown. While an answer runs only its end is drawn anew, once a frame at most; the view follows
// it down as long as the reader has not scrolled up.

import { h } from "../dom.js";
import { path } from "../keep/tree.js";
import { language, t } from "../lang/words.js";
import { AnswerView, outputMessage, readerMessage } from "./message.js";
import { copyText } from "./parts.js";

const NEAR_PIXELS = 60;
const SHARE = 3; // drawing takes at most a quarter of the time

export class Thread {
  constructor(session, actions) {
    this._session = session;
    this._actions = actions;
    this._scroll = document.getElementById("scroll");
    this._list = document.getElementById("thread");
    this._live = document.getElementById("live");
    this._down = document.getElementById("jump-down");
    this._kept = new Map(); // by node: {signature, element}
    this._running = null;
    this._isFollowing = true;
    this._lastTop = 0;
    this._isDue = false;
    this._restUntil = 0;
    this._listen();
  }

  _listen() {
    this._scroll.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = this._scroll;
      // Content that grows also moves the end away; only the reader moves up.
      if (scrollHeight - scrollTop - clientHeight < NEAR_PIXELS) this._isFollowing = true;
      else if (scrollTop < this._lastTop) this._isFollowing = false;
      this._lastTop = scrollTop;
      this._down.hidden = this._isFollowing;
    }, { passive: true });
    this._down.addEventListener("click", () => this.toEnd());
    this._list.addEventListener("click", async (event) => {
      const button = event.target.closest('[data-action="copy-code"]');
      if (!button) return;
      const code = button.closest(".code-block").querySelector("pre").textContent;
      if (!(await copyText(code))) return;
      button.textContent = t("copied");
      setTimeout(() => { button.textContent = t("copy"); }, 1500);
    });
    new ResizeObserver(() => { if (this._isFollowing && this._kept.size) this.toEnd(); }).observe(this._list);
    const { _session: session } = this;
    session.addEventListener("conversation", (event) => this.render(event.detail ?? {}));
    session.addEventListener("progress", (event) => this._progress(event.detail ?? {}));
  }

  /** Scrolls to the newest message, and follows it. */
  toEnd() {
    this._isFollowing = true;
    this._scroll.scrollTop = this._scroll.scrollHeight;
    this._down.hidden = true;
  }

  /** Draws what is shown; messages that have not changed are kept. */
  render({ isNew = false, isOver = false } = {}) {
    const { current, run } = this._session;
    const nodes = path(current);
    const isOther = this._id !== current.id;
    if (isOther) this._kept.clear();
    this._id = current.id;
    const results = new Map(nodes.filter(({ message }) => message.role === "tool").map(({ message }) => [message.tool_call_id, message]));
    const called = new Set(nodes.flatMap(({ message }) => (message.tool_calls ?? []).map((call) => call.id)));
    const kept = new Map();
    if (isNew) this._live.replaceChildren(h("p", {}, t("answer_begins")));
    const shown = nodes.filter(({ message }) => message.role !== "tool" || !called.has(message.tool_call_id));
    this._running = null;
    const lastAnswer = nodes.findLastIndex(({ message }) => message.role !== "tool"); // results of tools do not count
    for (const node of shown) kept.set(node.id, this._drawn(node, { results, run, isLast: nodes.indexOf(node, lastAnswer) >= 0 }));
    this._kept = kept;
    this._place([...kept.values()].map(({ element }) => element));
    document.getElementById("empty").hidden = nodes.length > 0;
    if (nodes.length === 0) this._scroll.scrollTop = 0;
    else if (isNew || isOther || (this._isFollowing && !isOver)) this.toEnd();
  }

  /** Shows the elements in their order. One that stays is not moved: it keeps its focus, selection and scroll. */
  _place(elements) {
    const focused = this._list.contains(document.activeElement) ? document.activeElement : null;
    const [row, tip] = [[...this._list.children].indexOf(focused?.closest(".message")), focused?.dataset.tip];
    const wanted = new Set(elements);
    for (const child of [...this._list.children]) if (!wanted.has(child)) child.remove();
    let next = this._list.firstChild;
    for (const each of elements) {
      if (each === next) next = next.nextSibling;
      else this._list.insertBefore(each, next);
    }
    if (focused && !focused.isConnected) this._focusAgain(elements[row], tip);
  }

  /** Goes to the button that took the place of the one that had the focus, else to one beside it, else to the field. */
  _focusAgain(element, tip) {
    const enabled = [...(element?.querySelectorAll(".actions button:enabled") ?? [])];
    const found = enabled.find((each) => each.dataset.tip === tip) ?? enabled.find((each) => each.closest(".versions")) ?? enabled[0];
    (found ?? document.getElementById("ask")).focus({ preventScroll: true });
  }

  _drawn(node, { results, run, isLast }) {
    const { message } = node;
    const { current } = this._session;
    const isRunning = run !== null && run.nodes[run.nodes.length - 1] === node;
    const callResults = (message.tool_calls ?? []).map((call) => results.get(call.id)?.content ?? null);
    const versions = (node.parent === null ? current.top : current.nodes[node.parent]).children;
    const signature = JSON.stringify([message, callResults, versions, isLast, isRunning, language()]);
    const before = this._kept.get(node.id);
    if (before?.signature === signature && !isRunning) return before;
    const actions = this._actions;
    if (message.role === "user" || message.role === "system") return { signature, element: readerMessage(current, node, actions) };
    if (message.role !== "assistant") return { signature, element: outputMessage(node) };
    const view = new AnswerView(current, node, { results, actions, isRunning, isLast, announce: (words) => this._say(words) });
    if (isRunning) this._running = view;
    return { signature, element: view.element };
  }

  _say(words) {
    if (words.trim()) this._live.append(h("p", {}, words));
  }

  _progress({ isOver = false }) {
    if (isOver) {
      this._running?.complete();
      this._say(t("answer_complete"));
      this._running = null;
    } else if (!this._isDue) {
      this._isDue = true;
      const wait = this._restUntil - performance.now();
      if (wait > 0) setTimeout(() => requestAnimationFrame(() => this._draw()), wait);
      else requestAnimationFrame(() => this._draw());
    }
  }

  _draw() {
    this._isDue = false;
    if (this._running === null) return;
    const began = performance.now();
    this._running.update();
    const ended = performance.now();
    this._restUntil = ended + SHARE * (ended - began);
  }
}
