// Small pictures, drawn as lines.

import { element } from "../dom.js";

const LINES = {
  add: "M12 5v14M5 12h14",
  check: "M5 12.5l4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6L6 18",
  colours: "M12 3a9 9 0 1 0 .01 0zM12 4.8a7.2 7.2 0 0 0 0 14.4z",
  copy: "M9 9h10v11H9zM15 9V5H5v11h4",
  down: "M12 5v14M6 13l6 6 6-6",
  edit: "M4 20l1-4.5L16 4.5l3.5 3.5L8.5 19zM14 6.5l3.5 3.5",
  forward: "M9 6l6 6-6 6",
  back: "M15 6l-6 6 6 6",
  help: "M9.2 9.2a2.9 2.9 0 1 1 4.3 2.6c-1 .6-1.5 1.1-1.5 2.2M12 17.2v.1M12 3.5a8.5 8.5 0 1 0 .01 0z",
  language: "M4 6h9M8.500 4v2M11 6c-.7 3.500-3 6.500-6.500 8.500M6 9.500c1 2 3 3.800 5.500 4.800M12.500 20l4-9.500 4 9.500M14 16.800h5",
  menu: "M4 7h16M4 12h16M4 17h16",
  more: "M6 12v.1M12 12v.1M18 12v.1",
  again: "M19.500 12a7.500 7.500 0 1 1-2.300-5.400L19.500 9M19.500 4.500V9H15",
  search: "M10.500 4.500a6 6 0 1 0 .01 0zM15 15l5 5",
  send: "M12 19V5M6 11l6-6 6 6",
  settings: "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.500a2.500 2.500 0 1 0 .01 0zM8 13.500a2.500 2.500 0 1 0 .01 0z",
  stop: "M7 7h10v10H7z",
  tool: "M14.500 6.500a4 4 0 0 1 5-1l-2.700 2.700 1 1 2.700-2.700a4 4 0 0 1-5.300 5L8 18.800a1.900 1.900 0 0 1-2.800-2.800l7.300-7.200a4 4 0 0 1 2-2.300z",
  upload: "M12 16V4M7 9l5-5 5 5M5 20h14",
  download: "M12 4v12M7 11l5 5 5-5M5 20h14",
  warning: "M12 4L2.800 20h18.400zM12 10v4.500M12 17.200v.1",
};

/** A picture by its name; it says nothing to a screen reader, so its button needs a label. */
export function icon(name) {
  const made = element("svg", "svg");
  for (const [key, value] of [["viewBox", "0 0 24 24"], ["class", `icon icon-${name}`], ["aria-hidden", "true"]]) {
    made.setAttribute(key, value);
  }
  const line = element("path", "svg");
  line.setAttribute("d", LINES[name]);
  made.append(line);
  return made;
}
