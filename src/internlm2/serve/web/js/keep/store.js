// Where conversations stay: the browser's IndexedDB. Where there is none (private windows), they last as the page does.

const NAME = "internlm2-chat";
const TABLE = "conversations";

function asPromise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function opened() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
  return asPromise(request);
}

/** Keeps conversations by id. `isLasting`: whether they outlive the page. */
export class Store {
  constructor(database) {
    this._database = database;
    this._held = new Map();
    this._channel = "BroadcastChannel" in globalThis ? new BroadcastChannel(NAME) : null;
  }

  /** The store of this browser. */
  static async open() {
    try {
      return new Store(await opened());
    } catch {
      return new Store(null);
    }
  }

  get isLasting() {
    return this._database !== null;
  }

  /** Calls `listener` with the id when another page of this browser has changed a conversation. */
  whenChangedElsewhere(listener) {
    if (this._channel) this._channel.onmessage = (event) => listener(event.data);
  }

  _table(mode) {
    return this._database.transaction(TABLE, mode).objectStore(TABLE);
  }

  /** All of them, in no order. */
  async all() {
    return this.isLasting ? asPromise(this._table("readonly").getAll()) : [...this._held.values()];
  }

  /** One of them, or undefined. */
  async get(id) {
    return this.isLasting ? asPromise(this._table("readonly").get(id)) : this._held.get(id);
  }

  /** Writes a conversation down. */
  async put(conversation) {
    if (this.isLasting) await asPromise(this._table("readwrite").put(conversation));
    else this._held.set(conversation.id, structuredClone(conversation));
    this._channel?.postMessage(conversation.id);
  }

  /** Forgets a conversation. */
  async remove(id) {
    if (this.isLasting) await asPromise(this._table("readwrite").delete(id));
    else this._held.delete(id);
    this._channel?.postMessage(id);
  }
}
