// Server-sent events, however the network cuts them.

/** Feed it text; it gives the data of each event that is complete. */
export class EventReader {
  constructor() {
    this._rest = "";
    this._data = [];
  }

  /** The data of all events that end within `text`. */
  push(text) {
    this._rest += text;
    const found = [];
    for (;;) {
      const match = /\r\n|\n|\r(?!$)/.exec(this._rest); // a \r at the end may be half of \r\n
      if (match === null) return found;
      const line = this._rest.slice(0, match.index);
      this._rest = this._rest.slice(match.index + match[0].length);
      if (line === "") {
        if (this._data.length) found.push(this._data.join("\n"));
        this._data = [];
      } else if (line === "data" || line.startsWith("data:")) {
        this._data.push(line.slice(5).replace(/^ /, ""));
      }
    }
  }
}
