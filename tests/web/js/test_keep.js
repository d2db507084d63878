// Conversations as trees and files; words in both languages.

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";

const WEB = new URL("../../../src/internlm2/serve/web/js/", import.meta.url);
const { append, asked, matches, newConversation, path, picturesOf } = await import(new URL("keep/tree.js", WEB));
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
