"""The page in Firefox: what the other browser shows in detail, here once through."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from page_firefox import firefox

pytestmark = pytest.mark.slow
CALL = '<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": "上海"}}<|action_end|>\n'
TEXT = "# One\n\nTwo **three**.\n\n$$\\frac{x^2}{y}$$\n\n```python\nprint(1)\n```\n\n| a |\n|---|\n| b |\n"


@pytest.fixture(scope="module")
def fox():
    with firefox() as found:
        yield found


@pytest.fixture
def tab(fox, told, book):
    server, _ = told
    with fox.tab(server.url) as found:
        yield found


def count(tab, selector: str) -> object:
    return tab.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")


def test_an_answer_streams_and_is_drawn(tab, book):
    book.tell("hello", TEXT, waits_after="Two")
    tab.send("hello", waits=False)
    tab.until("document.querySelector('.running .prose h3')")
    assert count(tab, ".running table") == 0
    assert tab.evaluate("document.getElementById('stop').hidden") is False
    book.may_go_on.set()
    tab.wait()
    tab.until("document.querySelector('.prose .katex math')")  # its library is loaded with the first formula
    for selector in (
        ".prose strong",
        ".prose .katex math",
        ".prose .hljs-built_in",
        ".prose td",
        ".prose [style]",
    ):
        assert count(tab, selector) > 0, selector
    assert "tokens" in tab.evaluate("document.querySelector('.figures').textContent")
    assert tab.evaluate("document.getElementById('context').textContent").endswith("/ 4.1k")


def test_stop_continue_ask_again_edit_versions_and_reload(tab, book):
    book.tell("one", "half, whole", waits_after="half")
    tab.send("one", waits=False)
    tab.until("document.querySelector('.running .prose')?.textContent.includes('half')")
    tab.press("Escape")
    tab.wait()
    assert tab.evaluate("document.querySelector('.note').textContent") == "Stopped"
    book.stories.clear()
    book.tell("one", "second")
    tab.press("Alt", "r")
    tab.until("document.querySelector('.answer .versions')?.textContent.includes('2 / 2')")
    tab.wait()
    tab.press("ArrowUp")
    tab.until("document.activeElement.className === 'edit-area'")
    book.tell("two", "third")
    tab.fill(".edit-area", "two")
    tab.press("Enter")
    tab.until("document.querySelector('.answer .prose')?.textContent === 'third'")
    tab.wait()
    assert tab.words == ["two", "third"]
    tab.click(".reader .versions button")
    assert tab.words == ["one", "second"]
    tab.evaluate("new Promise((done) => setTimeout(done, 500))")
    tab.open()
    assert tab.words == ["one", "second"]
    assert tab.evaluate("document.querySelector('.answer .versions').textContent.trim()") == "2 / 2"


def test_a_tool_call_and_chinese(tab, book):
    tab.press("Alt", "s")
    tab.until("document.querySelector('dialog[open]')")
    tab.fill("[name=tools]", '[{"type": "function", "function": {"name": "weather"}}]')
    tab.press("Escape")
    tab.until("!document.querySelector('dialog')")
    book.tell("下雨", "我查一下。" + CALL)
    book.tell("21", "**暖和**。")
    tab.send("上海下雨吗？")
    tab.until("document.querySelector('.card textarea')")
    assert "上海" in tab.evaluate("document.querySelector('.card pre').textContent")
    tab.fill(".card textarea", "21 度")
    tab.press("Enter")
    tab.until("document.querySelector('.prose strong')?.textContent === '暖和'")
    tab.wait()
    tab.click("#language")
    assert tab.evaluate("document.getElementById('new').textContent.trim()") == "新对话"


def test_phone_width_and_dark_colours(fox, told):
    server, book = told
    book.stories.clear()
    book.tell("wide", "```\n" + "x" * 300 + "\n```\n\n" + "$$" + "a+" * 90 + "b$$\n\n" + "y" * 400)
    with fox.tab(server.url, width=450, height=740) as tab:
        tab.send("wide " + "z" * 200)
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert tab.evaluate("(e => e.scrollWidth - e.clientWidth)(document.getElementById('scroll'))") <= 0
        tab.click("#sidebar-toggle")
        assert tab.evaluate("document.getElementById('sidebar').hidden") is False
        tab.press("Escape")
        assert tab.evaluate("document.getElementById('sidebar').hidden") is True
        tab.click("#settings")
        tab.until("document.querySelector('dialog[open]')")
        tab.evaluate(
            "(e => { e.value = 'dark'; e.dispatchEvent(new Event('change')); return 0; })([...document.querySelectorAll('dialog select')].at(-2))"
        )
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 28)"


def test_nothing_that_a_model_writes_runs_or_loads(fox, told):
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node to read the list of attacks")
    code = 'import("./vectors.js").then(({VECTORS}) => console.log(JSON.stringify(VECTORS)))'
    done = subprocess.run(
        [node, "-e", code], cwd=Path(__file__).parent / "js", capture_output=True, text=True, check=True
    )
    vectors = json.loads(done.stdout)
    server, book = told
    with fox.tab(server.url) as tab:
        tab.evaluate(
            "(() => { window.attacks = []; document.addEventListener('securitypolicyviolation', (e) => window.attacks.push(e.violatedDirective + ' ' + e.blockedURI));"
            " for (const name of ['alert', 'prompt', 'confirm']) window[name] = () => window.attacks.push(name); return 0; })()"
        )
        for n in range(0, len(vectors), 10):
            book.stories.clear()
            book.tell("attack", "\n\n```\n```\n\n".join(vectors[n : n + 10]))
            tab.click("#new")
            tab.send(f"attack {n}")
            assert (
                count(
                    tab,
                    ".prose script, .prose iframe, .prose object, .prose style, .prose form, .prose input",
                )
                == 0
            )
            kinds = tab.evaluate("[...document.querySelectorAll('.prose a')].map((e) => e.protocol)")
            assert set(kinds) <= {"http:", "https:", "mailto:"}
        assert tab.evaluate("window.attacks") == []


def test_the_policy_stops_scripts_within_the_page(fox, told):
    with fox.tab(told[0].url) as tab:
        tried = tab.evaluate(
            "(() => { const script = document.createElement('script'); script.textContent = 'window.ran = true'; document.body.append(script);"
            " document.body.setAttribute('style', 'color: red'); return [window.ran === true, document.body.style.color]; })()"
        )
        assert tried == [False, ""]
