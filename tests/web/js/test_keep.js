// Conversations as trees and files; words in both languages.

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";

const WEB = new URL("../../../src/internlm2/serve/web/js/", import.meta.url);
const { append, asked, isWhole, matches, merge, newConversation, openCalls, path, picturesOf, versions } = await import(new URL("keep/tree.js", WEB));
const { read, written } = await import(new URL("keep/transfer.js", WEB));
const { asSettings, asTools, CheckError } = await import(new URL("keep/check.js", WEB));
const en = (await import(new URL("lang/en.js", WEB))).default;
const zh = (await import(new URL("lang/zh.js", WEB))).default;

function example() {
  const made = newConversation({ temperature: 0.5, system: "Be brief.", stop: ["x"], tools: [{ type: "function", function: { name: "f" } }] });
  const one = append(made, null, { role: "user", content: "  Hello\n there " });
  const two = append(made, one.id, { role: "assistant", content: "", tool_calls: [{ id: "c", type: "function", function: { name: "f", arguments: "{}" } }] });
  const picture = { type: "image_url", image_url: { url: "data:image/png;base64,AAAA" } };
  append(made, two.id, { role: "tool", tool_call_id: "c", name: "f", content: [{ type: "text", text: "seen" }, picture] });
  append(made, one.id, { role: "assistant", content: "Other", usage: { total_tokens: 3 }, seconds: 1.5, finish: "stop" });
  return made;
}

test("a file holds all that a conversation has, under a new id", () => {
  const made = example();
  const [found] = read(written([made]));
  assert.notEqual(found.id, made.id);
  assert.deepEqual({ ...found, id: made.id }, made);
  assert.equal(found.title, "Hello there");
});

test("unknown fields of a file do not come in", () => {
  const made = example();
  const given = JSON.parse(written([made]));
  const [conversation] = given.conversations;
  conversation.evil = 1;
  conversation.settings.evil = 1;
  const node = Object.values(conversation.nodes)[0];
  node.evil = node.message.evil = 1;
  const found = read(JSON.stringify(given))[0];
  assert.doesNotMatch(JSON.stringify(found), /evil/);
});

const change = (work) => {
  const given = JSON.parse(written([example()]));
  work(given.conversations[0], given);
  return JSON.stringify(given);
};
const first = (conversation) => conversation.nodes[conversation.top.children[0]];

const WRONG = [
  ["", "file: is not JSON"], ["[", "file"], ["3", "file: must be an object"], ["null", "file"], ["{}", "format"], ["[]", "messages: has no messages"],
  ['[{"role": "x"}]', "messages[0].role"], ['[{"role": "user", "content": 3}]', "messages[0].content"],
  ['{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', "messages[0].content[0].type"],
  ['[{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]', "messages[0].tool_calls[0].function.arguments"],
  [change((_, file) => { file.version = 2; }), "version"], [change((_, file) => { file.conversations = {}; }), "conversations"],
  [change((it) => { it.title = 3; }), "conversations[0].title"], [change((it) => { it.created = "x"; }), "conversations[0].created"],
  [change((it) => { it.top.chosen = "nowhere"; }), "conversations[0].top.chosen"],
  [change((it) => { it.top.children = ["nowhere"]; }), "conversations[0].top.children"],
  [change((it) => { it.top.children.push(it.top.children[0]); }), "twice"],
  [change((it) => { first(it).children.push(first(it).id); }), "two parents"],
  [change((it) => { it.nodes.lost = { ...first(it), id: "lost", children: [], chosen: null }; }), "belong nowhere"],
  [change((it) => { delete it.nodes; }), "conversations[0].nodes"], [change((it) => { first(it).message.role = "admin"; }), "role"],
  [change((it) => { it.settings.temperature = "hot"; }), "settings.temperature"], [change((it) => { it.settings.top_p = 2; }), "settings.top_p"],
  [change((it) => { it.settings.max_tokens = 1.5; }), "whole number"], [change((it) => { it.settings.stop = [""]; }), "empty"],
  [change((it) => { it.settings.tools = [{ function: { name: "a b" } }]; }), "tools[0].name"],
  [change((it) => { first(it).message.usage = { total_tokens: -1 }; }), "usage"],
  [written([example()]).replace('"nodes": {', '"nodes": {"__proto__": {"children": []},'), "belong nowhere"],
];

for (const [n, [text, problem]] of WRONG.entries()) {
  test(`file ${n} is refused: ${problem}`, () => {
    assert.throws(() => read(text), (error) => error instanceof CheckError && error.message.includes(problem));
    assert.equal({}.children, undefined);
  });
}

