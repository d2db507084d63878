// Where the reader writes. Enter sends, but never while an input method composes.

import { path } from "../keep/tree.js";
import { t } from "../lang/words.js";
import { fit, isComposing } from "./parts.js";

export class Composer {
  constructor(session) {
    this._session = session;
    this._area = document.getElementById("ask");
    this._send = document.getElementById("send");
    this._stop = document.getElementById("stop");
    this._drafts = new Map();
    this._id = session.current.id;
    this._listen();
    this._show();
  }

  focus() {
    this._area.focus();
  }

  /** Writes words for the reader, who may change them. */
  suggest(words) {
    this._area.value = words;
    this._typed();
    this.focus();
  }

  _listen() {
    document.getElementById("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this._submit();
    });
    this._area.addEventListener("input", () => this._typed());
    this._area.addEventListener("keydown", (event) => this._pressed(event));
    this._stop.addEventListener("click", () => this._session.stop());
    this._session.addEventListener("state", () => this._show());
    this._session.addEventListener("conversation", () => this._show());
  }

  _typed() {
    fit(this._area);
    this._drafts.set(this._id, this._area.value);
    this._send.disabled = !this._area.value.trim();
  }

  _pressed(event) {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      this._submit();
    } else if (event.key === "ArrowUp" && !this._area.value && !this._session.run) {
      const mine = path(this._session.current).filter(({ message }) => message.role === "user").pop();
      if (!mine) return;
      event.preventDefault();
      document.querySelector(`[data-node="${mine.id}"]`)?.dispatchEvent(new Event("edit-message"));
    }
  }

  _submit() {
    const text = this._area.value.trim();
    if (!text || this._session.run) return;
    this._area.value = "";
    this._typed();
    this._session.send(text);
    this.focus();
  }

  _show() {
    const { current, run } = this._session;
    if (current.id !== this._id) {
      this._id = current.id;
      this._area.value = this._drafts.get(current.id) ?? "";
      this._typed();
    }
    const hadFocus = document.activeElement === this._send || document.activeElement === this._stop;
    this._send.hidden = run !== null;
    this._stop.hidden = run === null;
    if (hadFocus) this.focus();
    this._area.placeholder = t("ask");
  }
}
