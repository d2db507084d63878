// What the page knows and does, without its looks. Views listen: "list" (conversations), "conversation" (which messages
// are shown), "progress" (a running answer grew), "state" (models, what runs), "key" (a key is asked for), "trouble".

import { asConversation, asSettings } from "../keep/check.js";
import { preferences } from "../keep/preferences.js";
import { append, asked, choose, newConversation, openCalls, path, pathTo, removeLast } from "../keep/tree.js";
import { t } from "../lang/words.js";
import { Answer, ApiError } from "./api.js";
import { StreamError } from "./answer.js";

const SAVE_MILLISECONDS = 2000;
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "stop"];

/** Settings of the last conversation, for the next one. */
function lastSettings() {
  try {
    return asSettings(JSON.parse(preferences.settings ?? "{}"), "settings");
  } catch {
    return {};
  }
}

/** The tools of a conversation as the API takes them. */
export function toolsOf(settings) {
  return [...(settings.tools ?? []), ...(settings.interpreter ? [{ type: "code_interpreter" }] : [])];
}

/** Words for what went wrong. */
function problemOf(error) {
  if (error instanceof ApiError && error.status === 0) {
    return t(error.message === "incomplete" ? "error_incomplete" : "error_unreachable");
  }
  if (error instanceof ApiError && error.status === 429) return t("error_busy", { seconds: error.retryAfter ?? "?" });
  return error.message;
}

export class Session extends EventTarget {
  constructor(api, store) {
    super();
    this.api = api;
    this.store = store;
    this.models = [];
    this.conversations = new Map();
    this.current = newConversation(lastSettings());
    this.runs = new Map(); // by conversation: {controller, answer, nodes}
  }

