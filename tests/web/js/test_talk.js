// Streams, answers, and what the page does with them; the server is a list of chunks.

import assert from "node:assert/strict";
import { test } from "node:test";

delete globalThis.BroadcastChannel; // it would keep Node running
const WEB = new URL("../../../src/internlm2/serve/web/js/", import.meta.url);
const { EventReader } = await import(new URL("talk/events.js", WEB));
const { Answer, StreamError } = await import(new URL("talk/answer.js", WEB));
const { Api, ApiError } = await import(new URL("talk/api.js", WEB));
const { Session } = await import(new URL("talk/session.js", WEB));
const { Store } = await import(new URL("keep/store.js", WEB));
const { append, openCalls, path, textOf, versions } = await import(new URL("keep/tree.js", WEB));

test("events are the same however the stream is cut", () => {
  const stream = 'data: {"a":"é\u2028你"}\r\n\r\n: note\ndata:x\r\ndata: y\n\nevent: z\nid: 1\n\ndata\n\rdata: last\r\r';
  const expected = ['{"a":"é\u2028你"}', "x\ny", "", "last"];
  for (let first = 0; first <= stream.length; first += 1) {
    for (let second = first; second <= stream.length; second += 1) {
      const reader = new EventReader();
      const found = [stream.slice(0, first), stream.slice(first, second), stream.slice(second), "\n"].flatMap((part) => reader.push(part));
      assert.deepEqual(found, expected, `${first} ${second}`);
    }
  }
});

const delta = (given, reason = null) => ({ choices: [{ index: 0, delta: given, finish_reason: reason }] });

test("chunks become a message, with calls put together by their index", () => {
  const answer = new Answer();
  for (const chunk of [
    delta({ role: "assistant", content: "" }), delta({ content: "a" }), delta({ content: "b" }),
    delta({ tool_calls: [{ index: 0, id: "1", function: { name: "f", arguments: '{"x"' } }] }),
    delta({ tool_calls: [{ index: 1, id: "2", function: { name: "g", arguments: "{}" } }] }),
    delta({ tool_calls: [{ index: 0, function: { arguments: ":1}" } }] }), delta({}, "tool_calls"), { choices: [], usage: { total_tokens: 7 } },
  ]) answer.push(chunk);
  const call = (id, name, given) => ({ id, type: "function", function: { name, arguments: given } });
  assert.deepEqual(answer.messages, [{ role: "assistant", content: "ab", tool_calls: [call("1", "f", '{"x":1}'), call("2", "g", "{}")], finish: "tool_calls" }]);
  assert.deepEqual(answer.usage, { total_tokens: 7 });
});

test("a call with a senseless number is an error, not a page that hangs", () => {
  for (const index of [1e9, -1, 1.5, "0"]) {
    assert.throws(() => new Answer().push(delta({ tool_calls: [{ index, id: "1", function: { name: "f", arguments: "" } }] })), StreamError);
  }
});

test("a server that runs tools sends several messages", () => {
  const answer = new Answer();
  const picture = [{ type: "image_url", image_url: { url: "data:image/png;base64,AAAA" } }];
  for (const given of [{ content: "a" }, { role: "tool", tool_call_id: "1", content: picture }, { role: "assistant", content: "b" }]) answer.push(delta(given));
  assert.deepEqual(answer.messages.map(({ role, content }) => [role, content]), [["assistant", "a"], ["tool", picture], ["assistant", "b"]]);
});

test("errors within a stream, and things that are no chunks, are told", () => {
  for (const wrong of [{ error: { message: "too slow" } }, null, 3]) assert.throws(() => new Answer().push(wrong), StreamError);
  assert.throws(() => new Answer().push({ error: { message: "too slow" } }), /too slow/);
});

function serving(body, { status = 200, headers = {} } = {}) {
  globalThis.fetch = async (address, options) => {
    serving.last = { address, options };
    return new Response(body, { status, headers });
  };
  return new Api(() => "secret");
}

test("requests carry the key, and refusals keep what the server said", async () => {
  const api = serving(JSON.stringify({ data: [{ id: "m" }, { id: "r", kind: "reward" }] }));
  assert.deepEqual(await api.models(), [{ id: "m" }]);
  assert.equal(serving.last.options.headers.authorization, "Bearer secret");
  assert.equal(serving.last.address, "v1/models");
  const busy = serving(JSON.stringify({ error: { message: "busy", code: "server_busy" } }), { status: 429, headers: { "retry-after": "3" } });
  await assert.rejects(busy.models(), (error) => error instanceof ApiError && error.status === 429 && error.retryAfter === "3" && error.message === "busy");
  await assert.rejects(serving("<html>", { status: 502 }).models(), (error) => error.status === 502);
  globalThis.fetch = async () => { throw new TypeError("refused"); };
  await assert.rejects(api.models(), (error) => error.status === 0);
});

