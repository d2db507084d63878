// The server, as the page sees it. Addresses are relative, so that the page also works under a path of a proxy.

import { Answer } from "./answer.js";
import { EventReader } from "./events.js";

/** What the server refused, or that it was not reached (status 0). */
export class ApiError extends Error {
  constructor(status, message, { code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

async function refusal(response) {
  let told = null;
  try {
    told = (await response.json()).error;
  } catch {
    // a proxy's page, say
  }
  const retryAfter = response.headers.get("retry-after");
  return new ApiError(response.status, String(told?.message ?? ""), { code: told?.code, retryAfter });
}

/** Calls of the server. `key()`: the API key of the reader, or "". */
export class Api {
  constructor(key) {
    this._key = key;
  }

  async _send(path, { body, signal } = {}) {
    const headers = { accept: "application/json" };
    if (this._key()) headers.authorization = `Bearer ${this._key()}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(path, {
        method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store",
        body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, error.message);
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }

  /** The models that answer, each {id, max_model_len}. */
  async models() {
    const { data } = await (await this._send("v1/models")).json();
    return data.filter((model) => model.kind !== "reward");
  }

  /** How many tokens a conversation has. */
  async count(messages, tools) {
    const body = { messages, add_generation_prompt: false };
    if (tools?.length) body.tools = tools;
    return (await (await this._send("tokenize", { body })).json()).count;
  }

  /** Streams an answer into an Answer; `changed` is called after each piece. Ends early when `signal` says so. */
  async chat(body, answer, { signal, changed }) {
    const request = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this._send("v1/chat/completions", { body: request, signal });
    const stream = response.body.getReader();
    const decoder = new TextDecoder();
    const events = new EventReader();
    for (;;) {
      let part;
      try {
        part = await stream.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "incomplete");
      }
      if (part.done) throw new ApiError(0, "incomplete");
      const found = events.push(decoder.decode(part.value, { stream: true }));
      const end = found.indexOf("[DONE]");
      for (const data of end < 0 ? found : found.slice(0, end)) answer.push(JSON.parse(data));
      changed(answer);
      if (end >= 0) return;
    }
  }
}

export { Answer };
