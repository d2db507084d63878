// Small things that the browser remembers: language, colours, the settings used last, the API key of this window.

function get(storage, name) {
  try {
    return globalThis[storage].getItem(`internlm2-${name}`);
  } catch {
    return null;
  }
}

function set(storage, name, value) {
  try {
    if (value === null || value === "") globalThis[storage].removeItem(`internlm2-${name}`);
    else globalThis[storage].setItem(`internlm2-${name}`, value);
  } catch {
    // forbidden by the browser: it will not be remembered
  }
}

export const preferences = {
  get language() { return get("localStorage", "language"); },
  set language(value) { set("localStorage", "language", value); },
  get colours() { return get("localStorage", "colours"); },
  set colours(value) { set("localStorage", "colours", value); },
  get settings() { return get("localStorage", "settings"); },
  set settings(value) { set("localStorage", "settings", value); },
  get opened() { return get("sessionStorage", "opened"); },
  set opened(value) { set("sessionStorage", "opened", value); },
  get key() { return get("sessionStorage", "key") ?? ""; }, // gone with the window
  set key(value) { set("sessionStorage", "key", value); },
};