test("a stream that ends without its end is an error, and what came is kept", async () => {
  const api = serving(`data: ${JSON.stringify(delta({ content: "half" }))}\n\n`);
  const answer = new Answer();
  await assert.rejects(api.chat({}, answer, { changed: () => {} }), /incomplete/);
  assert.equal(answer.last.content, "half");
});

test("a connection that breaks within the answer is told as that, not as a server that is not there", async () => {
  const parts = [new TextEncoder().encode(`data: ${JSON.stringify(delta({ content: "half" }))}\n\n`)];
  const broken = new ReadableStream({ pull: (stream) => (parts.length ? stream.enqueue(parts.pop()) : stream.error(new TypeError("network"))) });
  const answer = new Answer();
  await assert.rejects(serving(broken).chat({}, answer, { changed: () => {} }), (error) => error.status === 0 && error.message === "incomplete");
  assert.equal(answer.last.content, "half");
});

test("a whole stream in one piece is told once, before its end", async () => {
  const api = serving(`data: ${JSON.stringify(delta({ content: "all" }))}\n\ndata: [DONE]\n\ndata: not JSON\n\n`);
  const told = [];
  await api.chat({}, new Answer(), { changed: (answer) => told.push(answer.last.content) });
  assert.deepEqual(told, ["all"]);
});

/** A session whose server answers each request with the next script: chunks, or an error. */
async function session(...scripts) {
  const requests = [];
  const api = {
    models: async () => [{ id: "m", max_model_len: 100 }],
    count: async () => 42,
    chat: async (body, answer, { signal, changed }) => {
      requests.push(structuredClone(body));
      for (const chunk of scripts.shift() ?? [delta({ content: "?" })]) {
        if (chunk instanceof Error) throw chunk;
        if (chunk === "wait") {
          await new Promise((_, reject) => { signal.addEventListener("abort", () => reject(new DOMException("", "AbortError"))); });
        }
        answer.push(chunk);
        changed(answer);
      }
    },
  };
  const made = new Session(api, new Store(null));
  await made.begin();
  return { made, requests, api };
}

const soon = () => new Promise((resolve) => setTimeout(resolve, 5));

const words = (made) => path(made.current).map(({ message }) => textOf(message));

test("send, regenerate, edit: every version stays", async () => {
  const usage = { choices: [], usage: { prompt_tokens: 4, completion_tokens: 2, total_tokens: 6 } };
  const { made, requests } = await session([delta({ content: "A" }), usage], [delta({ content: "B" })], [delta({ content: "C" })]);
  await made.send("one");
  assert.deepEqual(words(made), ["one", "A"]);
  assert.deepEqual(made.context, { used: 6, all: 100 });
  const answer = path(made.current)[1];
  await made.regenerate(answer.id);
  assert.deepEqual(words(made), ["one", "B"]);
  assert.deepEqual(versions(made.current, path(made.current)[1].id), { index: 1, count: 2 });
  await made.edit(path(made.current)[0].id, "two");
  assert.deepEqual(words(made), ["two", "C"]);
  await made.choose(path(made.current)[0].id, -1);
  assert.deepEqual(words(made), ["one", "B"]);
  await made.choose(path(made.current)[1].id, -1);
  assert.deepEqual(words(made), ["one", "A"]);
  assert.deepEqual(requests.map((body) => body.messages.map(({ content }) => content)), [["one"], ["one"], ["two"]]);
  assert.equal(made.current.title, "one");
});

test("stop keeps what came, and the server counts the context", async () => {
  const { made } = await session([delta({ content: "half" }), "wait"]);
  const running = made.send("one");
  await new Promise((resolve) => setTimeout(resolve, 5));
  assert.ok(made.run);
  made.stop();
  await running;
  await new Promise((resolve) => setTimeout(resolve, 5));
  assert.equal(made.run, null);
  assert.deepEqual(words(made), ["one", "half"]);
  assert.equal(path(made.current)[1].message.isStopped, true);
  assert.equal(made.context.used, 42);
});

test("an answer that was cut goes on in the same message", async () => {
  const { made, requests } = await session([delta({ content: "half" }, "length")], [delta({ content: " whole" }, "stop")]);
  await made.send("one");
  await made.goOn(path(made.current)[1].id);
  assert.deepEqual(words(made), ["one", "half whole"]);
  assert.equal(requests[1].continue_final_message, true);
  assert.deepEqual(requests[1].messages[1], { role: "assistant", content: "half" });
  assert.equal(path(made.current)[1].message.finish, "stop");
});

