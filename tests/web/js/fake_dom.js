// As much of a document as the page's text modules need, for Node. `written` shows what would be parsed as markup.

class Node {
  constructor() { this.parent = null; this.childNodes = []; }

  remove() {
    if (this.parent) this.parent.childNodes.splice(this.parent.childNodes.indexOf(this), 1);
    this.parent = null;
  }

  append(...given) {
    for (const each of given) {
      const node = typeof each === "string" ? new Text(each) : each;
      if (!(node instanceof Node)) throw new TypeError(`append(${each})`);
      node.remove();
      node.parent = this;
      this.childNodes.push(node);
    }
  }

  replaceChildren(...given) {
    for (const child of [...this.childNodes]) child.remove();
    this.append(...given);
  }

  get textContent() { return this.childNodes.map((child) => child.textContent).join(""); }
}

class Text extends Node {
  constructor(text) { super(); this.data = text; }

  get textContent() { return this.data; }
}

class Element extends Node {
  constructor(tag, space) {
    super();
    this.tag = tag;
    this.space = space;
    this.attributes = new Map();
    this.listeners = [];
    this.style = { set: [], setProperty: (name, value) => this.style.set.push([name, value]) };
    this.classList = { remove: (name) => this.setAttribute("class", (this.attributes.get("class") ?? "").replace(name, "").trim()) };
  }

  setAttribute(name, value) { this.attributes.set(name, String(value)); }

  addEventListener(...given) { this.listeners.push(given); }
}

globalThis.document = {
  compatMode: "CSS1Compat",
  createElement: (tag) => new Element(tag, "html"),
  createElementNS: (space, tag) => new Element(tag, space),
};

/** Everything below a node, elements only. */
export function elements(node) {
  return node.childNodes.flatMap((child) => (child instanceof Element ? [child, ...elements(child)] : []));
}

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");

/** The inner HTML that a browser would show for it. */
export function written(node) {
  return node.childNodes.map((child) => {
    if (!(child instanceof Element)) return escaped(child.data);
    const attributes = [...child.attributes].map(([name, value]) => ` ${name}="${escaped(value)}"`).join("");
    return `<${child.tag}${attributes}>${written(child)}</${child.tag}>`;
  }).join("");
}
