// Filters and shows the answers of a run. Whatever a model or a file wrote becomes text nodes, never markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const AT_ONCE = 100; // answers shown before one must scroll or ask for more
  const PEEK = 80;
  const samples = data.samples;
  const sharedTexts = data.heads;
  const prompts = data.prompts;
  const byKey = new Map();
  for (const sample of samples) {
    if (!byKey.has(sample.k)) byKey.set(sample.k, []);
    byKey.get(sample.k).push(sample);
  }

  const find = (id) => document.getElementById(id);
  const choice = { run: find("run"), task: find("task"), subset: find("subset"), verdict: find("verdict") };
  const search = find("search");
  const list = find("samples");
  const count = find("count");
  const more = find("more");
  let shown = [];
  let numBuilt = 0;
  let shownSubsets = [];

  function element(name, className, ...children) {
    const made = document.createElement(name);
    if (className) made.className = className;
    made.append(...children);
    return made;
  }

  // What could hide or turn around text is shown as its code.
  const UNPRINTABLE = /(?![\n\t])[\p{Cc}\p{Cs}\u2028\u2029\u202a-\u202e\u2066-\u2069]/gu;

  function code(char) {
    return "\\u" + char.codePointAt(0).toString(16).padStart(4, "0");
  }

  function plain(text) {
    return text.replace(UNPRINTABLE, code);
  }

  // A text is a string, or [beginning, number of characters left out, end].
  function parts(text) {
    if (typeof text === "string") return [plain(text)];
    const told = `[${text[1].toLocaleString("en")} characters left out here; samples.jsonl has them]`;
    return [plain(text[0]), element("span", "left-out", "\n" + told + "\n"), plain(text[2])];
  }

  function flat(text) {
    return text === undefined ? "" : typeof text === "string" ? text : text[0] + "\n" + text[2];
  }

  function peek(text) {
    const line = plain(flat(text)).replace(/\s+/g, " ").trim();
    return line.length > PEEK ? line.slice(0, PEEK) + "…" : line || "nothing";
  }

  function verdictOf(sample) {
    if (sample.e !== undefined) return "error";
    return sample.v === 1 ? "right" : sample.v === 0 ? "wrong" : "partly";
  }

  function named(sample) {
    const verdict = verdictOf(sample);
    return verdict === "partly" ? `${(100 * sample.v).toFixed(1)} %` : verdict;
  }

  function differs(sample) {
    return byKey.get(sample.k).some((other) => verdictOf(other) !== verdictOf(sample) || other.v !== sample.v);
  }

  const TESTS = {
    "": () => true,
    right: (sample) => verdictOf(sample) === "right",
    partly: (sample) => verdictOf(sample) === "partly",
    wrong: (sample) => verdictOf(sample) === "wrong",
    error: (sample) => verdictOf(sample) === "error",
    shortened: (sample) => Boolean(sample.h || sample.c),
    cut: (sample) => sample.f === "length",
    differ: differs,
  };

  function holds(sample, words) {
    const fields = [sample.k, prompts[sample.p].t, sample.o, sample.x, sample.g, sample.d, sample.e];
    return fields.some((text) => flat(text).toLowerCase().includes(words));
  }

  function filter() {
    const words = search.value.toLowerCase();
    const isMeant = TESTS[choice.verdict.value];
    shown = samples.filter(
      (sample) =>
        (choice.run.value === "" || sample.r === Number(choice.run.value)) &&
        (choice.task.value === "" || sample.t === data.tasks[choice.task.value]) &&
        (choice.subset.value === "" || (sample.s ?? "") === shownSubsets[choice.subset.value]) &&
        isMeant(sample) &&
        (words === "" || holds(sample, words)),
    );
    const judged = shown.filter((sample) => sample.e === undefined);
    const score = judged.reduce((sum, sample) => sum + sample.v, 0);
    const mean = judged.length ? `, mean score ${((100 * score) / judged.length).toFixed(1)} %` : "";
    count.textContent = `${shown.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")} answers${mean}`;
    list.replaceChildren();
    numBuilt = 0;
    build();
  }

  function build() {
    const end = Math.min(shown.length, numBuilt + AT_ONCE);
    list.append(...shown.slice(numBuilt, end).map(row));
    numBuilt = end;
    more.hidden = numBuilt >= shown.length;
    more.textContent = `Show more (${(shown.length - numBuilt).toLocaleString("en")} are left)`;
  }

  function row(sample) {
    const summary = element(
      "summary", "",
      element("span", "verdict", named(sample)),
      element("span", "key", plain(sample.k)),
    );
    if (data.runs.length > 1) summary.append(element("span", "soft", plain(data.runs[sample.r])));
    const told = sample.e !== undefined ? peek(sample.e) : `read as ${peek(sample.x)} · right is ${peek(sample.g)}`;
    summary.append(element("span", "peek", told));
    const made = element("details", `sample is-${verdictOf(sample)}`, summary);
    made.addEventListener("toggle", () => {
      if (made.open && made.children.length === 1) made.append(body(sample));
    });
    return made;
  }

  function block(title, text) {
    const made = element("details", "", element("summary", "", title), element("pre", "", ...parts(text)));
    made.open = true;
    return made;
  }

  function facts(sample) {
    const told = [];
    if (sample.h) told.push(`${sample.h} worked examples dropped to fit`);
    if (sample.c) told.push(`${sample.c} tokens cut from the prompt`);
    if (sample.f === "length") told.push("the answer reached its longest length");
    if (sample.n) told.push(`${sample.n[0]} tokens of prompt, ${sample.n[1]} of answer`);
    return told.join(" · ");
  }

  function answer(sample) {
    const made = element("div", "");
    if (sample.e !== undefined) made.append(block("Error", sample.e));
    if (sample.l) {
      const told = Object.entries(sample.l).map(([label, value]) => `${label}  ${value === null ? "no number" : value.toFixed(4)}`);
      made.append(block("Log-probabilities of the labels", told.join("\n")));
    }
    made.append(block("Answer", sample.o ?? ""));
    made.append(block("Read as", sample.x ?? ""));
    if (sample.d) made.append(element("p", "soft", plain(flat(sample.d))));
    const told = facts(sample);
    if (told) made.append(element("p", "soft", told));
    return made;
  }

  function body(sample) {
    const made = element("div", "body");
    const prompt = prompts[sample.p];
    if (prompt.h) {
      const shared = sharedTexts[prompt.h - 1];
      const title = `Beginning of the prompt, the same in many (${flat(shared).length.toLocaleString("en")} characters)`;
      const folded = block(title, shared);
      folded.open = false;
      made.append(folded);
    }
    made.append(block(prompt.h ? "Prompt, from there" : "Prompt", prompt.t), answer(sample));
    made.append(block("Right answer", sample.g));
    for (const other of byKey.get(sample.k)) {
      if (other === sample) continue;
      const title = `${plain(data.runs[other.r])}: ${named(other)}`;
      made.append(element("details", `sample is-${verdictOf(other)}`, element("summary", "", title), answer(other)));
    }
    return made;
  }

  // The value of an option is its place in the list of names.
  function options(select, names, everything) {
    const made = [everything, ...names].map((name, n) => {
      const option = element("option", "", plain(name) || "(whole)");
      option.value = n === 0 ? "" : String(n - 1);
      return option;
    });
    select.replaceChildren(...made);
    select.closest("label").hidden = names.length < 2;
  }

  function subsets() {
    const task = data.tasks.length === 1 ? data.tasks[0] : data.tasks[choice.task.value];
    shownSubsets = [...new Set(samples.filter((sample) => sample.t === task).map((sample) => sample.s ?? ""))];
    options(choice.subset, shownSubsets, "all subsets");
  }

  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(filter, 200);
  });
  choice.task.addEventListener("change", subsets);
  for (const select of Object.values(choice)) select.addEventListener("change", filter);
  more.addEventListener("click", build);
  new IntersectionObserver((seen) => {
    if (seen.some((one) => one.isIntersecting) && !more.hidden) build();
  }, { rootMargin: "400px" }).observe(more);
  find("open").addEventListener("click", () => list.querySelectorAll(":scope > .sample").forEach((one) => { one.open = true; }));
  find("close").addEventListener("click", () => list.querySelectorAll(":scope > .sample").forEach((one) => { one.open = false; }));

  options(choice.run, data.runs, "all runs");
  options(choice.task, data.tasks, "all tasks");
  if (data.runs.length < 2) choice.verdict.querySelector("[value=differ]").remove();
  subsets();
  filter();
})();
