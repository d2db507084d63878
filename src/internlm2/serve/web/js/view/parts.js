// Buttons and fields that many places need.

import { h } from "../dom.js";
import { t } from "../lang/words.js";
import { icon } from "./icons.js";

/** A round button that is only a picture; `key`: the words that name it. */
export function iconButton(picture, key, clicked, extra = {}) {
  const named = { type: "button", class: "icon-button", "data-tip": key, "aria-label": t(key), title: t(key) };
  return h("button", { ...named, ...extra, on: { click: clicked } }, icon(picture));
}

/** A button with words, and a picture where one is named. */
export function wordButton(key, clicked, { picture = null, ...extra } = {}) {
  const words = h("span", { "data-t": key }, t(key));
  return h("button", { type: "button", ...extra, on: { click: clicked } }, picture && icon(picture), words);
}

/** Whether a key press belongs to an input method that is still composing, as for Chinese. */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Makes a text area as high as its text, up to what the style sheet allows. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/** Puts text on the clipboard; false where the browser forbids it. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
    area.value = text; // without https there is no clipboard, but the old way
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Offers a text as a file. */
export function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = address; // made here, of the kind blob:
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
