"""Attacks and accessibility, in a real browser."""

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from page_browser import chatting
from playwright.sync_api import expect

pytestmark = pytest.mark.slow
AXE, AXE_SHA256 = "axe-core@4.14.1", "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
VIOLATIONS = """() => {
  window.attacks = [];
  document.addEventListener('securitypolicyviolation', (event) => window.attacks.push(event.violatedDirective + ' ' + event.blockedURI));
  for (const name of ['alert', 'prompt', 'confirm']) window[name] = () => window.attacks.push(name);
}"""


@pytest.fixture(scope="module")
def vectors() -> list[str]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node to read the list of attacks")
    code = 'import("./vectors.js").then(({VECTORS}) => console.log(JSON.stringify(VECTORS)))'
    done = subprocess.run(
        [node, "-e", code], cwd=Path(__file__).parent / "js", capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_nothing_that_a_model_writes_runs_or_loads(browser, told, vectors):
    server, book = told
    assert len(vectors) >= 80
    everything = "\n\n".join(f"Attack {n}:\n\n{vector}\n\n```\n```" for n, vector in enumerate(vectors))
    with chatting(browser, server.url) as chat:
        page = chat.page
        page.evaluate(VIOLATIONS)
        for n, text in enumerate([*vectors, everything]):
            book.stories.clear()
            book.tell("attack", text)
            page.click("#new")
            chat.send(f"attack {n}")
            chat.page.wait_for_timeout(20)
            for handle in page.locator(".prose a, .prose summary, .prose img, .prose button").all()[:20]:
                handle.hover(force=True)
        made = page.evaluate(
            "[...document.querySelectorAll('.prose *')].map(e => [e.localName, ...[...e.attributes].map(a => a.name)])"
        )
        assert len(made) > 200
        assert {
            "script",
            "iframe",
            "object",
            "embed",
            "style",
            "form",
            "input",
            "base",
            "link",
            "meta",
        }.isdisjoint(e[0] for e in made)
        assert not [names for names in made if any(name.startswith("on") for name in names[1:])]
        links = page.evaluate("[...document.querySelectorAll('.prose a')].map(e => e.protocol)")
        assert set(links) <= {"http:", "https:", "mailto:"}
        assert page.evaluate("window.attacks") == []
        assert page.evaluate("document.querySelectorAll('body > nav, body > #page').length") == 2


def test_the_policy_stops_what_would_slip_through(browser, told):
    """The second wall: even a fault in the page's own code could not turn a string into markup or scripts."""
    with chatting(browser, told[0].url) as chat:
        tried = chat.page.evaluate(
            """() => {
              const found = [];
              try { document.body.innerHTML = '<img src=x onerror=alert(1)>'; found.push('innerHTML'); } catch (error) { found.push(error.name); }
              const script = document.createElement('script');
              try { script.text = 'window.ran = true'; document.body.append(script); } catch (error) { found.push(error.name); }
              document.body.setAttribute('style', 'color: red');
              found.push(document.body.style.color);
              return [found, window.ran === true];
            }"""
        )
        assert tried == [["TypeError", "TypeError", ""], False]
        assert any("Trusted" in fault for fault in chat.faults)
        chat.faults.clear()


def test_formulas_and_code_break_no_rule_of_the_policy(browser, told):
    server, book = told
    book.stories.clear()
    book.tell(
        "rich",
        "$$\\boxed{\\frac{a}{b}}\\sqrt{x}\\colorbox{red}{y}$$\n\n```python\nx = 'y'\n```\n\n- a\n- $\\cancel{b}$\n",
    )
    with chatting(browser, server.url) as chat:
        chat.page.evaluate(VIOLATIONS)
        chat.send("rich")
        expect(chat.page.locator(".formula.formula-source")).to_have_count(0)
        assert chat.page.evaluate("window.attacks") == []
        assert chat.page.locator(".prose [style]").count() > 5  # set by CSSOM


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    if shutil.which("npm") is None:
        pytest.skip("needs npm to fetch axe-core")
    place = tmp_path_factory.mktemp("axe")
    packed = subprocess.run(
        ["npm", "pack", "--silent", AXE], cwd=place, capture_output=True, text=True, timeout=120, check=False
    )
    if packed.returncode != 0:
        pytest.skip("axe-core could not be fetched from the npm registry")
    with tarfile.open(place / packed.stdout.split()[-1]) as archive:
        archive.extract("package/axe.min.js", place, filter="data")
    text = (place / "package" / "axe.min.js").read_bytes()
    assert hashlib.sha256(text).hexdigest() == AXE_SHA256
    return text.decode()


RICH = (
    "# Title\n\nText with `code`, a [link](https://e.example) and $x$.\n\n```python\ndef f(x: int): return 'a' + 1  # note\n```\n\n"
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n> quote\n\n- one\n- two\n\n$$\\frac{a}{b}$$\n"
)


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize(
    "place", ["empty", "answer", "tool", "settings", "shortcuts", "phone", "edit", "menu", "failure"]
)
def test_axe_finds_nothing_serious(browser, told, axe, place, colours):
    server, book = told
    book.stories.clear()
    book.tell("rich", RICH)
    book.tell(
        "call", 'Ask.<|action_start|><|plugin|>\n{"name": "f", "parameters": {"a": [1, "b"]}}<|action_end|>\n'
    )
    options = {"color_scheme": colours, "reduced_motion": "reduce"}
    if place == "phone":
        options |= {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    with chatting(browser, server.url, **options) as chat:
        page = chat.page
        if place == "tool":
            page.click("#settings")
            page.fill("[name=tools]", '[{"type": "function", "function": {"name": "f"}}]')
            page.keyboard.press("Escape")
            chat.send("call")
        elif place != "empty":
            chat.send("rich")
        if place == "settings":
            page.click("#settings")
            page.fill("[name=top_p]", "3")
        if place == "shortcuts":
            page.keyboard.press("Control+/")
        if place == "phone":
            page.click("#sidebar-toggle")
        if place == "edit":
            page.press("#ask", "ArrowUp")
        if place == "menu":
            page.locator(".entry .icon-button").click()
        if place == "failure":
            page.route("**/v1/chat/completions", lambda route: route.abort())
            chat.send("again")
            chat.faults.clear()
        page.wait_for_timeout(300)
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [
            (each["id"], node["html"][:200], node["failureSummary"][:300])
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]
        assert serious == []
