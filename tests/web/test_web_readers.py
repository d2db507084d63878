"""Readers who use the keyboard alone, read from right to left, want no motion, or mistype a setting."""

import re

import pytest
from page_browser import chatting
from playwright.sync_api import expect

pytestmark = pytest.mark.slow


def test_the_focus_stays_where_it_was_when_its_place_is_drawn_anew(chat, book):
    page = chat.page
    for text in ("apples", "pears"):
        page.click("#new")
        chat.send(text)
    page.keyboard.press("Control+k")
    page.keyboard.press("Tab")
    expect(page.locator(".entry-name").first).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("apples")
    expect(page.locator(".entry.current .entry-name")).to_be_focused()
    page.keyboard.press("Alt+r")
    chat.wait()
    page.locator(".answer").get_by_role("button", name="Previous version").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".answer .versions")).to_contain_text("1 / 2")
    expect(
        page.locator(".answer").get_by_role("button", name="Next version")
    ).to_be_focused()  # there is none before
    page.keyboard.press("Enter")
    expect(page.locator(".answer .versions")).to_contain_text("2 / 2")
    expect(page.locator(".answer").get_by_role("button", name="Previous version")).to_be_focused()
    page.locator(".reader").get_by_role("button", name="Edit").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    chat.wait()
    expect(page.locator("#ask")).to_be_focused()


def test_every_part_of_the_page_is_reached_with_tab_and_can_be_seen(chat, book):
    book.tell("one", "# Title\n\n[link](https://e.example)\n\n```python\nx\n```")
    chat.send("one")
    page = chat.page
    page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => { const e = document.activeElement; const box = e.getBoundingClientRect(); const style = getComputedStyle(e);
            return [e.id || e.dataset.tip || e.className || e.localName, box.width * box.height > 0, style.outlineStyle !== "none" || e.id === "ask"]; }"""
        )
        if found[0] == "body":  # the browser's own parts lie between the end and the beginning
            continue
        seen.append(found[0])
        assert found[1:] == [True, True], found
    wanted = {"skip", "sidebar-toggle", "new", "search", "entry-name", "import", "export-all", "help", "language", "colours", "settings", "ask", "copy", "edit", "regenerate"}  # fmt: skip
    assert wanted <= set(seen), wanted - set(seen)


def test_right_to_left_words_begin_at_the_right_and_code_does_not(chat, book):
    book.tell(
        "مرحبا",
        "نص **عربي** مع English.\n\n- أولاً\n\n> اقتباس\n\nEnglish first.\n\n```python\nprint('שלום')\n```",
    )
    chat.send("مرحبا (test)")
    directions = chat.page.evaluate(
        "[...document.querySelectorAll('.bubble, .entry-name, #title, .prose > *, .prose pre')].map((e) => getComputedStyle(e).direction)"
    )
    assert directions == ["rtl", "rtl", "rtl", "rtl", "rtl", "rtl", "ltr", "ltr", "ltr"]
    chat.page.fill("#ask", "مرحبا")
    assert chat.page.evaluate("getComputedStyle(document.getElementById('ask')).direction") == "rtl"


def test_a_setting_that_is_wrong_is_told_beside_its_field(browser, told):
    with chatting(browser, told[0].url, locale="zh-CN") as chat:
        chat.page.click("#settings")
        chat.page.fill("[name=temperature]", "99")
        field = chat.page.locator(".field:has([name=temperature])")
        expect(field.locator(".problem")).to_have_text("温度：必须是 0 到 10 之间的数")
        expect(chat.page.locator("[name=temperature]")).to_have_attribute("aria-invalid", "true")
        chat.page.fill("[name=temperature]", "1")
        expect(chat.page.locator(".problem")).to_be_hidden()
        expect(chat.page.locator("[aria-invalid]")).to_have_count(0)


def test_nothing_moves_where_the_reader_wants_no_motion(browser, told):
    server, book = told
    book.tell("one", "half, whole", waits_after="half")
    book.may_go_on.clear()
    with chatting(browser, server.url, reduced_motion="reduce") as chat:
        chat.send("one", waits=False)
        expect(chat.page.locator(".running")).to_contain_text("half")
        chat.page.click("#settings")
        moving = "document.getAnimations().length"
        assert chat.page.evaluate(moving) == 0
        chat.page.keyboard.press("Escape")
        book.may_go_on.set()
        chat.wait()


def test_the_end_of_a_new_answer_is_in_view_with_room_below(chat, book):
    book.tell("one", "A line of words.\n\n" * 60)
    chat.send("one")
    chat.page.keyboard.press("Alt+r")
    chat.wait()
    chat.page.wait_for_timeout(300)
    end = "(e => e.scrollHeight - e.scrollTop - e.clientHeight)(document.getElementById('scroll'))"
    assert chat.page.evaluate(end) <= 1
    assert re.search(r"2 / 2", chat.page.inner_text(".answer .versions"))