test("a transcript of OpenAI messages becomes a conversation", () => {
  const messages = [
    { role: "system", content: "Be brief." }, { role: "user", content: "Plot it." },
    { role: "assistant", content: null, tool_calls: [{ id: "c", type: "function", function: { name: "python", arguments: '{"code": "1"}' } }] },
    { role: "tool", tool_call_id: "c", content: [{ type: "image_url", image_url: { url: "data:image/png;base64,AAAA" } }] }, { role: "assistant", content: "Here." },
  ];
  for (const given of [messages, { messages, other: 1 }]) {
    const [found] = read(JSON.stringify(given));
    assert.equal(found.settings.system, "Be brief.");
    assert.deepEqual(path(found).map(({ message }) => message.role), ["user", "assistant", "tool", "assistant"]);
    assert.deepEqual(picturesOf(path(found)[2].message), ["data:image/png;base64,AAAA"]);
  }
});

test("a transcript of an agent becomes a conversation, also one that was torn, and nothing else does", () => {
  const lines = [
    { event: "start", version: 1, system: "Be brief." }, { event: "question", text: "Twice 21?" },
    { event: "reply", text: "I ask.", calls: [{ id: "x", name: "double", arguments: "{}" }], took_seconds: 1.5 },
    { event: "result", id: "call_0", name: "double", arguments: '{"x": 21}', text: "42", pictures: [{ media_type: "image/png", base64: "AAAA" }] },
    { event: "reply", text: "42.", calls: [], took_seconds: 1 }, { event: "end", ending: "answered" },
  ].map((event) => JSON.stringify(event));
  for (const text of [lines.join("\n"), `${lines.join("\n")}\n{"event": "ques`]) {
    const [found] = read(text);
    assert.equal(found.settings.system, "Be brief.");
    const shown = path(found).map(({ message }) => message);
    assert.deepEqual(shown.map(({ role }) => role), ["user", "assistant", "tool", "assistant"]);
    assert.equal(shown[1].tool_calls[0].function.arguments, '{"x": 21}');
    assert.equal(shown[2].tool_call_id, "call_0");
    assert.deepEqual(picturesOf(shown[2]), ["data:image/png;base64,AAAA"]);
    assert.equal("tool_calls" in shown[3], false);
  }
  for (const wrong of [`${lines[0]}\n{"event": "question"}`, `${lines[0]}\n3`, `{"a": 1}\n{"b": 2}`, `${lines[0]}\n{\n${lines[1]}`, lines[0]]) {
    assert.throws(() => read(wrong), CheckError, wrong);
  }
});

test("what the model is asked: text alone, without answers that failed", () => {
  const made = newConversation();
  let last = null;
  for (const message of [
    { role: "user", content: "a" }, { role: "assistant", content: "", error: "x" }, { role: "user", content: "b" },
    { role: "environment", content: [{ type: "text", text: "t" }, { type: "image_url", image_url: { url: "x.png" } }], seconds: 3 },
  ]) last = append(made, last, message).id;
  assert.deepEqual(asked(path(made), " "), [{ role: "user", content: "a" }, { role: "user", content: "b" }, { role: "environment", content: "t\n[picture]" }]);
  assert.deepEqual(asked([], "s"), [{ role: "system", content: "s" }]);
});

const called = (name, given) => ({ id: `${name} ${given}`, type: "function", function: { name, arguments: given } });

test("a call that was cut within its arguments is not asked again, waits for nothing and blocks nothing", () => {
  for (const whole of ["", "{}", ' {"a": 1}\n']) assert.ok(isWhole(called("f", whole)), whole);
  for (const cut of ["{", '{"a": "b', "[1]", "3", "null", "x"]) assert.ok(!isWhole(called("f", cut)), cut);
  assert.ok(isWhole(called("python", "print(1)")));
  assert.ok(!isWhole(called("python", '{"code": "pri')));
  const made = newConversation();
  const [good, cut] = [called("f", '{"a": 1}'), called("g", '{"a": "b')];
  let last = append(made, null, { role: "user", content: "a" });
  last = append(made, last.id, { role: "assistant", content: "", tool_calls: [good, cut], isStopped: true });
  assert.deepEqual(openCalls(made), [good]);
  last = append(made, last.id, { role: "tool", tool_call_id: good.id, content: "1" });
  last = append(made, last.id, { role: "tool", tool_call_id: cut.id, content: "2" });
  append(made, last.id, { role: "assistant", content: "", tool_calls: [cut] });
  assert.deepEqual(asked(path(made)).slice(1), [
    { role: "assistant", content: "", tool_calls: [good] }, { role: "tool", content: "1", tool_call_id: good.id }]);
});

