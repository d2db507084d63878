"""What the page does when not all is well: a key, an error, a second window; in a real browser."""

import json

import pytest
from page_browser import chatting
from page_stories import telling
from playwright.sync_api import expect

from internlm2.serve.keys import digest

pytestmark = pytest.mark.slow


def test_a_key_is_asked_for_and_kept_for_the_window_alone(browser, page_llm):
    with telling(page_llm, keys={"ann": digest("secret-key")}) as (server, book):
        book.tell("one", "first")
        with chatting(browser, server.url) as chat:
            page = chat.page
            page.fill("#asked", "wrong")
            page.press("#asked", "Enter")
            expect(page.locator("dialog .problem")).to_contain_text("does not know")
            page.fill("#asked", "secret-key")
            page.press("#asked", "Enter")
            expect(page.locator("dialog")).to_have_count(0)
            chat.send("one")
            assert chat.words == ["one", "first"]
            stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
            assert json.loads(stored)[1]["internlm2-key"] == "secret-key"
            assert "secret-key" not in json.dumps(json.loads(stored)[0])
            expect(chat.open().locator("#asked")).to_be_visible()  # another window


def test_errors_of_the_server_are_shown_and_can_be_tried_again(chat, book):
    book.tell("one", "first")
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.send("one")
    expect(chat.page.locator(".failure")).to_contain_text("cannot be reached")
    chat.faults[:] = [fault for fault in chat.faults if "ERR_FAILED" not in fault]
    chat.page.unroute("**/v1/chat/completions")
    chat.page.get_by_role("button", name="Try again").click()
    chat.wait()
    assert chat.words == ["one", "first"]
    chat.page.click("#settings")
    chat.page.fill("[name=system]", "x " * 6000)
    chat.page.keyboard.press("Escape")
    chat.send("two")
    expect(chat.page.locator(".failure")).to_contain_text("4096")
    chat.faults[:] = [fault for fault in chat.faults if "400" not in fault]


def test_another_window_shows_what_was_said(chat, book):
    book.tell("one", "first")
    chat.send("one")
    other = chat.open()
    expect(other.locator(".entry-name")).to_have_text(["one"])
    chat.page.click("#new")
    chat.send("new here")
    expect(other.locator(".entry-name")).to_have_text(["new here", "one"])
