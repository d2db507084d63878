// What a file or the browser's store may hold. Everything is checked and copied field by field: what is unknown does
// not come in, and what is wrong is named with its place.

const ROLES = new Set(["system", "user", "assistant", "tool", "environment"]);
const MAX_TEXT = 64 * 1024 * 1024; // what a file may hold; what the page wrote it must be able to read again
const MAX_NODES = 20_000;

/**
 * Something in a file or a form that cannot be taken. place: where, as "conversations[0].title". words: what to say of it
 * in the reader's language, [key, values], where a form may hold it.
 */
export class CheckError extends Error {
  constructor(place, problem, words = null) {
    super(`${place}: ${problem}`);
    this.place = place;
    this.problem = problem;
    this.words = words;
  }
}

function need(condition, place, problem, words = null) {
  if (!condition) throw new CheckError(place, problem, words);
}

/** The value, when it is an object with fields. */
export function asObject(value, place) {
  need(value !== null && typeof value === "object" && !Array.isArray(value), place, "must be an object");
  return value;
}

function text(value, place, limit = MAX_TEXT) {
  need(typeof value === "string", place, "must be text");
  need(value.length <= limit, place, `is longer than ${limit} characters`);
  return value;
}

function number(value, place, least, most) {
  const isRight = typeof value === "number" && value >= least && value <= most;
  need(isRight, place, `must be a number from ${least} to ${most}`, ["problem_range", { least, most }]);
  return value;
}

function list(value, place, limit) {
  need(Array.isArray(value), place, "must be a list");
  need(value.length <= limit, place, `has more than ${limit} entries`);
  return value;
}

function content(value, place) {
  if (value === null || value === undefined) return "";
  if (typeof value === "string") return text(value, place);
  return list(value, place, 100).map((part, n) => {
    const where = `${place}[${n}]`;
    const { type } = asObject(part, where);
    if (type === "text") return { type, text: text(part.text, `${where}.text`) };
    need(type === "image_url", `${where}.type`, 'must be "text" or "image_url"');
    return { type, image_url: { url: text(asObject(part.image_url, `${where}.image_url`).url, `${where}.image_url.url`) } };
  });
}

function call(value, place) {
  const made = asObject(asObject(value, place).function, `${place}.function`);
  return {
    id: text(value.id ?? "", `${place}.id`),
    type: "function",
    function: {
      name: text(made.name, `${place}.function.name`),
      arguments: text(made.arguments, `${place}.function.arguments`),
    },
  };
}

function figures(value, place) {
  const found = {};
  for (const name of ["prompt_tokens", "completion_tokens", "total_tokens"]) {
    if (asObject(value, place)[name] != null) found[name] = number(value[name], `${place}.${name}`, 0, 1e12);
  }
  return found;
}

/** A message, with its known fields alone. */
export function asMessage(value, place) {
  const given = asObject(value, place);
  need(ROLES.has(given.role), `${place}.role`, `must be one of ${[...ROLES].join(", ")}`);
  const message = { role: given.role, content: content(given.content, `${place}.content`) };
  for (const name of ["name", "tool_call_id", "model", "finish", "error"]) {
    if (given[name] != null) message[name] = text(given[name], `${place}.${name}`);
  }
  if (given.tool_calls != null) {
    message.tool_calls = list(given.tool_calls, `${place}.tool_calls`, 1000).map((each, n) => call(each, `${place}.tool_calls[${n}]`));
  }
  if (given.usage != null) message.usage = figures(given.usage, `${place}.usage`);
  for (const name of ["seconds", "firstSeconds"]) {
    if (given[name] != null) message[name] = number(given[name], `${place}.${name}`, 0, 1e9);
  }
  if (given.isStopped != null) message.isStopped = Boolean(given.isStopped);
  return message;
}

/** name: [least, most, whether whole]. What the server takes; empty fields mean its defaults. */
export const SAMPLING = {
  temperature: [0, 10, false], top_p: [0.000001, 1, false], top_k: [0, 2 ** 31, true], min_p: [0, 1, false],
  repetition_penalty: [0.01, 100, false], max_tokens: [1, 1e9, true], seed: [0, Number.MAX_SAFE_INTEGER, true],
};