  _tell(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  /** What runs for the conversation that is shown. */
  get run() {
    return this.runs.get(this.current.id) ?? null;
  }

  /** The model of the conversation that is shown. */
  get model() {
    return this.models.find((model) => model.id === this.current.settings.model) ?? this.models[0] ?? null;
  }

  /** Reads what is kept, and asks the server for its models. */
  async begin() {
    for (const each of await this.store.all()) {
      try {
        this.conversations.set(each.id, asConversation(each, "conversation"));
      } catch {
        // written by something else; it stays where it is, unread
      }
    }
    this.store.whenChangedElsewhere((id) => this._reread(id));
    const kept = this.conversations.get(preferences.opened);
    if (kept) this.current = kept;
    this._tell("list");
    this._tell("conversation");
    await this.askForModels();
  }

  async askForModels() {
    try {
      this.models = await this.api.models();
    } catch (error) {
      if (error.status === 401) this._tell("key", { isWrong: Boolean(preferences.key) });
      else this._tell("trouble", problemOf(error));
    }
    this._tell("state");
  }

  async _reread(id) {
    if (this.runs.has(id)) return;
    const found = await this.store.get(id);
    if (found) this.conversations.set(id, asConversation(found, "conversation"));
    else this.conversations.delete(id);
    if (this.current.id === id) {
      this.current = this.conversations.get(id) ?? newConversation(lastSettings());
      this._tell("conversation");
    }
    this._tell("list");
  }

  async _save(conversation) {
    if (!Object.keys(conversation.nodes).length && !this.conversations.has(conversation.id)) return;
    this.conversations.set(conversation.id, conversation);
    this._tell("list");
    try {
      await this.store.put(conversation);
    } catch (error) {
      this._tell("trouble", t("store_failed", { problem: error.message }));
    }
  }

  /** Shows a conversation; null: a new one. */
  show(id) {
    this.current = this.conversations.get(id) ?? newConversation(lastSettings());
    preferences.opened = id;
    this._tell("conversation");
    this._tell("state");
    this._tell("list");
  }

  async rename(id, title) {
    const conversation = this.conversations.get(id);
    Object.assign(conversation, { title, isNamed: true });
    await this._save(conversation);
    this._tell("state");
  }

  async remove(id) {
    this.runs.get(id)?.controller.abort();
    this.conversations.delete(id);
    await this.store.remove(id);
    if (this.current.id === id) this.show(null);
    this._tell("list");
  }

  /** Takes conversations of a file and shows the first. */
  async add(conversations) {
    for (const each of conversations) await this._save(each);
    if (conversations.length) this.show(conversations[0].id);
  }

  async change(settings) {
    this.current.settings = settings;
    const { system: _, ...lasting } = settings; // a system prompt belongs to its conversation
    preferences.settings = JSON.stringify(lasting);
    this._tell("state");
    await this._save(this.current);
  }

  async choose(id, step) {
    if (this.run || !choose(this.current, id, step)) return;
    this._tell("conversation");
    this._tell("state");
    await this._save(this.current);
  }

  /** Sends a message below what is shown. */
  async send(text) {
    const shown = path(this.current);
    await this._say(shown.length ? shown[shown.length - 1].id : null, [{ role: "user", content: text }]);
  }

  /** Sends another version of a message. */
  async edit(id, text) {
    await this._say(this.current.nodes[id].parent, [{ ...this.current.nodes[id].message, content: text }]);
  }

  /** Gives the results of calls, by their id; the model goes on when all are there. */
  async giveResult(callId, text) {
    if (this.run) return;
    const shown = path(this.current);
    const { name } = openCalls(this.current).find((call) => call.id === callId).function;
    const { id } = append(this.current, shown[shown.length - 1].id, { role: "tool", name, tool_call_id: callId, content: text });
    this._tell("conversation");
    await this._save(this.current);
    if (!openCalls(this.current).length) await this._answer(this.current, id);
  }

  /** Asks for another answer in place of one. One that failed without a word goes. */
  async regenerate(id) {
    if (this.run) return;
    const { parent, message, children } = this.current.nodes[id];
    const failed = (message.error || message.isStopped) && !message.content && !message.tool_calls;
    if (failed && !children.length) removeLast(this.current, id);
    await this._answer(this.current, parent);
  }

  /** Lets the model go on with an answer that was cut. */
  async goOn(id) {
    if (this.run) return;
    await this._answer(this.current, this.current.nodes[id].parent, this.current.nodes[id]);
  }

  async _say(parent, messages) {
    if (this.run) return;
    let last = parent;
    for (const message of messages) last = append(this.current, last, message).id;
    preferences.opened = this.current.id;
    await this._answer(this.current, last);
  }

  stop() {
    this.run?.controller.abort();
  }

  _request(conversation, parent, continued) {
    const { settings } = conversation;
    const nodes = pathTo(conversation, parent);
    const body = { messages: asked(continued ? [...nodes, continued] : nodes, settings.system) };
    for (const name of SAMPLING) if (settings[name] !== undefined) body[name] = settings[name];
    if (settings.model && this.models.some((model) => model.id === settings.model)) body.model = settings.model;
    const tools = toolsOf(settings);
    if (tools.length) body.tools = tools;
    if (continued) body.continue_final_message = true;
    return body;
  }

  async _answer(conversation, parent, continued = null) {
    if (this.runs.has(conversation.id)) return;
    const request = this._request(conversation, parent, continued);
    const first = continued?.message ?? { role: "assistant", content: "" };
    for (const name of ["finish", "error", "isStopped", "usage", "seconds", "firstSeconds"]) delete first[name];
    if (this.model) first.model = this.models.find((model) => model.id === request.model)?.id ?? this.models[0].id;
    const node = continued ?? append(conversation, parent, first);
    const run = { controller: new AbortController(), answer: new Answer(first), nodes: [node], saved: Date.now() };
    this.runs.set(conversation.id, run);
    this._tell("conversation", { isNew: true });
    this._tell("state");
    this._save(conversation);
    const began = performance.now();
    let firstAt = null;
    const changed = (answer) => {
      if (answer.numChunks || answer.last.tool_calls) firstAt ??= performance.now();
      this._progress(conversation, run);
    };
    try {
      await this.api.chat(request, run.answer, { signal: run.controller.signal, changed });
    } catch (error) {
      await this._failed(conversation, run, error);
    }
    const now = performance.now();
    const { last, usage } = run.answer;
    if (usage) last.usage = usage;
    if (firstAt !== null) Object.assign(last, { firstSeconds: (firstAt - began) / 1000, seconds: (now - firstAt) / 1000 });
    this._end(conversation, run);
  }

  _progress(conversation, run) {
    while (run.nodes.length < run.answer.messages.length) {
      const before = run.nodes[run.nodes.length - 1].id;
      run.nodes.push(append(conversation, before, run.answer.messages[run.nodes.length]));
      if (conversation === this.current) this._tell("conversation");
    }
    if (conversation === this.current) this._tell("progress");
    if (Date.now() - run.saved > SAVE_MILLISECONDS) {
      run.saved = Date.now();
      this._save(conversation);
    }
  }

  async _failed(conversation, run, error) {
    const { last } = run.answer;
    if (error.name === "AbortError") {
      last.isStopped = true;
      this._count(conversation, last);
      return;
    }
    if (!(error instanceof ApiError || error instanceof StreamError)) console.error(error);
    last.error = problemOf(error);
    if (error.status === 401) this._tell("key", { isWrong: Boolean(preferences.key) });
  }

  /** A stopped answer brings no figures; the server counts what the context holds. */
  async _count(conversation, message) {
    try {
      const total = await this.api.count(asked(path(conversation), conversation.settings.system), toolsOf(conversation.settings));
      if (!this.conversations.has(conversation.id)) return; // deleted meanwhile
      message.usage = { total_tokens: total };
      await this._save(conversation);
      this._tell("state");
    } catch {
      // the meter keeps its last value
    }
  }

  _end(conversation, run) {
    this.runs.delete(conversation.id);
    conversation.changed = Date.now();
    if (this.conversations.has(conversation.id)) this._save(conversation); // else it was deleted meanwhile
    if (conversation === this.current) {
      this._tell("progress", { isOver: true, run });
      this._tell("conversation", { isOver: true });
    }
    this._tell("state");
  }

  /** How many tokens the model reads and wrote, as far as the server has said: {used, all}. */
  get context() {
    const reports = path(this.current).map((node) => node.message.usage?.total_tokens).filter((total) => total !== undefined);
    return { used: reports[reports.length - 1] ?? 0, all: this.model?.max_model_len ?? null };
  }
}
