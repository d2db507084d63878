// Conversations as a file, and back. Lists of OpenAI messages, such as transcripts of agents, are taken as well.

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

/** The conversations of a file, under ids of their own. Throws CheckError for what cannot be taken. */
export function read(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
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