/** Settings of a conversation, with their known fields alone. */
export function asSettings(value, place) {
  const given = asObject(value, place);
  const settings = {};
  for (const [name, [least, most, isWhole]] of Object.entries(SAMPLING)) {
    if (given[name] == null) continue;
    settings[name] = number(given[name], `${place}.${name}`, least, most);
    need(!isWhole || Number.isInteger(given[name]), `${place}.${name}`, "must be a whole number", ["problem_whole", {}]);
  }
  for (const name of ["model", "system"]) {
    if (given[name] != null) settings[name] = text(given[name], `${place}.${name}`, 1_000_000);
  }
  if (given.stop != null) {
    settings.stop = list(given.stop, `${place}.stop`, 64).map((each, n) => text(each, `${place}.stop[${n}]`, 1000));
    need(!settings.stop.includes(""), `${place}.stop`, "has an empty entry");
  }
  if (given.tools != null) settings.tools = asTools(given.tools, `${place}.tools`);
  if (given.interpreter != null) settings.interpreter = given.interpreter === true;
  return settings;
}

/** Tools as OpenAI writes them, with their known fields alone. Bare functions are taken, too. */
export function asTools(value, place) {
  return list(value, place, 1000).map((tool, n) => {
    const where = `${place}[${n}]`;
    const given = asObject(tool, where);
    const made = asObject(given.function ?? given, `${where}.function`);
    need(/^[a-zA-Z0-9_.-]{1,64}$/.test(made.name ?? ""), `${where}.name`, "must be 1 to 64 letters, digits, _ . -");
    const found = { name: made.name };
    if (made.description != null) found.description = text(made.description, `${where}.description`);
    if (made.parameters != null) found.parameters = asObject(made.parameters, `${where}.parameters`);
    if (made.strict != null) found.strict = made.strict === true;
    return { type: "function", function: found };
  });
}

function children(value, place, nodes) {
  const ids = list(value.children, `${place}.children`, MAX_NODES);
  for (const id of ids) need(Object.hasOwn(nodes, id), `${place}.children`, `names ${JSON.stringify(id)}, which is not there`);
  need(new Set(ids).size === ids.length, `${place}.children`, "names one twice");
  const chosen = value.chosen ?? null;
  const isRight = ids.length === 0 ? chosen === null : ids.includes(chosen);
  need(isRight, `${place}.chosen`, "must be one of children");
  return { children: [...ids], chosen };
}

/** A conversation, with its known fields alone; its tree must be one. */
export function asConversation(value, place) {
  const given = asObject(value, place);
  const nodes = asObject(given.nodes, `${place}.nodes`);
  const ids = Object.keys(nodes);
  need(ids.length <= MAX_NODES, `${place}.nodes`, `has more than ${MAX_NODES} messages`);
  const found = Object.create(null);
  const waiting = [[null, children(asObject(given.top, `${place}.top`), `${place}.top`, nodes)]];
  const top = waiting[0][1];
  while (waiting.length) {
    const [parent, above] = waiting.pop();
    for (const id of above.children) {
      const where = `${place}.nodes.${id}`;
      need(/^[\w-]{1,64}$/.test(id) && id !== "__proto__", where, "is no valid id");
      need(!(id in found), where, "has two parents");
      const node = asObject(nodes[id], where);
      const below = children(node, where, nodes);
      found[id] = { id, parent, ...below, message: asMessage(node.message, `${where}.message`) };
      waiting.push([id, below]);
    }
  }
  need(Object.keys(found).length === ids.length, `${place}.nodes`, "has messages that belong nowhere");
  return {
    id: text(given.id, `${place}.id`, 64),
    title: text(given.title ?? "", `${place}.title`, 1000),
    isNamed: given.isNamed === true,
    created: number(given.created, `${place}.created`, 0, 1e15),
    changed: number(given.changed, `${place}.changed`, 0, 1e15),
    settings: asSettings(given.settings ?? {}, `${place}.settings`),
    top,
    nodes: { ...found },
  };
}
