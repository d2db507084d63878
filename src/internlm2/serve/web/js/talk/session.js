// What the page knows and does, without its looks. Views listen: "list" (conversations), "conversation" (which messages
// are shown), "progress" (a running answer grew), "state" (models, what runs), "key" (a key is asked for), "trouble".

import { asConversation, asSettings } from "../keep/check.js";
import { preferences } from "../keep/preferences.js";
import { append, asked, choose, merge, newConversation, openCalls, path, pathTo, removeLast, textOf } from "../keep/tree.js";
import { t } from "../lang/words.js";
import { Answer, ApiError } from "./api.js";
import { StreamError } from "./answer.js";

const SAVE_MILLISECONDS = 2000;
const MAX_PROBLEM = 2000; // characters
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
  if (error instanceof ApiError && error.status === 429) {
    const seconds = Math.ceil(Number(error.retryAfter ?? Number.NaN)); // proxies may write a date instead
    return seconds >= 0 ? t("error_busy", { seconds }) : t("error_busy_later");
  }
  return error.message.slice(0, MAX_PROBLEM) || t("error_status", { status: error.status });
}

export class Session extends EventTarget {
  constructor(api, store) {
    super();
    this.api = api;
    this.store = store;
    this.models = [];
    this.conversations = new Map();
    this.current = newConversation(lastSettings());
    this.runs = new Map(); // by conversation: {controller, answer, nodes, over}
    this._gone = new Set(); // messages that were taken away
    this._unsaved = new Map(); // nodes that are being saved: how many times
    this._isStoreBroken = false;
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
    for (const each of await this._kept()) {
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

  async _kept() {
    try {
      return await this.store.all();
    } catch (error) {
      this._storeFailed(error);
      return [];
    }
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

  /** Another window has changed or deleted a conversation. What runs here goes on. */
  async _reread(id) {
    const found = await this.store.get(id);
    const known = this.conversations.get(id);
    if (found && known) {
      this._merge(known, found, { isNewer: true });
    } else if (found) {
      this.conversations.set(id, asConversation(found, "conversation"));
    } else if (!this.runs.has(id)) {
      this.conversations.delete(id);
      if (this.current.id === id) this.show(null);
    }
    if (this.current.id === id) this._tell("conversation");
    this._tell("list");
  }

  /** Takes in what lies in the store. Messages that an answer here is writing stay. */
  _merge(conversation, stored, { isNewer = false } = {}) {
    let theirs;
    try {
      theirs = asConversation(stored, "conversation");
    } catch {
      return; // written by something else
    }
    const running = this.runs.get(conversation.id)?.nodes ?? [];
    const kept = new Set([...running, ...this._unsaved.keys()].map(({ id }) => id));
    merge(conversation, theirs, { kept, gone: this._gone });
    const { title, isNamed, settings, changed } = theirs;
    if (isNewer) Object.assign(conversation, { title, isNamed, settings, changed });
  }

  /** Keeps a conversation. written: the nodes whose messages have changed here. */
  async _save(conversation, written = []) {
    if (!Object.keys(conversation.nodes).length && !this.conversations.has(conversation.id)) return;
    this.conversations.set(conversation.id, conversation);
    this._tell("list");
    for (const node of written) this._unsaved.set(node, (this._unsaved.get(node) ?? 0) + 1);
    try {
      await this.store.put([conversation], (stored) => this._merge(conversation, stored));
      this._isStoreBroken = false;
    } catch (error) {
      this._storeFailed(error);
    }
    for (const node of written) {
      const left = this._unsaved.get(node) - 1;
      if (left) this._unsaved.set(node, left);
      else this._unsaved.delete(node);
    }
  }

  _storeFailed(error) {
    if (!this._isStoreBroken) {
      const isFull = error?.name === "QuotaExceededError";
      this._tell("trouble", isFull ? t("store_full") : t("store_failed", { problem: error?.message ?? "" }));
    }
    this._isStoreBroken = true; // told once, until it works again
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
    await this.store.put(conversations);
    for (const each of conversations) this.conversations.set(each.id, each);
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
    if (!choose(this.current, id, step)) return;
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
    await this._halt();
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
    await this._halt();
    const { parent, message, children } = this.current.nodes[id];
    const failed = (message.error || message.isStopped) && !message.content && !message.tool_calls;
    if (failed && !children.length) {
      removeLast(this.current, id);
      this._gone.add(id);
    }
    await this._answer(this.current, parent);
  }

  /** Lets the model go on with an answer that was cut. */
  async goOn(id) {
    await this._halt();
    const node = this.current.nodes[id];
    node.message.content = textOf(node.message); // a file may have it in parts
    await this._answer(this.current, node.parent, node);
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

  /** Ends the answer that runs in the conversation that is shown; what it said so far stays. */
  async _halt() {
    const { run } = this;
    this.stop();
    await run?.over;
  }

  /** Writes down what answers have said so far: the page may be closing. */
  keepRunning() {
    for (const id of this.runs.keys()) if (this.conversations.has(id)) this.store.putAtOnce(this.conversations.get(id));
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
    first.isStopped = true; // unless it is seen to end: the page may be closed before
    const node = continued ?? append(conversation, parent, first);
    const run = { controller: new AbortController(), answer: new Answer(first), nodes: [node], saved: Date.now() };
    run.over = new Promise((resolve) => { run.tellOver = resolve; });
    this.runs.set(conversation.id, run);
    this._tell("conversation", { isNew: true });
    this._tell("state");
    this._save(conversation, run.nodes);
    const began = performance.now();
    let firstAt = null;
    const changed = (answer) => {
      if (answer.numChunks || answer.last.tool_calls) firstAt ??= performance.now();
      this._progress(conversation, run);
    };
    try {
      await this.api.chat(request, run.answer, { signal: run.controller.signal, changed });
      delete run.answer.last.isStopped;
      if (!this.models.length) this.askForModels(); // the server was not there when the page began
    } catch (error) {
      await this._failed(conversation, run, error);
    }
    const now = performance.now();
    const { last, usage } = run.answer;
    if (usage) {
      const { prompt_tokens, completion_tokens, total_tokens } = usage;
      last.usage = { prompt_tokens, completion_tokens, total_tokens };
    }
    if (firstAt !== null) Object.assign(last, { firstSeconds: (firstAt - began) / 1000, seconds: (now - firstAt) / 1000 });
    this._end(conversation, run);
  }

  _progress(conversation, run) {
    while (run.nodes.length < run.answer.messages.length) {
      const before = run.nodes[run.nodes.length - 1].id;
      delete run.answer.messages[run.nodes.length - 1].isStopped;
      const next = run.answer.messages[run.nodes.length];
      next.isStopped = true;
      run.nodes.push(append(conversation, before, next));
      if (conversation === this.current) this._tell("conversation");
    }
    if (conversation === this.current) this._tell("progress");
    if (Date.now() - run.saved > SAVE_MILLISECONDS) {
      run.saved = Date.now();
      this._save(conversation, run.nodes);
    }
  }

  async _failed(conversation, run, error) {
    const { last } = run.answer;
    if (error.name === "AbortError") {
      this._count(conversation, run.nodes[run.nodes.length - 1]);
      return;
    }
    delete last.isStopped;
    if (!(error instanceof ApiError || error instanceof StreamError)) console.error(error);
    last.error = problemOf(error);
    if (error.status === 401) this._tell("key", { isWrong: Boolean(preferences.key) });
  }

  /** A stopped answer brings no figures; the server counts what the context holds. */
  async _count(conversation, node) {
    try {
      const total = await this.api.count(asked(path(conversation), conversation.settings.system), toolsOf(conversation.settings));
      if (!this.conversations.has(conversation.id)) return; // deleted meanwhile
      node.message.usage = { total_tokens: total };
      await this._save(conversation, [node]);
      this._tell("state");
    } catch {
      // the meter keeps its last value
    }
  }

  _end(conversation, run) {
    this.runs.delete(conversation.id);
    conversation.changed = Date.now();
    if (this.conversations.has(conversation.id)) this._save(conversation, run.nodes); // else it was deleted meanwhile
    run.tellOver();
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
