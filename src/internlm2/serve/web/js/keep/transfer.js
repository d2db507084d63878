// Conversations as a file, and back. Lists of OpenAI messages and transcripts of `internlm2 agent` are taken as well.

import { asConversation, asMessage, asObject, CheckError } from "./check.js";
import { append, newConversation, newId } from "./tree.js";

const FORMAT = "internlm2-conversations";
const VERSION = 1;
const MAX_CONVERSATIONS = 10_000;
export const MAX_FILE_BYTES = 64 * 1024 * 1024;

/** The conversations as the text of a file. */
export function written(conversations) {
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations }, null, 1);
}

function fromMessages(messages, place) {
  if (messages.length === 0) throw new CheckError(place, "has no messages");
  const conversation = newConversation();
  let parent = null;
  for (const [n, each] of messages.entries()) {
    const message = asMessage(each, `${place}[${n}]`);
    if (n === 0 && message.role === "system" && typeof message.content === "string") conversation.settings.system = message.content;
    else parent = append(conversation, parent, message).id;
  }
  return conversation;
}

/** The events of an agent's transcript, one a line; null where the text is none. A run that was killed tears its last line. */
function eventsOf(text) {
  const lines = text.split("\n").filter((line) => line.trim());
  const events = [];
  for (const [n, line] of lines.entries()) {
    try {
      events.push(JSON.parse(line));
    } catch {
      if (n < lines.length - 1) return null;
    }
  }
  return events[0]?.event === "start" ? events : null;
}

/** An agent's run as messages. Each result tells its call, whatever way the model wrote it. */
function messagesOf(events) {
  const messages = [];
  let answer = null;
  for (const [n, event] of events.entries()) {
    const place = `line ${n + 1}`;
    const kind = asObject(event, place).event;
    if (["question", "reply", "result"].includes(kind) && typeof event.text !== "string") throw new CheckError(place, "has no text");
    if (kind === "start" && event.system) messages.push({ role: "system", content: event.system });
    if (kind === "question") messages.push({ role: "user", content: event.text });
    if (kind === "reply") {
      answer = { role: "assistant", content: event.text, tool_calls: [], seconds: event.took_seconds };
      messages.push(answer);
    }
    if (kind !== "result" || answer === null) continue;
    answer.tool_calls.push({ id: event.id, function: { name: event.name, arguments: event.arguments } });
    const pictures = (event.pictures ?? []).map((each) => ({
      type: "image_url", image_url: { url: `data:${each?.media_type};base64,${each?.base64}` },
    }));
    messages.push({ role: "tool", tool_call_id: event.id, name: event.name, content: [{ type: "text", text: event.text }, ...pictures] });
  }
  for (const message of messages) if (message.tool_calls?.length === 0) delete message.tool_calls;
  return messages;
}

/** The conversations of a file, under ids of their own. Throws CheckError for what cannot be taken. */
export function read(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    const events = eventsOf(text);
    if (events !== null) return [fromMessages(messagesOf(events), "messages")];
    throw new CheckError("file", `is not JSON (${error.message})`);
  }
  if (Array.isArray(found)) return [fromMessages(found, "messages")];
  asObject(found, "file");
  if (Array.isArray(found.messages)) return [fromMessages(found.messages, "messages")];
  if (found.format !== FORMAT) throw new CheckError("format", `must be "${FORMAT}", or the file must have "messages"`);
  if (found.version !== VERSION) throw new CheckError("version", `must be ${VERSION}`);
  if (!Array.isArray(found.conversations)) throw new CheckError("conversations", "must be a list");
  if (found.conversations.length > MAX_CONVERSATIONS) throw new CheckError("conversations", `has more than ${MAX_CONVERSATIONS} entries`);
  return found.conversations.map((each, n) => ({ ...asConversation(each, `conversations[${n}]`), id: newId() }));
}
