// How the model answers in this conversation, and how the page looks.

import { h } from "../dom.js";
import { asSettings, CheckError, SAMPLING } from "../keep/check.js";
import { preferences } from "../keep/preferences.js";
import { language, LANGUAGES, setLanguage, t } from "../lang/words.js";
import { openDialog } from "./dialogs.js";
import { wordButton } from "./parts.js";

const SETTINGS = "settings"; // where places of problems begin
const COLOURS = ["system", "light", "dark"];

/** Shows the page in the colours that were chosen; "system" follows the system. */
export function setColours(chosen) {
  preferences.colours = chosen === "system" ? null : chosen;
  if (chosen === "system") delete document.documentElement.dataset.colours;
  else document.documentElement.dataset.colours = chosen;
}

/** The next choice of colours. */
export function nextColours() {
  const now = preferences.colours ?? "system";
  const next = COLOURS[(COLOURS.indexOf(now) + 1) % COLOURS.length];
  setColours(next);
  return next;
}

function field(key, control, hint = null) {
  control.id = `field-${key}`;
  if (control.localName === "textarea") control.dir = "auto";
  const notes = hint && h("span", { class: "muted small-text", id: `hint-${key}`, "data-t": hint }, t(hint));
  if (hint) control.setAttribute("aria-describedby", `hint-${key}`);
  return h("div", { class: "field" }, h("label", { for: control.id, "data-t": `field_${key}` }, t(`field_${key}`)), control, notes);
}

function select(choices, chosen, changed) {
  const made = h("select", { on: { change: () => changed(made.value) } });
  for (const [value, words] of choices) made.append(h("option", { value, selected: value === chosen }, words));
  return made;
}

function numberField(name, value) {
  const [least, most, isWhole] = SAMPLING[name];
  const limits = { min: least, max: most, step: isWhole ? 1 : "any", name, placeholder: t("server_default") };
  const made = h("input", { type: "number", inputmode: isWhole ? "numeric" : "decimal", autocomplete: "off", ...limits });
  made.value = value ?? "";
  return field(name, made);
}

/** The settings that the form holds. Throws CheckError. */
function collected(form) {
  const given = {};
  for (const name of Object.keys(SAMPLING)) {
    const input = form.elements[name];
    if (input.validity.badInput) throw new CheckError(`${SETTINGS}.${name}`, input.validationMessage);
    if (input.value !== "") given[name] = Number(input.value);
  }
  if (form.elements.model.value) given.model = form.elements.model.value;
  if (form.elements.system.value.trim()) given.system = form.elements.system.value;
  const stop = form.elements.stop.value.split("\n").filter(Boolean);
  if (stop.length) given.stop = stop;
  const tools = form.elements.tools.value.trim();
  if (tools) {
    try {
      given.tools = JSON.parse(tools);
    } catch (error) {
      throw new CheckError(`${SETTINGS}.tools`, error.message);
    }
  }
  if (form.elements.interpreter.checked) given.interpreter = true;
  return asSettings(given, SETTINGS);
}

function modelField(session) {
  const { settings } = session.current;
  const known = session.models.map((model) => [model.id, model.id]);
  const made = select(known, settings.model ?? session.models[0]?.id, () => {});
  made.name = "model";
  return field("model", made);
}

function fill(form, session) {
  const { settings } = session.current;
  const system = h("textarea", { name: "system", rows: "3" });
  system.value = settings.system ?? "";
  const stop = h("textarea", { name: "stop", rows: "2" });
  stop.value = (settings.stop ?? []).join("\n");
  const tools = h("textarea", { name: "tools", rows: "4", class: "mono", spellcheck: "false" });
  tools.value = settings.tools ? JSON.stringify(settings.tools, null, 1) : "";
  const interpreter = h("input", { type: "checkbox", name: "interpreter", id: "field-interpreter", "aria-describedby": "hint-interpreter" });
  interpreter.checked = settings.interpreter === true;
  const check = h("div", { class: "field" },
    h("label", { class: "check" }, interpreter, h("span", {}, t("field_interpreter"))),
    h("span", { class: "muted small-text", id: "hint-interpreter" }, t("field_interpreter_hint")));
  const numbers = Object.keys(SAMPLING).map((name) => numberField(name, settings[name]));
  const reset = wordButton("settings_reset", () => {
    for (const name of Object.keys(SAMPLING)) form.elements[name].value = "";
    form.dispatchEvent(new Event("input"));
  }, { class: "quiet small" });
  form.replaceChildren(
    h("p", { class: "muted small-text" }, t("settings_scope")), modelField(session),
    field("system", system, "field_system_hint"),
    h("h3", {}, t("settings_sampling")), h("div", { class: "grid" }, numbers), field("stop", stop, "field_stop_hint"), reset,
    h("hr"), field("tools", tools, "field_tools_hint"), check,
  );
}

function looks(redraw) {
  const shown = COLOURS.map((value) => [value, t(`colours_${value}`)]);
  const colours = select(shown, preferences.colours ?? "system", setColours);
  const words = select(Object.entries(LANGUAGES), language(), (next) => { setLanguage(next); redraw(); });
  const labelled = (key, control) => h("label", { class: "field" }, h("span", {}, t(key)), control);
  return h("div", { class: "grid" }, labelled("colours", colours), labelled("language", words));
}

/** Says beside its field what is wrong with it. */
function showProblem(form, problem, { place, problem: plain, words }) {
  const [, name, rest] = /^settings\.(\w+)(.*)$/.exec(place);
  const control = form.elements[name];
  control.setAttribute("aria-invalid", "true");
  problem.textContent = t("settings_wrong", { place: t(`field_${name}`) + rest, problem: words ? t(...words) : plain });
  problem.hidden = false;
  control.closest(".field").append(problem);
}

/** Opens the settings of the conversation that is shown; each change counts at once. */
export function showSettings(session) {
  if (document.querySelector("dialog[open]")) return;
  const form = h("form", { class: "stack settings", novalidate: true });
  const problem = h("p", { class: "problem small-text", role: "alert", hidden: true });
  const body = h("div", { class: "stack" });
  const draw = () => {
    fill(form, session);
    body.replaceChildren(form, h("hr"), looks(draw));
  };
  const take = () => {
    problem.hidden = true;
    for (const each of form.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
    try {
      session.change(collected(form));
    } catch (error) {
      if (!(error instanceof CheckError)) throw error;
      showProblem(form, problem, error);
    }
  };
  form.addEventListener("input", take);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
  openDialog("settings", body, { kind: "sheet" });
}