test("results of calls go back when all are there", async () => {
  const call = (index) => delta({ tool_calls: [{ index, id: `c${index}`, function: { name: "f", arguments: "{}" } }] });
  const { made, requests } = await session([call(0), call(1)], [delta({ content: "done" })]);
  made.current.settings.tools = [{ type: "function", function: { name: "f" } }];
  await made.send("one");
  assert.deepEqual(openCalls(made.current).map(({ id }) => id), ["c0", "c1"]);
  await made.giveResult("c1", "x");
  assert.equal(requests.length, 1);
  await made.giveResult("c0", "y");
  assert.deepEqual(requests[1].messages.slice(2), [
    { role: "tool", content: "x", name: "f", tool_call_id: "c1" }, { role: "tool", content: "y", name: "f", tool_call_id: "c0" }]);
  assert.deepEqual(requests[1].tools, made.current.settings.tools);
  assert.equal(words(made).at(-1), "done");
  assert.deepEqual(openCalls(made.current), []);
});

test("an error is told beside what came; trying again takes its place when nothing came", async () => {
  const { made, requests } = await session([new ApiError(400, "too long")], [delta({ content: "ok" })], [delta({ content: "half" }), new StreamError("broken")]);
  await made.send("one");
  assert.equal(path(made.current)[1].message.error, "too long");
  await made.regenerate(path(made.current)[1].id);
  assert.deepEqual(versions(made.current, path(made.current)[1].id), { index: 0, count: 1 });
  await made.send("two");
  const last = path(made.current).at(-1).message;
  assert.deepEqual([last.content, last.error], ["half", "broken"]);
  assert.deepEqual(requests[2].messages.map(({ content }) => content), ["one", "ok", "two"]);
});

test("a wrong key is asked for again", async () => {
  const { made } = await session([new ApiError(401, "no key")]);
  let asked = 0;
  made.addEventListener("key", () => { asked += 1; });
  await made.send("one");
  assert.equal(asked, 1);
});

test("settings go with the request, and to the next conversation without the system prompt", async () => {
  const { made, requests } = await session();
  await made.change({ temperature: 0, seed: 3, max_tokens: 9, stop: ["x"], system: "Be brief.", model: "m", interpreter: true });
  await made.send("one");
  const { messages, ...rest } = requests[0];
  assert.deepEqual(rest, { temperature: 0, seed: 3, max_tokens: 9, stop: ["x"], model: "m", tools: [{ type: "code_interpreter" }] });
  assert.deepEqual(messages[0], { role: "system", content: "Be brief." });
});

test("an answer goes on while another conversation is shown, and a deleted one does not come back", async () => {
  const { made } = await session([delta({ content: "half" }), "wait"], [delta({ content: "other" })]);
  const running = made.send("one");
  const { id } = made.current;
  made.show(null);
  assert.equal(made.run, null);
  await made.send("two");
  assert.deepEqual(words(made), ["two", "other"]);
  await made.remove(id);
  await running;
  await new Promise((resolve) => setTimeout(resolve, 5));
  assert.deepEqual([...made.conversations.keys()], [made.current.id]);
  assert.deepEqual((await made.store.all()).map((each) => each.id), [made.current.id]);
});

test("editing or asking again while an answer runs stops it and loses nothing", async () => {
  const { made } = await session([delta({ content: "half" }), "wait"], [delta({ content: "B" }), "wait"], [delta({ content: "C" })]);
  const first = made.send("one");
  await soon();
  const second = made.edit(path(made.current)[0].id, "two");
  await soon();
  assert.deepEqual(words(made), ["two", "B"]);
  await made.regenerate(path(made.current)[1].id);
  await Promise.all([first, second]);
  assert.deepEqual(words(made), ["two", "C"]);
  await made.choose(path(made.current)[1].id, -1);
  assert.deepEqual(words(made), ["two", "B"]);
  await made.choose(path(made.current)[0].id, -1);
  assert.deepEqual(words(made), ["one", "half"]);
  assert.equal(path(made.current)[1].message.isStopped, true);
});

test("versions can be turned over while an answer runs", async () => {
  const { made } = await session([delta({ content: "A" })], [delta({ content: "half" }), "wait"]);
  await made.send("one");
  const running = made.regenerate(path(made.current)[1].id);
  await soon();
  await made.choose(path(made.current)[1].id, -1);
  assert.deepEqual(words(made), ["one", "A"]);
  made.stop();
  await running;
  assert.deepEqual(words(made), ["one", "A"]);
});

