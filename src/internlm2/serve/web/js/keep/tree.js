// A conversation is a tree: editing or asking again adds a version beside the old one, and nothing is lost.
//
// conversation: {id, title, isNamed, created, changed, settings, top: {children, chosen}, nodes: {id: node}}
// node: {id, parent, children, chosen, message}; parent is null for the first messages; chosen is the child shown.

const MAX_TITLE = 60;

/** A name that no other node or conversation has. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A conversation without messages. */
export function newConversation(settings = {}) {
  const now = Date.now();
  return {
    id: newId(), title: "", isNamed: false, created: now, changed: now, settings: { ...settings },
    top: { children: [], chosen: null }, nodes: {},
  };
}

function holder(conversation, parent) {
  return parent === null ? conversation.top : conversation.nodes[parent];
}

/** Adds a message below `parent` (null: as a first one) and shows it. */
export function append(conversation, parent, message) {
  const node = { id: newId(), parent, children: [], chosen: null, message };
  conversation.nodes[node.id] = node;
  const above = holder(conversation, parent);
  above.children.push(node.id);
  above.chosen = node.id;
  conversation.changed = Date.now();
  if (!conversation.isNamed && !conversation.title && message.role === "user") {
    conversation.title = textOf(message).replace(/\s+/g, " ").trim().slice(0, MAX_TITLE);
  }
  return node;
}

/** The nodes that are shown, first to last. */
export function path(conversation) {
  const found = [];
  for (let id = conversation.top.chosen; id !== null; id = conversation.nodes[id].chosen) found.push(conversation.nodes[id]);
  return found;
}

/** The nodes from the first one to `id`; none for null. */
export function pathTo(conversation, id) {
  const found = [];
  for (let at = id; at !== null; at = conversation.nodes[at].parent) found.unshift(conversation.nodes[at]);
  return found;
}

/** Which version of its place a node is: {index, count}, from 0. */
export function versions(conversation, id) {
  const { children } = holder(conversation, conversation.nodes[id].parent);
  return { index: children.indexOf(id), count: children.length };
}

/** Shows the version `step` places further, where there is one. */
export function choose(conversation, id, step) {
  const above = holder(conversation, conversation.nodes[id].parent);
  const next = above.children[above.children.indexOf(id) + step];
  if (next === undefined) return false;
  above.chosen = next;
  return true;
}

/** Takes away a message that nothing follows; the version before it is shown. */
export function removeLast(conversation, id) {
  const { parent, children } = conversation.nodes[id];
  if (children.length) throw new Error("Something follows this message.");
  const above = holder(conversation, parent);
  const index = above.children.indexOf(id);
  above.children.splice(index, 1);
  above.chosen = above.children[Math.max(0, index - 1)] ?? null;
  delete conversation.nodes[id];
}

function fieldsOf(message) {
  return JSON.stringify(Object.entries(message).filter(([, value]) => value !== undefined).sort());
}

/**
 * Takes into `mine` what another window has added to the same conversation; each window keeps the versions that it
 * shows. kept: ids of messages that this window writes itself; gone: ids that it took away.
 */
export function merge(mine, theirs, { kept = new Set(), gone = new Set() } = {}) {
  const waiting = [[mine.top, theirs.top, null]];
  while (waiting.length) {
    const [above, given, parent] = waiting.pop();
    for (const id of given.children) {
      if (gone.has(id)) continue;
      const known = mine.nodes[id];
      if (!known) {
        mine.nodes[id] = { id, parent, children: [], chosen: null, message: theirs.nodes[id].message };
        above.children.push(id);
        above.chosen ??= id;
      } else if (!kept.has(id) && fieldsOf(known.message) !== fieldsOf(theirs.nodes[id].message)) {
        known.message = theirs.nodes[id].message;
      }
      waiting.push([mine.nodes[id], theirs.nodes[id], id]);
    }
  }
}

/** The words of a message; pictures left out. */
export function textOf(message) {
  if (typeof message.content === "string") return message.content;
  return (message.content ?? []).filter((part) => part.type === "text").map((part) => part.text).join("\n");
}

/** The pictures of a message, as addresses. */
export function picturesOf(message) {
  if (!Array.isArray(message.content)) return [];
  return message.content.filter((part) => part.type === "image_url").map((part) => part.image_url.url);
}

/** Names under which a model calls the code interpreter. */
export const CODE_TOOLS = new Set(["python", "code_interpreter", "interpreter"]);

/** Whether a call can be carried out: one that was cut within its arguments cannot, and the server refuses it. */
export function isWhole({ function: { name, arguments: given } }) {
  if (!given.trim()) return true;
  if (CODE_TOOLS.has(name) && !given.trim().startsWith("{")) return true; // the code itself
  try {
    const found = JSON.parse(given);
    return found !== null && typeof found === "object" && !Array.isArray(found);
  } catch {
    return false;
  }
}

/** The messages as the API takes them. The model reads text alone, so a picture is only named. */
export function asked(nodes, system) {
  const messages = system?.trim() ? [{ role: "system", content: system }] : [];
  const cut = new Set();
  for (const { message } of nodes) {
    const { role, name, tool_call_id: callId } = message;
    const calls = message.tool_calls?.filter(isWhole);
    for (const call of message.tool_calls ?? []) if (!isWhole(call)) cut.add(call.id);
    if (role === "assistant" && !textOf(message) && !calls?.length) continue; // an answer that failed
    if (role === "tool" && cut.has(callId)) continue;
    const each = { role, content: [textOf(message), ...picturesOf(message).map(() => "[picture]")].filter(Boolean).join("\n") };
    if (name) each.name = name;
    if (calls?.length) each.tool_calls = calls;
    if (callId) each.tool_call_id = callId;
    messages.push(each);
  }
  return messages;
}

/** The calls of an answer that have no result yet on the path that is shown. */
export function openCalls(conversation) {
  const shown = path(conversation);
  const results = new Set();
  for (const { message } of [...shown].reverse()) {
    if (message.role === "assistant") return (message.tool_calls ?? []).filter((call) => isWhole(call) && !results.has(call.id));
    if (message.role === "tool") results.add(message.tool_call_id);
    else if (message.role !== "environment") return [];
  }
  return [];
}

/** Whether the words stand in the title or in any message. */
export function matches(conversation, words) {
  const wanted = words.trim().toLowerCase();
  if (!wanted || conversation.title.toLowerCase().includes(wanted)) return true;
  return Object.values(conversation.nodes).some(({ message }) => textOf(message).toLowerCase().includes(wanted));
}
