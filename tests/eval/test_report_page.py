"""The page of a run: nothing of a model is markup in it, nothing is left out in silence, and a browser shows it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from internlm2.eval.report import page_data
from internlm2.eval.report.page import page
from internlm2.eval.report.page_data import embedded, pack
from internlm2.eval.results import Results, Row, TaskResult
from internlm2.eval.run_folder import Sample
from internlm2.eval.table import FinishedRun
from internlm2.eval.task import EvalError

ATTACKS = [
    "<script>document.title='PWNED'</script>",
    "</script><script>document.title='PWNED'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='PWNED'\">",
    "\"><svg onload=document.title='PWNED'>",
    "' autofocus onfocus=document.title='PWNED' x='",
    "]]></script><iframe srcdoc='<script>parent.document.title=1</script>'>",
    "javascript:document.title='PWNED'",
    "&lt;b&gt; &amp;#60;",
    "\u2028\u2029</script\t>",
    "\0\x1b[2J\u202egnp.exe\ud800",
    "{{constructor.constructor('document.title=1')()}} ${document.title=1} __proto__",
]


def samples(texts=ATTACKS, **more) -> dict[str, Sample]:
    found = {}
    for n, text in enumerate(texts):
        fields = dict.fromkeys(
            ("prompt", "gold", "output", "extracted", "detail", "subset", "finish_reason"), text
        )
        one = Sample(
            f"gsm8k:{n}{text}", "gsm8k", index=n, logprobs={text: -1.0, "B": None}, **{**fields, **more}
        )
        found[one.key] = one
    return found


def finished(own: dict[str, Sample], name: str = "demo", folder: str = "runs/demo") -> FinishedRun:
    rows = {"gsm8k": Row(50.0, 1.5, len(own))}
    task = TaskResult(
        "gsm8k", rows, rows | {name: Row(1.0, None, 1)}, len(own), 0, 1, 1, 0, 10, 10, 1.0, "ab" * 32,
        {name: "cd" * 32}, (name,), (name,),
    )  # fmt: skip
    results = Results(
        {"name": name, "dtype": name}, "fixed", True, 5, 0, False, True, {"internlm2": name}, {"gsm8k": task}
    )
    return FinishedRun(Path(folder), results, own)


class Reader(HTMLParser):
    """Tags and scripts, as a browser's tokenizer finds them: the content of a script ends at the first `</script`."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data


def data_of(text: str) -> dict:
    return json.loads(Reader(text).scripts[0])


def test_what_a_model_wrote_is_nowhere_markup():
    text = page([finished(samples(), name=attack) for attack in ATTACKS[1:3]])
    found = Reader(text)
    allowed = (
        "html head meta title style body h1 h2 p details summary ul li div table thead tbody tr th td noscript label "
        "select option input output button script code"
    )
    assert {tag for tag, _ in found.tags} <= set(allowed.split(" "))
    assert sum(tag == "script" for tag, _ in found.tags) == 2
    attributes = {name for _, own in found.tags for name in own}
    assert not [
        name for name in attributes if name.startswith("on") or name in ("src", "href", "srcdoc", "style")
    ]
    assert "PWNED" not in text.replace(found.scripts[0], "").replace("document.title=&#x27;PWNED", "")


def test_the_data_cannot_end_its_script_and_comes_back_whole():
    text = page([finished(samples())])
    script = Reader(text).scripts[0]
    assert not set(script) & set("<>&\u2028\u2029\ud800")
    text.encode()  # no half characters
    data = json.loads(script)
    assert [data["prompts"][one["p"]]["t"] for one in data["samples"]] == ATTACKS
    for field in ("g", "o", "x", "d", "s", "f"):
        assert [one[field] for one in data["samples"]] == ATTACKS
    assert [one["l"] for one in data["samples"]] == [{attack: -1.0, "B": None} for attack in ATTACKS]