test("an answer is marked as stopped until its end is seen: the page may be closed before", async () => {
  const { made } = await session([delta({ content: "half" }), "wait"], [delta({ content: "whole" })], [new ApiError(0, "gone")]);
  const running = made.send("one");
  await soon();
  const kept = structuredClone(made.current);
  assert.deepEqual(path(kept).map(({ message }) => [message.content, message.isStopped]), [["one", undefined], ["half", true]]);
  made.stop();
  await running;
  await made.send("two");
  assert.equal("isStopped" in path(made.current)[3].message, false);
  await made.send("three");
  assert.equal("isStopped" in path(made.current)[5].message, false);
});

test("what the server says when it is busy or broken is put in words", async () => {
  const cases = [
    [new ApiError(429, "busy", { retryAfter: "7" }), "The server is busy. Try again in 7 s."],
    [new ApiError(429, "busy", { retryAfter: "Wed, 21 Oct 2026 07:28:00 GMT" }), "The server is busy. Try again in a moment."],
    [new ApiError(429, "busy"), "The server is busy. Try again in a moment."],
    [new ApiError(502, ""), "The server failed (HTTP 502)."],
    [new ApiError(500, "x".repeat(9000)), "x".repeat(2000)],
    [new ApiError(0, "incomplete"), "The connection ended before the answer did."],
  ];
  const { made } = await session(...cases.map(([error]) => [error]));
  for (const [, expected] of cases) {
    await made.send("one");
    assert.equal(path(made.current).at(-1).message.error, expected);
  }
});

test("the models are asked for again once the server is there", async () => {
  const { made, api } = await session();
  made.models = [];
  const { models } = api;
  api.models = async () => { throw new ApiError(0, "refused"); };
  await made.askForModels();
  api.models = models;
  await made.send("one");
  await soon();
  assert.equal(made.model.id, "m");
});

test("an answer whose content came from a file in parts goes on as text", async () => {
  const { made } = await session([delta({ content: "A" }, "length")], [delta({ content: " B" })]);
  await made.send("one");
  const { id, message } = path(made.current)[1];
  message.content = [{ type: "text", text: "A" }];
  await made.goOn(id);
  assert.equal(path(made.current)[1].message.content, "A B");
});

test("a store that fails is told once, and nothing of the conversation is lost meanwhile", async () => {
  const { made } = await session([delta({ content: "A" })], [delta({ content: "B" })]);
  const told = [];
  made.addEventListener("trouble", ({ detail }) => told.push(detail));
  const put = made.store.put.bind(made.store);
  made.store.put = async () => { throw Object.assign(new Error("full"), { name: "QuotaExceededError" }); };
  await made.send("one");
  await made.send("two");
  await soon();
  assert.equal(told.length, 1);
  assert.match(told[0], /storage is full/);
  assert.deepEqual(words(made), ["one", "A", "two", "B"]);
  await assert.rejects(made.add([made.current]), /full/);
  made.store.put = put;
  await made.send("three");
  await soon();
  assert.equal(path((await made.store.all())[0]).length, 6);
});

test("a store that cannot be read is told, and the page begins all the same", async () => {
  const store = new Store(null);
  store.all = async () => { throw new Error("corrupt"); };
  const made = new Session({ models: async () => [{ id: "m" }] }, store);
  const told = [];
  made.addEventListener("trouble", ({ detail }) => told.push(detail));
  await made.begin();
  assert.match(told.join(), /corrupt/);
  assert.equal(made.model.id, "m");
});

test("another window's words come in while an answer runs here, and are not lost when it ends", async () => {
  const { made } = await session([delta({ content: "A" })], [delta({ content: "half" }), "wait"]);
  await made.send("one");
  const other = structuredClone(made.current);
  const running = made.send("mine");
  await soon();
  append(other, path(other)[1].id, { role: "user", content: "theirs" });
  other.title = "Renamed";
  made.store.get = async () => other;
  await made._reread(other.id);
  assert.deepEqual(words(made), ["one", "A", "mine", "half"]);
  assert.equal(made.current.title, "Renamed");
  made.stop();
  await running;
  assert.deepEqual(versions(made.current, path(made.current)[2].id), { index: 0, count: 2 });
});

test("words that are being saved are not replaced by what another window saved before", async () => {
  const { made } = await session([delta({ content: "whole" })]);
  let stale = null;
  made.store.put = async ([conversation]) => {
    stale ??= structuredClone(conversation); // the first time, when the answer begins
    made.store.get = async () => stale;
    await made._reread(conversation.id); // another window tells of a change meanwhile
  };
  await made.send("one");
  await soon();
  assert.deepEqual(words(made), ["one", "whole"]);
  assert.equal(made._unsaved.size, 0);
});
