// The line above the messages: what is shown, and how full the context is.

import { h } from "../dom.js";
import { t } from "../lang/words.js";

const NEARLY_FULL = 0.9;

export class Head {
  constructor(session) {
    this._session = session;
    for (const kind of ["conversation", "state", "list"]) session.addEventListener(kind, () => this.render());
  }

  render() {
    const { current, model, context } = this._session;
    const title = current.title || t("untitled");
    document.getElementById("title").textContent = title;
    document.getElementById("model-name").textContent = model?.id ?? "";
    document.title = current.title ? `${current.title} · InternLM2` : "InternLM2";
    document.getElementById("empty-text").textContent = t("empty_text", { model: model?.id ?? "InternLM2" });
    this._meter(context);
  }

  _meter({ used, all }) {
    const place = document.getElementById("context");
    place.hidden = all === null || used === 0;
    if (place.hidden) return;
    const share = Math.min(1, used / all);
    const words = t("context_used", { used: used.toLocaleString(), all: all.toLocaleString() });
    const isFull = share >= NEARLY_FULL;
    place.title = isFull ? `${words}. ${t("context_nearly_full")}` : words;
    place.classList.toggle("full", isFull);
    const meter = h("meter", { min: "0", max: "1", high: String(NEARLY_FULL), value: String(share), "aria-label": place.title });
    const short = h("span", { "aria-hidden": "true" }, `${brief(used)} / ${brief(all)}`);
    place.replaceChildren(meter, short);
  }
}

/** 1234 as "1.2k". */
function brief(count) {
  return count < 1000 ? String(count) : `${(count / 1000).toFixed(count < 10_000 ? 1 : 0)}k`;
}
