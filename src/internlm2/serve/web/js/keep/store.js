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

/** A way to tell other pages of this browser; null where that is forbidden, as storage may be. */
function channel() {
  try {
    return new BroadcastChannel(NAME);
  } catch {
    return null;
  }
}

/** Keeps conversations by id. `isLasting`: whether they outlive the page. */
export class Store {
  constructor(database) {
    this._database = database;
    this._held = new Map();
    this._channel = channel();
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

  /** Writes conversations down, all or none. `beside`: told what lies there under the same id, before it is replaced. */
  async put(conversations, beside = () => {}) {
    if (this.isLasting) await this._write(conversations, beside);
    else for (const each of conversations) this._held.set(each.id, structuredClone(each));
    for (const { id } of conversations) this._channel?.postMessage(id);
  }

  _write(conversations, beside) {
    return new Promise((resolve, reject) => {
      const table = this._table("readwrite");
      const { transaction } = table;
      let failure = null;
      transaction.oncomplete = () => resolve();
      transaction.onabort = () => reject(failure ?? transaction.error);
      for (const each of conversations) {
        const request = table.get(each.id);
        request.onsuccess = () => {
          try {
            if (request.result) beside(request.result);
            table.put(each);
          } catch (error) {
            if (failure !== null) return;
            failure = error;
            transaction.abort();
          }
        };
      }
    });
  }

  /** Writes a conversation down before the page is gone: there is no time to look at what lies there. */
  putAtOnce(conversation) {
    if (!this.isLasting) return;
    const table = this._table("readwrite");
    table.put(conversation);
    table.transaction.commit();
  }

  /** Forgets a conversation. */
  async remove(id) {
    if (this.isLasting) await asPromise(this._table("readwrite").delete(id));
    else this._held.delete(id);
    this._channel?.postMessage(id);
  }
}
