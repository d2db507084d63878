"""Debian's chromium, driven by playwright: one browser for the tests of a module, a fresh profile for each test."""

import contextlib
import json
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SECONDS = 20


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """A browser, where there is one."""
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Chat:
    """The page, as a reader uses it. `faults`: what the console said and which other hosts were asked."""

    def __init__(self, browser: Browser, url: str, **options) -> None:
        given = {"viewport": {"width": 1280, "height": 860}, "locale": "en-US"} | options
        self.context = browser.new_context(**given)
        self.context.set_default_timeout(SECONDS * 1000)
        expect.set_options(timeout=SECONDS * 1000)
        self.url = url
        self.faults: list[str] = []
        self.page = self.open()

    def open(self) -> Page:
        page = self.context.new_page()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("dialog", lambda dialog: (self.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", self._asked)
        page.goto(self.url + "/")
        page.wait_for_selector("html[data-ready]")
        return page

    def _heard(self, message) -> None:
        if message.type in ("error", "warning") and "401" not in message.text:
            self.faults.append(message.text)

    def _asked(self, request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.faults.append(f"asked {request.url}")

    def send(self, text: str, *, waits: bool = True) -> None:
        self.page.fill("#ask", text)
        self.page.press("#ask", "Enter")
        if waits:
            self.wait()

    def wait(self) -> None:
        """Until no answer runs."""
        expect(self.page.locator("#stop")).to_be_hidden()
        expect(self.page.locator(".running")).to_have_count(0)

    @property
    def words(self) -> list[str]:
        """What is said, first to last."""
        return [each.strip() for each in self.page.locator(".bubble, .answer > .prose").all_inner_texts()]

    def close(self) -> None:
        self.context.close()
        assert self.faults == [], self.faults


@contextlib.contextmanager
def chatting(browser: Browser, url: str, **options) -> Iterator[Chat]:
    """A fresh profile on the page; nothing may have gone wrong when it ends."""
    chat = Chat(browser, url, **options)
    try:
        yield chat
    except BaseException:
        chat.context.close()
        raise
    chat.close()


def forget(chat, *words):
    """Faults that the test itself made."""
    chat.faults[:] = [fault for fault in chat.faults if not any(word in fault for word in words)]


def conversations(count, *, words="answer"):
    """A file of conversations, newest first."""
    found = []
    for n in range(count):
        nodes = {
            "u": {"children": ["a"], "chosen": "a", "message": {"role": "user", "content": f"question {n}"}},
            "a": {"children": [], "chosen": None, "message": {"role": "assistant", "content": words}},
        }
        top = {"children": ["u"], "chosen": "u"}
        times = {"created": 1e12 - n, "changed": 1e12 - n}
        found.append(
            {"id": f"c{n}", "title": f"title {n}", **times, "settings": {}, "top": top, "nodes": nodes}
        )
    return {"format": "internlm2-conversations", "version": 1, "conversations": found}


def give_file(chat, tmp_path, content):
    file = tmp_path / "given.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    chat.page.set_input_files("#file", file)
