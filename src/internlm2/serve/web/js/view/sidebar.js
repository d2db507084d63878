// The conversations: found, opened, named, deleted, taken to a file and back.

import { h } from "../dom.js";
import { matches } from "../keep/tree.js";
import { MAX_FILE_BYTES, read, written } from "../keep/transfer.js";
import { t } from "../lang/words.js";
import { askFor, confirm, notice } from "./dialogs.js";
import { download, iconButton } from "./parts.js";

const DAY = 86_400_000;
const MIB = 1024 * 1024;

function age(changed) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (changed >= midnight) return "today";
  if (changed >= midnight - DAY) return "yesterday";
  return changed >= midnight - 7 * DAY ? "last_week" : "earlier";
}

export class Sidebar {
  constructor(session) {
    this._session = session;
    this._side = document.getElementById("sidebar");
    this._list = document.getElementById("conversations");
    this._search = document.getElementById("search");
    this._file = document.getElementById("file");
    this._narrow = matchMedia("(max-width: 820px)");
    this._menu = null;
    this._listen();
    this.toggle(!this._narrow.matches);
  }

  _listen() {
    const { _session: session } = this;
    const click = (id, done) => document.getElementById(id).addEventListener("click", done);
    this._search.addEventListener("input", () => this.render());
    session.addEventListener("list", () => this.render());
    click("sidebar-toggle", () => this.toggle());
    click("sidebar-close", () => this.toggle(false));
    click("shade", () => this.toggle(false));
    click("new", () => this.openNew());
    click("import", () => this._file.click());
    click("export-all", () => this._export([...session.conversations.values()], "conversations"));
    this._file.addEventListener("change", () => this._import());
    this._narrow.addEventListener("change", () => this.toggle(!this._narrow.matches));
  }

  get isOverPage() {
    return this._narrow.matches && !this._side.hidden;
  }

  /** Shows or hides the conversations. */
  toggle(isOpen = this._side.hidden) {
    this._side.hidden = !isOpen;
    document.getElementById("sidebar-toggle").setAttribute("aria-expanded", String(isOpen));
    document.getElementById("shade").hidden = !this.isOverPage;
    document.getElementById("page").inert = this.isOverPage;
    if (this.isOverPage) document.getElementById("new").focus();
    else if (this._narrow.matches) document.getElementById("sidebar-toggle").focus({ focusVisible: false });
  }

  openNew() {
    this._session.show(null);
    if (this._narrow.matches) this.toggle(false);
    document.getElementById("ask").focus();
  }

  focusSearch() {
    this.toggle(true);
    this._search.focus();
    this._search.select();
  }

  render() {
    const { conversations } = this._session;
    const words = this._search.value;
    const found = [...conversations.values()].filter((each) => matches(each, words)).sort((a, b) => b.changed - a.changed);
    const groups = new Map();
    for (const each of found) {
      const key = age(each.changed);
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(this._entry(each));
    }
    const shown = [...groups].map(([key, entries]) => h("section", { "aria-label": t(key) }, h("h2", {}, t(key)), h("ul", {}, entries)));
    if (!shown.length) shown.push(h("p", { class: "muted nothing" }, t(conversations.size ? "no_match" : "no_conversations")));
    const focused = this._list.contains(document.activeElement) ? document.activeElement : null;
    const [id, isMenu] = [focused?.closest("li")?.dataset.id, focused?.classList.contains("icon-button")];
    this._list.replaceChildren(...shown);
    if (id) this._list.querySelector(`[data-id="${CSS.escape(id)}"] ${isMenu ? ".icon-button" : ".entry-name"}`)?.focus();
  }

  _entry(conversation) {
    const { id } = conversation;
    const title = conversation.title || t("untitled");
    const isCurrent = id === this._session.current.id;
    const open = () => {
      this._session.show(id);
      if (this._narrow.matches) this.toggle(false);
    };
    const isRunning = this._session.runs.has(id);
    const name = { type: "button", class: "entry-name", dir: "auto", title, "aria-current": isCurrent ? "true" : null, on: { click: open } };
    const menu = iconButton("more", "more", (event) => this._openMenu(event.currentTarget, conversation), { "aria-haspopup": "menu" });
    for (const attribute of ["aria-label", "title"]) menu.setAttribute(attribute, t("menu", { title }));
    menu.removeAttribute("data-tip");
    return h("li", { class: `entry${isCurrent ? " current" : ""}`, "data-id": id }, h("button", name, title), isRunning && h("i", { class: "pulse" }), menu);
  }

  _openMenu(button, conversation) {
    this._menu?.remove();
    const item = (key, done, kind = "") =>
      h("button", { type: "button", role: "menuitem", class: kind, on: { click: () => { menu.remove(); button.focus(); done(); } } }, t(key));
    const menu = h(
      "div", { class: "menu", role: "menu", popover: "auto" },
      item("rename", () => this._rename(conversation)),
      item("export_one", () => this._export([conversation], conversation.title || "conversation")),
      item("delete", () => this._delete(conversation), "danger-text"),
    );
    menu.addEventListener("toggle", (event) => { if (event.newState === "closed") menu.remove(); });
    menu.addEventListener("keydown", (event) => {
      const items = [...menu.children];
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
    });
    document.body.append(menu);
    this._menu = menu;
    menu.showPopover();
    const { bottom, left, top } = button.getBoundingClientRect();
    const isBelow = bottom + menu.offsetHeight < innerHeight;
    menu.style.top = `${isBelow ? bottom + 4 : top - menu.offsetHeight - 4}px`;
    menu.style.left = `${Math.max(8, Math.min(left, innerWidth - menu.offsetWidth - 8))}px`;
    menu.firstChild.focus();
  }

  async _rename({ id, title }) {
    const given = await askFor("rename", { value: title });
    if (given) await this._session.rename(id, given);
  }

  async _delete({ id, title }) {
    if (await confirm("delete", t("delete_question", { title: title || t("untitled") }))) await this._session.remove(id);
  }

  _export(conversations, title) {
    const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation";
    download(`${name}.json`, written(conversations));
  }

  async _import() {
    const [file] = this._file.files;
    this._file.value = "";
    if (!file) return;
    if (file.size > MAX_FILE_BYTES) {
      notice(t("import_too_large", { limit: MAX_FILE_BYTES / MIB }), true);
      return;
    }
    try {
      const found = read(await file.text());
      await this._session.add(found);
      notice(t("added", { count: found.length }));
    } catch (error) {
      const problem = error.name === "QuotaExceededError" ? t("store_full") : error.problem ?? error.message;
      notice(t("import_failed", { place: error.place ? `${error.place}: ` : "", problem }), true);
    }
  }
}