test("what two windows added to one conversation is kept, and each shows its own", () => {
  const mine = newConversation();
  const start = append(mine, null, { role: "user", content: "one" });
  append(mine, start.id, { role: "assistant", content: "half" });
  const theirs = structuredClone(mine);
  const [answer] = [path(mine)[1].id];
  theirs.nodes[answer].message.content = "half and whole";
  append(theirs, start.id, { role: "assistant", content: "theirs" });
  append(theirs, answer, { role: "user", content: "and theirs below" });
  append(mine, start.id, { role: "assistant", content: "mine" });
  const before = mine.nodes[start.id].message;
  merge(mine, theirs);
  assert.equal(mine.nodes[start.id].message, before); // the same object: nothing has to be drawn again
  assert.deepEqual(path(mine).map(({ message }) => message.content), ["one", "mine"]);
  assert.deepEqual(versions(mine, path(mine)[1].id), { index: 1, count: 3 });
  assert.equal(mine.nodes[answer].message.content, "half and whole");
  assert.equal(mine.nodes[mine.nodes[answer].chosen].message.content, "and theirs below");
  read(written([mine])); // still a tree
  const again = JSON.stringify(mine);
  merge(mine, theirs);
  assert.equal(JSON.stringify(mine), again);
});

test("a window keeps the message that it writes, and what it took away stays away", () => {
  const mine = newConversation();
  const start = append(mine, null, { role: "user", content: "one" });
  const theirs = structuredClone(mine);
  const gone = append(theirs, start.id, { role: "assistant", content: "" });
  append(theirs, gone.id, { role: "user", content: "below" });
  start.message.content = "mine";
  merge(mine, theirs, { kept: new Set([start.id]), gone: new Set([gone.id]) });
  assert.deepEqual(path(mine).map(({ message }) => message.content), ["mine"]);
});

test("whatever the page itself wrote, it can read again", () => {
  const made = newConversation();
  const start = append(made, null, { role: "user", content: "x".repeat(5_000_000) });
  const long = "y".repeat(10_000);
  append(made, start.id, {
    role: "assistant", content: "", error: long, model: long, finish: long, usage: { prompt_tokens: null, total_tokens: 3 },
    tool_calls: [{ id: long, type: "function", function: { name: long, arguments: "{" } }],
  });
  assert.equal(Object.keys(read(written([made]))[0].nodes).length, 2);
});

test("search looks into titles and messages of every version", () => {
  const made = example();
  for (const [words, expected] of [["hello", true], ["OTHER", true], ["seen", true], ["", true], ["nothing", false]]) assert.equal(matches(made, words), expected, words);
});

test("settings: ranges are the server's", () => {
  assert.deepEqual(asSettings({ temperature: 0, top_p: 1, seed: 0, evil: 1 }, "s"), { temperature: 0, top_p: 1, seed: 0 });
  for (const wrong of [{ temperature: -1 }, { top_p: 0 }, { seed: -1 }, { max_tokens: 0 }, { temperature: NaN }, { top_k: 1.5 }]) assert.throws(() => asSettings(wrong, "s"), CheckError);
  assert.deepEqual(asTools([{ name: "f", description: "d" }], "t"), [{ type: "function", function: { name: "f", description: "d" } }]);
});

test("both languages have the same words with the same places, and every word is used", () => {
  assert.deepEqual(Object.keys(zh).sort(), Object.keys(en).sort());
  const places = (text) => [...text.matchAll(/\{(\w+)\}/g)].map(([, name]) => name).sort();
  for (const key of Object.keys(en)) {
    assert.ok(en[key] && zh[key], key);
    assert.deepEqual(places(zh[key]), places(en[key]), key);
  }
  const files = readdirSync(WEB, { recursive: true }).filter((name) => name.endsWith(".js") && !name.startsWith("lang"));
  const source = [...files.map((name) => readFileSync(new URL(name, WEB), "utf-8")), readFileSync(new URL("../index.html", WEB), "utf-8")].join("\n");
  for (const key of Object.keys(en)) {
    const isMade = /^(field|colours)_/.test(key); // put together from a name
    assert.ok(isMade || source.includes(`"${key}"`), `${key} is used nowhere`);
  }
  for (const [, key] of source.matchAll(/\bt\("(\w+)"/g)) assert.ok(key in en, key);
  for (const [, key] of source.matchAll(/data-(?:t|tip|aria|hint)="(\w+)"/g)) assert.ok(key in en, key);
});