def test_a_browser_may_run_the_pages_own_script_and_load_nothing():
    text = page([finished(samples())])
    policy = next(own["content"] for tag, own in Reader(text).tags if own.get("http-equiv"))
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    for rule, content in (("script-src", scripts), ("style-src", styles)):
        assert len(content) == 1
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    own = scripts[0]
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "setAttribute",
    ):
        assert word not in own
    assert not re.findall(r"(?:https?:)?//[a-z]", text.replace("http-equiv", "").replace(own, ""))


def test_everything_that_was_run_is_on_the_page():
    own = finished(samples(["x"]))
    text = Reader(page([own])).text
    for told in (
        "50.0 ± 1.5",
        "70.7",
        "fixed",
        "at most 5 of each subset",
        "ab" * 32,
        "cd" * 32,
        "1 of 1 questions lost",
    ):
        assert told in text, told


def test_two_runs_share_prompts_and_are_told_apart():
    first = samples(["same", "other"])
    text = page([finished(first, "a"), finished(first, "b")])
    data = data_of(text)
    assert data["runs"] == ["a", "b"]
    assert [one["r"] for one in data["samples"]] == [0, 1, 0, 1], "the runs of a question stand together"
    assert len(data["prompts"]) == 2
    with pytest.raises(EvalError, match="The same run is given twice"):
        page([finished(first), finished(first)])


def test_shared_beginnings_are_kept_once_and_come_back_whole():
    shots = "Question: what?\nAnswer: that\n\n" * 20
    prompts = [f"{shots}Question: {n}?\nAnswer:" for n in range(50)]
    own = {
        f"gsm8k:{n}": Sample(f"gsm8k:{n}", "gsm8k", "", n, prompt, "1") for n, prompt in enumerate(prompts)
    }
    own["gsm8k:3"] = replace(own["gsm8k:3"], dropped_shots=2, prompt="Question: 3?\nAnswer:")
    packed = pack({"demo": own})
    data = json.loads(packed.json)
    whole = [data["heads"][p["h"] - 1] + p["t"] if "h" in p else p["t"] for p in data["prompts"]]
    assert [whole[one["p"]] for one in data["samples"]] == [one.prompt for one in own.values()]
    assert data["heads"] == [shots]
    assert len(packed.json) < 0.3 * sum(map(len, prompts))
    short = {n: replace(own["gsm8k:1"], key=n, prompt=f"A short line.\n{n}") for n in ("a", "b")}
    assert json.loads(pack({"demo": short}).json)["heads"] == [], "not worth to be taken apart"
    assert (packed.num_shortened, packed.num_left_out) == (0, 0)


@pytest.mark.parametrize(
    ("first", "second", "shared"), [("a\nb\nc", "a\nb\nd", 4), ("a\nb", "a\nb", 2), ("a\nb", "a\nb\nc", 2), ("", "x", 0), ("a", "b", 0)]
)  # fmt: skip
def test_shared_beginnings_end_at_a_line(first, second, shared):
    assert page_data._length_of_shared(first, second) == page_data._length_of_shared(second, first) == shared


def test_long_texts_lose_their_middle_and_the_page_says_so():
    own = samples(["short"], output="A" * 150_000 + "M" + "Z" * 150_000)
    packed = pack({"demo": own})
    (sample,) = json.loads(packed.json)["samples"]
    assert sample["o"] == ["A" * 50_000, 200_001, "Z" * 50_000]
    assert (packed.num_shortened, packed.text_limit, packed.num_left_out) == (1, 100_000, 0)
    assert "1 texts of more than 100,000 characters are shortened" in Reader(page([finished(own)])).text
    assert (
        "shortened"
        not in Reader(page([finished(samples(["short"]))])).text.split("Answers")[1].split("verdict")[0]
    )


