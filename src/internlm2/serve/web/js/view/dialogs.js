// Windows over the page, and short notices. The browser's own <dialog> keeps the focus and closes with Esc.

import { h } from "../dom.js";
import { t } from "../lang/words.js";
import { iconButton } from "./parts.js";

const NOTICE_MILLISECONDS = 6000;

/** Opens a dialog and gives it back; it is taken away when it closes. `whenClosed` gets its return value. */
export function openDialog(key, content, { kind = "", whenClosed = () => {} } = {}) {
  const title = h("h2", { id: "dialog-title", "data-t": key }, t(key));
  const dialog = h("dialog", { class: `dialog ${kind}`, "aria-labelledby": "dialog-title" });
  const close = iconButton("close", "close", () => dialog.close(""));
  dialog.append(h("header", {}, title, close), content);
  dialog.addEventListener("close", () => {
    dialog.remove();
    whenClosed(dialog.returnValue);
  });
  dialog.addEventListener("mousedown", (event) => {
    if (event.target === dialog) dialog.close(""); // beside it
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Asks for one line; `kind`: "text" or "password". Resolves with it, or with null. */
export function askFor(key, { value = "", hint = null, problem = null, kind = "text" } = {}) {
  return new Promise((resolve) => {
    const field = h("input", { id: "asked", type: kind, autocomplete: "off", maxlength: "1000", "aria-label": t(key) });
    field.value = value;
    const save = h("button", { type: "submit", class: "primary" }, t("save"));
    const form = h(
      "form", { method: "dialog", class: "stack" },
      hint && h("p", { class: "muted" }, hint), problem && h("p", { class: "problem", role: "alert" }, problem),
      field, h("div", { class: "row end" }, save),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close("yes");
    });
    const dialog = openDialog(key, form, { whenClosed: (said) => resolve(said === "yes" ? field.value.trim() : null) });
    field.select();
  });
}

/** Asks before something is lost. Resolves with whether it may be. */
export function confirm(key, question) {
  return new Promise((resolve) => {
    const yes = h("button", { type: "button", class: "danger", on: { click: () => dialog.close("yes") } }, t(key));
    const no = h("button", { type: "button", autofocus: true, on: { click: () => dialog.close("") } }, t("cancel"));
    const content = h("div", { class: "stack" }, h("p", {}, question), h("div", { class: "row end" }, no, yes));
    const dialog = openDialog(key, content, { whenClosed: (said) => resolve(said === "yes") });
  });
}

/** Says something for a few seconds. */
export function notice(words, isProblem = false) {
  const place = document.getElementById("notices");
  const made = h("p", { class: `notice${isProblem ? " problem" : ""}`, role: isProblem ? "alert" : "status" }, words);
  place.replaceChildren(made);
  setTimeout(() => made.remove(), NOTICE_MILLISECONDS);
}

const COMMAND = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";
const SHORTCUTS = [ // null: or
  [["Enter"], "shortcut_send"], [["Shift", "Enter"], "shortcut_newline"], [["Esc"], "shortcut_stop"],
  [["↑"], "shortcut_edit"], [["/"], "shortcut_focus"], [[COMMAND, "K"], "shortcut_search"],
  [["Alt", "N"], "new_conversation"], [["Alt", "R"], "regenerate"], [["Alt", "S"], "settings"],
  [["?", null, COMMAND, "/"], "shortcut_help"],
];

/** The list of shortcuts. */
export function showShortcuts() {
  if (document.querySelector("dialog[open]")) return;
  const rows = SHORTCUTS.map(([keys, words]) =>
    h("div", {}, h("dt", {}, keys.map((key) => (key === null ? h("span", { class: "muted" }, t("or")) : h("kbd", {}, key)))), h("dd", {}, t(words))));
  openDialog("shortcuts", h("dl", { class: "shortcuts" }, rows));
}
