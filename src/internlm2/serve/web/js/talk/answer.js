// From the chunks of /v1/chat/completions to messages.

/** A fault that the server told within a stream. */
export class StreamError extends Error {}

const MAX_CALLS = 1000;

/** Takes chunks; `messages` holds what they made so far. A server that runs tools may send several messages. */
export class Answer {
  constructor(first = { role: "assistant", content: "" }) {
    this.messages = [first];
    this.usage = null;
    this.numChunks = 0;
  }

  get last() {
    return this.messages[this.messages.length - 1];
  }

  /** Takes one parsed chunk. Throws StreamError where it tells of one. */
  push(chunk) {
    if (chunk === null || typeof chunk !== "object") throw new StreamError("The server sent something that is no answer.");
    if (chunk.error) throw new StreamError(String(chunk.error.message ?? "The server failed."));
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const delta = choice.delta ?? {};
    if (typeof delta.role === "string" && delta.role !== this.last.role) this._begin(delta);
    const { last } = this;
    if (typeof delta.content === "string" && delta.content) {
      this.numChunks += 1;
      last.content += delta.content;
    } else if (Array.isArray(delta.content)) {
      last.content = delta.content;
    }
    for (const part of delta.tool_calls ?? []) this._call(part);
    if (choice.finish_reason) last.finish = choice.finish_reason;
  }

  _begin(delta) {
    const message = { role: delta.role, content: "" };
    if (delta.tool_call_id) message.tool_call_id = String(delta.tool_call_id);
    this.messages.push(message);
  }

  _call(part) {
    const { last } = this;
    last.tool_calls ??= [];
    const index = part.index ?? last.tool_calls.length;
    if (!(Number.isInteger(index) && index >= 0 && index < MAX_CALLS)) throw new StreamError(`The server sent a call with the number ${index}.`);
    while (last.tool_calls.length <= index) {
      last.tool_calls.push({ id: "", type: "function", function: { name: "", arguments: "" } });
    }
    const call = last.tool_calls[index];
    if (part.id) call.id = part.id;
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }
}