def test_a_page_never_grows_beyond_its_limit_and_says_what_is_left_out():
    keys = [f"gsm8k:{n}" for n in range(100)]
    own = {key: Sample(key, "gsm8k", "", n, key + "<" * 3000, "1", "&" * 3000) for n, key in enumerate(keys)}
    for max_bytes, limit in ((10_000_000, 100_000), (1_500_000, 1_000), (300_000, 1_000)):
        packed = pack({"demo": own}, max_bytes=max_bytes)
        assert len(packed.json.encode()) <= max_bytes + 100
        data = json.loads(packed.json)
        assert len(data["samples"]) == 100 - packed.num_left_out
        assert {one["p"] for one in data["samples"]} == set(range(len(data["prompts"])))
        assert packed.text_limit == limit
        assert (packed.num_left_out > 0) == (max_bytes == 300_000)
        text = Reader(page([finished(own)], max_bytes=max_bytes)).text
        assert (f"{packed.num_left_out} answers are left out" in text) == (packed.num_left_out > 0)


def test_fourteen_thousand_answers_make_a_small_page():
    shots = "Question: what?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n" * 60
    own = {}
    for n in range(14_000):
        key = f"mmlu.s{n % 57}:{n}"
        prompt = f"{n % 57}{shots}Question {n}: {'why ' * 50}?\nAnswer:"
        own[key] = Sample(
            key,
            "mmlu",
            f"s{n % 57}",
            n,
            prompt,
            "A",
            "A",
            {"A": -1.0, "B": -2.0, "C": -3.0, "D": -4.0},
            "A",
            1.0,
        )
    packed = pack({"demo": own})
    assert (packed.num_shortened, packed.num_left_out) == (0, 0)
    assert len(packed.json) < 10_000_000


def test_json_inside_html_is_json():
    value = {"<&>\u2028\ud83d": ["\ud800", "中文 😀", None, 1.5]}
    text = embedded(value)
    assert json.loads(text) == value
    text.encode()


# -- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """
const found = (id) => document.getElementById(id);
const choose = (id, value) => { found(id).value = value; found(id).dispatchEvent(new Event("change")); };
document.querySelectorAll(".sample").forEach((one) => { one.open = true; });
const told = { all: found("count").textContent };
choose("verdict", "wrong");
told.wrong = found("count").textContent;
choose("verdict", "error");
told.error = found("count").textContent;
choose("verdict", "");
found("search").value = "IFRAME";
found("search").dispatchEvent(new Event("input"));
setTimeout(() => {
  told.searched = found("count").textContent;
  found("open").click();
  setTimeout(() => {
    told.pres = [...document.querySelectorAll("#samples pre")].map((one) => one.textContent);
    told.elements = [...new Set([...document.querySelectorAll("#samples *")].map((one) => one.localName))].sort();
    told.title = document.title;
    const result = document.createElement("output");
    result.id = "told";
    result.textContent = JSON.stringify(told);
    document.body.append(result);
  }, 200);
}, 500);
"""


@pytest.mark.slow
def test_a_browser_shows_filters_and_runs_nothing_of_a_model(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    own = samples()
    keys = list(own)
    own[keys[0]] = replace(own[keys[0]], error=ATTACKS[3])
    own[keys[1]] = replace(own[keys[1]], score=1.0)
    text = page([finished(own)])
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = [
        base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()
        for one in (scripts[0], scripts[0] + PROBE)
    ]
    text = text.replace(scripts[0], scripts[0] + PROBE).replace(digests[0], digests[1])
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = Reader(done.stdout)
    told = json.loads(
        done.stdout.split('id="told">')[1]
        .split("</output>")[0]
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
    )
    assert told["all"] == "12 of 12 answers, mean score 9.1 %"
    assert told["wrong"] == "10 of 12 answers, mean score 0.0 %"
    assert told["error"] == "1 of 12 answers"
    assert told["searched"] == "1 of 12 answers, mean score 0.0 %"
    assert told["elements"] == ["details", "div", "p", "pre", "span", "summary"]
    assert any(ATTACKS[6] in one for one in told["pres"])
    assert "PWNED" not in told["title"]
    assert not [tag for tag, _ in found.tags if tag in ("img", "svg", "iframe")]
