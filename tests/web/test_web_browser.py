"""The page in a real browser, before the real application; the model answers from a book."""

import base64
import json
import re
import struct
import zlib

import pytest
from page_browser import chatting
from playwright.sync_api import expect

pytestmark = pytest.mark.slow
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": "上海"}}<|action_end|>\n'
CODE = "<|action_start|><|interpreter|>\nprint('<b>6</b>')\n<|action_end|>\n"


def png() -> str:
    """A picture of one red point, as an address."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))
    return "data:image/png;base64," + base64.b64encode(raw + chunk(b"IEND", b"")).decode()


def test_an_answer_streams_with_markdown_code_and_formulas(chat, book):
    text = "# One\n\nTwo **three**.\n\n$$x^2$$\n\n```python\nprint(1)\n```\n\n| a |\n|---|\n| b |\n"
    book.tell("hello", text, pause_seconds=0.02, waits_after="Two")
    chat.send("hello", waits=False)
    page = chat.page
    expect(page.locator(".running .prose h3")).to_have_text("One")  # before the end
    expect(page.locator("#stop")).to_be_visible()
    assert page.locator(".running table").count() == 0
    book.may_go_on.set()
    chat.wait()
    expect(page.locator(".prose strong")).to_have_text("three")
    expect(page.locator(".prose .katex math")).to_have_count(1)
    expect(page.locator(".prose .hljs-built_in")).to_have_text("print")
    expect(page.locator(".prose td")).to_have_text("b")
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s", page.inner_text(".figures"))
    assert re.search(r"\d+ / 4.1k", page.inner_text("#context"))
    assert "Two three." in page.inner_text("#live") or "Two three." in page.text_content("#live")
    assert page.evaluate("getComputedStyle(document.querySelector('.vlist')).height") != "0px"  # by CSSOM


def test_stop_ends_the_answer_here_and_in_the_engine(chat, book):
    book.tell("long", "word " * 2000, pause_seconds=0.05)
    before = book.num_stopped
    for key in ("click", "Escape"):
        chat.send("long", waits=False)
        expect(chat.page.locator(".running .prose")).to_contain_text("word word")
        if key == "click":
            chat.page.click("#stop")
        else:
            chat.page.keyboard.press("Escape")
        chat.wait()
        expect(chat.page.locator(".note").last).to_contain_text("Stopped")
    for _ in range(100):
        if book.num_stopped == before + 2:
            break
        chat.page.wait_for_timeout(50)
    assert book.num_stopped == before + 2
    chat.page.get_by_role("button", name="Continue").click()
    expect(chat.page.locator(".running")).to_have_count(1)
    chat.page.keyboard.press("Escape")
    chat.wait()
    begun = book.prompts[-1].rpartition("assistant\n")[2]
    assert begun.startswith("word")
    assert "<|im_end|>" not in begun


def test_regenerate_edit_and_branches(chat, book):
    book.tell("one", "first")
    chat.send("one")
    book.tell("one", "second")
    chat.page.locator(".answer").hover()
    chat.page.get_by_role("button", name="Ask again").click()
    chat.wait()
    assert chat.words == ["one", "second"]
    expect(chat.page.locator(".answer .versions")).to_contain_text("2 / 2")
    chat.page.locator(".reader").hover()
    chat.page.get_by_role("button", name="Edit").click()
    book.tell("two", "third")
    area = chat.page.locator(".edit-area")
    expect(area).to_be_focused()
    area.fill("two")
    area.press("Enter")
    chat.wait()
    assert chat.words == ["two", "third"]
    chat.page.locator(".reader").get_by_role("button", name="Previous version").click()
    assert chat.words == ["one", "second"]
    chat.page.locator(".answer").get_by_role("button", name="Previous version").click()
    assert chat.words == ["one", "first"]
    chat.page.keyboard.press("Alt+r")
    chat.wait()
    expect(chat.page.locator(".answer .versions")).to_contain_text("3 / 3")


def test_arrow_up_edits_the_last_message_and_escape_leaves_it(chat, book):
    chat.send("one")
    chat.page.press("#ask", "ArrowUp")
    expect(chat.page.locator(".edit-area")).to_have_value("one")
    chat.page.keyboard.press("Escape")
    assert chat.words[0] == "one"
    expect(chat.page.locator("#ask")).to_be_focused()


def test_a_reload_keeps_conversations_their_versions_and_settings(chat, book):
    book.tell("one", "first")
    chat.send("one")
    chat.page.locator(".answer").hover()
    chat.page.get_by_role("button", name="Ask again").click()
    chat.wait()
    chat.page.click("#settings")
    chat.page.fill("[name=system]", "Be brief.")
    chat.page.fill("[name=temperature]", "0.25")
    chat.page.keyboard.press("Escape")
    chat.page.wait_for_timeout(300)
    chat.page.reload()
    chat.page.wait_for_selector("html[data-ready]")
    assert chat.words == ["one", "first"]
    expect(chat.page.locator(".answer .versions")).to_contain_text("2 / 2")
    chat.send("more")
    assert "system\nBe brief." in book.prompts[-1]
    assert book.params[-1].temperature == 0.25
    chat.page.click("#new")
    expect(chat.page.locator("#empty")).to_be_visible()
    chat.send("again")
    assert "Be brief" not in book.prompts[-1]
    assert book.params[-1].temperature == 0.25


def test_conversations_are_found_named_and_deleted(chat, book):
    for text in ("apples", "pears"):
        chat.page.click("#new")
        chat.send(text)
    names = chat.page.locator(".entry-name")
    expect(names).to_have_text(["pears", "apples"])
    chat.page.keyboard.press("Control+k")
    expect(chat.page.locator("#search")).to_be_focused()
    chat.page.fill("#search", "APPL")
    expect(names).to_have_text(["apples"])
    chat.page.get_by_role("button", name="Menu of “apples”").click()
    chat.page.get_by_role("menuitem", name="Rename").click()
    chat.page.fill("#asked", "Fruit <b>")
    chat.page.press("#asked", "Enter")
    chat.page.fill("#search", "")
    expect(names).to_have_text(["pears", "Fruit <b>"])
    chat.page.get_by_role("button", name="Menu of “pears”").click()
    chat.page.keyboard.press("ArrowDown")
    chat.page.keyboard.press("ArrowDown")
    chat.page.keyboard.press("Enter")
    chat.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(names).to_have_text(["Fruit <b>"])
    chat.page.reload()
    expect(names).to_have_text(["Fruit <b>"])
    names.click()
    assert chat.words[0] == "apples"


def test_export_and_import_bring_a_conversation_back(chat, book, tmp_path):
    book.tell("one", "first **bold**")
    chat.send("one")
    with chat.page.expect_download() as found:
        chat.page.click("#export-all")
    file = tmp_path / "all.json"
    found.value.save_as(file)
    assert json.loads(file.read_text())["conversations"][0]["title"] == "one"
    chat.page.set_input_files("#file", file)
    expect(chat.page.locator(".entry-name")).to_have_text(["one", "one"])
    expect(chat.page.locator(".prose strong")).to_have_text("bold")
    file.write_text('[{"role": "user", "content": 3}]')
    chat.page.set_input_files("#file", file)
    expect(chat.page.locator(".notice")).to_contain_text("messages[0].content: must be a list")
    transcript = [
        {"role": "user", "content": "Plot it."},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "python", "arguments": '{"code": "plot()"}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "<b>drawn</b>"}, {"type": "image_url", "image_url": {"url": png()}},
                                                          {"type": "image_url", "image_url": {"url": "https://evil.example/x.png"}}]},
        {"role": "assistant", "content": "Here it is."},
    ]  # fmt: skip
    file.write_text(json.dumps({"messages": transcript}))
    chat.page.set_input_files("#file", file)
    card = chat.page.locator(".card")
    expect(card).to_contain_text("Runs Python")
    expect(card).to_contain_text("<b>drawn</b>")
    expect(card.locator("img")).to_have_count(1)
    assert chat.page.evaluate("document.querySelector('.card img').naturalWidth") == 1


def test_a_tool_call_is_shown_and_its_result_sent(chat, book):
    chat.page.keyboard.press("Alt+s")
    chat.page.fill("[name=tools]", "[{]")
    expect(chat.page.locator(".field:has([name=tools]) .problem")).to_contain_text("Tools (JSON)")
    chat.page.fill("[name=tools]", json.dumps(WEATHER))
    expect(chat.page.locator(".settings .problem")).to_be_hidden()
    chat.page.keyboard.press("Escape")
    book.tell("Rain?", "I will ask." + CALL)
    book.tell("21 degrees", "It is **warm**.")
    chat.send("Rain?")
    card = chat.page.locator(".card")
    expect(card).to_contain_text("Calls weather")
    expect(card.locator("pre").first).to_contain_text('"city": "上海"')
    card.locator("textarea").fill("21 degrees")
    card.get_by_role("button", name="Send result").click()
    expect(chat.page.locator(".prose strong")).to_have_text("warm")
    chat.wait()
    assert "environment name=<|plugin|>\n21 degrees" in book.prompts[-1]
    assert not card.evaluate("card => card.open")
    card.locator("summary").click()
    expect(card.locator("pre").last).to_have_text("21 degrees")


def test_code_of_the_interpreter_is_shown_as_code(chat, book):
    chat.page.click("#settings")
    chat.page.check("[name=interpreter]")
    chat.page.keyboard.press("Escape")
    book.tell("Compute", CODE)
    chat.send("Compute")
    expect(chat.page.locator(".card")).to_contain_text("Runs Python")
    expect(chat.page.locator(".card pre code")).to_have_text("print('<b>6</b>')")
    expect(chat.page.locator(".card .hljs-string")).to_have_count(1)


def test_chinese_input_is_not_sent_while_it_is_composed(chat, book):
    book.tell("你好", "您好！")
    page = chat.page
    page.focus("#ask")
    session = page.context.new_cdp_session(page)
    session.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
    for code in (229, 13):  # what browsers report for Enter within an input method
        page.evaluate(
            "code => document.getElementById('ask').dispatchEvent(new KeyboardEvent('keydown', "
            "{key: 'Enter', keyCode: code, isComposing: code === 13, bubbles: true, cancelable: true}))",
            code,
        )
    page.wait_for_timeout(200)
    assert chat.words == []
    session.send("Input.insertText", {"text": "你好"})
    expect(page.locator("#ask")).to_have_value("你好")
    page.keyboard.press("Enter")
    chat.wait()
    assert chat.words == ["你好", "您好！"]


def test_shift_enter_starts_a_line_and_keys_work_everywhere(chat, book):
    page = chat.page
    page.focus("#ask")
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b?/")
    expect(page.locator("#ask")).to_have_value("a\nb?/")
    assert page.locator("dialog").count() == 0
    page.locator("#new").focus()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    page.locator("#new").focus()
    page.keyboard.press("/")
    expect(page.locator("#ask")).to_be_focused()
    page.keyboard.press("Alt+n")
    expect(page.locator("#ask")).to_have_value("")


def test_the_page_speaks_chinese_and_english(browser, told):
    with chatting(browser, told[0].url, locale="zh-CN") as chat:
        page = chat.page
        expect(page.locator("#new")).to_have_text("新对话")
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        page.click("#language")
        expect(page.locator("#new")).to_have_text("New conversation")
        page.reload()
        expect(page.locator("#new")).to_have_text("New conversation")
        expect(page.locator("#ask")).to_have_attribute("placeholder", "Message")


def test_the_reader_is_not_pulled_down_while_reading(chat, book):
    book.tell("long", "A line of words.\n\n" * 300, pause_seconds=0.005)
    chat.send("long", waits=False)
    page = chat.page
    top = "document.getElementById('scroll').scrollTop"
    end = "(e => e.scrollHeight - e.scrollTop - e.clientHeight)(document.getElementById('scroll'))"
    expect(page.locator(".running p").nth(60)).to_be_attached()
    page.wait_for_timeout(100)
    assert page.evaluate(end) < 100
    page.mouse.move(700, 400)
    page.mouse.wheel(0, -600)
    page.wait_for_timeout(300)
    before = page.evaluate(top)
    expect(page.locator("#jump-down")).to_be_visible()
    page.wait_for_timeout(500)
    assert page.evaluate(top) == before
    page.click("#jump-down")
    page.wait_for_timeout(200)
    assert page.evaluate(end) < 100
    chat.wait()
    page.wait_for_timeout(100)
    assert page.evaluate(end) < 100


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_page(browser, told, width):
    server, book = told
    book.tell("wide", "```\n" + "x" * 300 + "\n```\n\n| " + " | ".join("column" * 2 for _ in range(9)) + " |\n" + "|---" * 9 + "|\n\n"
              + "$$" + "a+" * 90 + "b$$\n\n" + "y" * 400)  # fmt: skip
    options = {"viewport": {"width": width, "height": 740}}
    if width < 500:
        options |= {"is_mobile": True, "has_touch": True}
    with chatting(browser, server.url, **options) as chat:
        chat.send("wide " + "z" * 200)
        page = chat.page
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.evaluate("(e => [e.scrollWidth, e.clientWidth])(document.getElementById('scroll'))")
        assert box[0] <= box[1]
        if width < 500:
            expect(page.locator("#sidebar")).to_be_hidden()
            page.click("#sidebar-toggle")
            expect(page.locator("#sidebar")).to_be_visible()
            page.click("#new")
            expect(page.locator("#sidebar")).to_be_hidden()
            page.click("#settings")
            expect(page.get_by_role("dialog")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_colours_follow_the_system_and_the_switch(browser, told):
    with chatting(browser, told[0].url, color_scheme="dark") as chat:
        paper = "getComputedStyle(document.body).backgroundColor"
        page = chat.page
        assert page.evaluate(paper) == "rgb(23, 24, 28)"
        page.emulate_media(color_scheme="light")
        assert page.evaluate(paper) == "rgb(255, 255, 255)"
        page.click("#colours")
        page.click("#colours")
        assert page.evaluate(paper) == "rgb(23, 24, 28)"
        page.reload()
        assert page.evaluate(paper) == "rgb(23, 24, 28)"
