// The page begins here: parts are made and told of each other.

import { h } from "./dom.js";
import { preferences } from "./keep/preferences.js";
import { Store } from "./keep/store.js";
import { path } from "./keep/tree.js";
import { language, LANGUAGES, setLanguage, show, t } from "./lang/words.js";
import { Api } from "./talk/api.js";
import { Session } from "./talk/session.js";
import { Composer } from "./view/composer.js";
import { askFor, notice, showShortcuts } from "./view/dialogs.js";
import { Head } from "./view/head.js";
import { icon } from "./view/icons.js";
import { isComposing } from "./view/parts.js";
import { nextColours, showSettings } from "./view/settings.js";
import { Sidebar } from "./view/sidebar.js";
import { Thread } from "./view/thread.js";

function regenerateLast(session) {
  const last = path(session.current).pop();
  if (last?.message.role === "assistant" && !session.run) session.regenerate(last.id);
}

/** Keys that work wherever the focus is. */
function listenForKeys(session, sidebar, composer) {
  const withAlt = {
    KeyN: () => sidebar.openNew(), KeyR: () => regenerateLast(session), KeyS: () => showSettings(session),
  };
  document.addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    const isTyping = event.target.matches?.("input, textarea, select");
    const isCommand = event.ctrlKey || event.metaKey;
    let done = null;
    if (document.querySelector("dialog[open]")) return; // has keys of its own
    if (event.key === "Escape" && sidebar.isOverPage) done = () => sidebar.toggle(false);
    else if (event.key === "Escape" && session.run) done = () => session.stop();
    else if (isCommand && event.key === "/") done = showShortcuts;
    else if (isCommand && event.key.toLowerCase() === "k") done = () => sidebar.focusSearch();
    else if (event.altKey && !isCommand && withAlt[event.code]) done = withAlt[event.code];
    else if (event.key === "?" && !isTyping) done = showShortcuts;
    else if (event.key === "/" && !isTyping && !isCommand) done = () => composer.focus();
    if (done === null) return;
    event.preventDefault();
    done();
  });
}

/** The key of the server, asked for once at a time. */
function askForKeys(session) {
  let isAsking = false;
  session.addEventListener("key", async ({ detail }) => {
    if (isAsking) return;
    isAsking = true;
    const given = await askFor("key", { hint: t("key_hint"), problem: detail.isWrong ? t("key_wrong") : null, kind: "password" });
    isAsking = false;
    if (!given) return;
    preferences.key = given;
    await session.askForModels();
  });
}

function showExamples(composer) {
  const examples = ["example_1", "example_2", "example_3", "example_4"].map((key) =>
    h("button", { type: "button", class: "example", "data-t": key, on: { click: () => composer.suggest(t(key)) } }, t(key)));
  document.getElementById("examples").replaceChildren(...examples);
}

function nameLanguageButton() {
  const other = Object.keys(LANGUAGES).find((each) => each !== language());
  const button = document.getElementById("language");
  button.title = LANGUAGES[other];
  button.setAttribute("aria-label", LANGUAGES[other]);
  button.lang = other;
  return other;
}

async function begin() {
  for (const each of document.querySelectorAll("[data-icon]")) each.prepend(icon(each.dataset.icon));
  show();
  const session = new Session(new Api(() => preferences.key), await Store.open());
  const composer = new Composer(session);
  const sidebar = new Sidebar(session);
  const actions = {
    edit: (id, text) => session.edit(id, text), regenerate: (id) => session.regenerate(id), goOn: (id) => session.goOn(id),
    choose: (id, step) => session.choose(id, step), giveResult: (id, text) => session.giveResult(id, text),
  };
  const thread = new Thread(session, actions);
  const head = new Head(session);
  const redraw = () => { thread.render(); head.render(); sidebar.render(); nameLanguageButton(); };
  const click = (id, done) => document.getElementById(id).addEventListener("click", done);
  click("settings", () => showSettings(session));
  click("help", showShortcuts);
  click("colours", () => notice(`${t("colours")}: ${t(`colours_${nextColours()}`)}`));
  click("language", () => setLanguage(nameLanguageButton()));
  new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["lang"] });
  session.addEventListener("trouble", ({ detail }) => notice(detail, true));
  askForKeys(session);
  listenForKeys(session, sidebar, composer);
  showExamples(composer);
  nameLanguageButton();
  addEventListener("pagehide", () => session.keepRunning());
  addEventListener("online", () => { if (!session.models.length) session.askForModels(); });
  if (!session.store.isLasting) notice(t("not_lasting"), true);
  await session.begin();
  if (!sidebar.isOverPage && !document.querySelector("dialog[open]")) composer.focus();
  document.documentElement.dataset.ready = "true";
}

begin();
