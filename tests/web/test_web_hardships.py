"""What the world does to the page: two windows, a full disk, a server that goes, keys that end."""

import json

import pytest
from page_browser import chatting, conversations, forget, give_file
from playwright.sync_api import expect

pytestmark = pytest.mark.slow
NO_STORAGE = """for (const name of ["indexedDB", "localStorage", "sessionStorage", "BroadcastChannel"])
  Object.defineProperty(globalThis, name, { get() { throw new DOMException("no", "SecurityError"); } });"""
FULL = 'IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError"); };'


def test_two_windows_in_one_conversation_lose_nothing(chat, book):
    book.tell("start", "begun")
    chat.send("start")
    other = chat.open()
    other.locator(".entry-name").click()
    expect(other.locator(".answer")).to_contain_text("begun")
    book.tell("here", "half, whole", waits_after="half")
    book.tell("there", "answered there")
    chat.send("here", waits=False)
    expect(chat.page.locator(".running")).to_contain_text("half")
    expect(other.locator(".bubble")).to_have_count(2)  # what is said here is seen there
    other.locator(".reader").first.hover()
    other.locator(".reader").first.get_by_role("button", name="Edit").click()
    other.fill(".edit-area", "there")
    other.press(".edit-area", "Enter")
    expect(other.locator(".answer")).to_contain_text("answered there")
    expect(other.locator(".running")).to_have_count(0)
    book.may_go_on.set()
    chat.wait()
    assert chat.words == ["start", "begun", "here", "half, whole"]
    expect(chat.page.locator(".reader .versions").first).to_contain_text("1 / 2")
    chat.page.wait_for_timeout(300)
    for page in (chat.page, other):
        page.reload()
        page.wait_for_selector("html[data-ready]")
        page.locator(".entry-name").click()
        text = page.evaluate(
            """async () => { const opened = indexedDB.open("internlm2-chat"); await new Promise((done) => { opened.onsuccess = done; });
            const all = opened.result.transaction("conversations").objectStore("conversations").getAll();
            await new Promise((done) => { all.onsuccess = done; }); return JSON.stringify(all.result); }"""
        )
        assert all(each in text for each in ("begun", "half, whole", "answered there"))


def test_a_reload_in_mid_answer_keeps_its_words_and_it_can_go_on(chat, book):
    book.tell("one", "half, whole", waits_after="half")
    chat.send("one", waits=False)
    expect(chat.page.locator(".running")).to_contain_text("half")
    chat.page.reload()
    chat.page.wait_for_selector("html[data-ready]")
    assert chat.words == ["one", "half, wh"]
    expect(chat.page.locator(".note")).to_have_text("Stopped")
    book.stories.clear()
    book.tell("one", "ole")
    chat.page.get_by_role("button", name="Continue").click()
    chat.wait()
    assert chat.words == ["one", "half, whole"]
    expect(chat.page.locator(".note")).to_have_count(0)


def test_a_connection_that_breaks_keeps_what_came(chat, book):
    begun = json.dumps(
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "half"}, "finish_reason": None}]}
    )
    chat.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {begun}\n\n"),
    )
    chat.send("one")
    expect(chat.page.locator(".failure")).to_contain_text("ended before the answer did")
    assert chat.words == ["one", "half"]
    chat.page.unroute("**/v1/chat/completions")
    book.tell("one", " and whole")
    chat.page.get_by_role("button", name="Continue").click()
    chat.wait()
    assert chat.words == ["one", "half and whole"]


@pytest.mark.parametrize(
    ("status", "headers", "body", "shown"),
    [
        (429, {"retry-after": "7"}, '{"error": {"message": "busy"}}', "Try again in 7 s."),
        (429, {}, "<html>", "Try again in a moment."),
        (500, {}, '{"error": {"message": "<b>broken</b>"}}', "<b>broken</b>"),
        (502, {}, "<html><h1>Bad gateway</h1>", "HTTP 502"),
    ],
)
def test_refusals_are_told_in_words(chat, status, headers, body, shown):
    chat.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=status, headers=headers, body=body)
    )
    chat.send("one")
    expect(chat.page.locator(".failure")).to_contain_text(shown)
    expect(chat.page.get_by_role("button", name="Try again")).to_have_count(1)
    expect(chat.page.get_by_role("button", name="Ask again")).to_have_count(0)
    forget(chat, "Failed to load")


def test_a_key_that_ran_out_is_asked_for_and_the_words_stay(chat, book):
    chat.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=401, body='{"error": {"message": "no"}}')
    )
    chat.send("one", waits=False)
    expect(chat.page.get_by_role("dialog", name="API key")).to_be_visible()
    chat.page.unroute("**/v1/chat/completions")
    chat.page.fill("#asked", "new")
    chat.page.press("#asked", "Enter")
    chat.page.get_by_role("button", name="Try again").click()
    chat.wait()
    assert chat.words[0] == "one"
    expect(chat.page.locator(".failure")).to_have_count(0)


def test_a_call_that_was_stopped_within_its_arguments_does_not_block_the_conversation(chat, book):
    parts = [
        {"role": "assistant", "content": "I look.", "tool_calls": [{"index": 0, "id": "c", "function": {"name": "weather", "arguments": '{"ci'}}]}
    ]  # fmt: skip
    body = "".join(
        "data: " + json.dumps({"choices": [{"index": 0, "delta": part, "finish_reason": None}]}) + "\n\n"
        for part in parts
    )
    chat.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    chat.send("one")
    expect(chat.page.locator(".card")).to_contain_text("Calls weather")
    expect(chat.page.locator(".result-form")).to_have_count(0)
    chat.page.unroute("**/v1/chat/completions")
    book.tell("two", "fine")
    chat.send("two")
    assert chat.words == ["one", "I look.", "two", "fine"]
    expect(chat.page.locator(".failure")).to_have_count(1)  # the first one's


def test_editing_while_an_answer_runs_sends_the_words(chat, book):
    book.tell("one", "half, whole", waits_after="half")
    book.tell("two", "other")
    chat.send("one", waits=False)
    expect(chat.page.locator(".running")).to_contain_text("half")
    chat.page.locator(".reader").hover()
    chat.page.get_by_role("button", name="Edit").click()
    chat.page.fill(".edit-area", "two")
    chat.page.press(".edit-area", "Enter")
    expect(chat.page.locator(".bubble")).to_have_text("two")
    chat.wait()
    assert chat.words == ["two", "other"]


@pytest.mark.parametrize(
    ("script", "shown"), [(NO_STORAGE, "keeps nothing"), (FULL, "storage is full")], ids=["none", "full"]
)
def test_without_a_place_to_keep_conversations_the_page_works_and_says_so(
    browser, told, tmp_path, script, shown
):
    server, book = told
    book.tell("one", "first")
    with chatting(browser, server.url) as chat:
        chat.page.add_init_script(script)
        chat.page.reload()
        chat.page.wait_for_selector("html[data-ready]")
        if script == NO_STORAGE:
            expect(chat.page.locator(".notice")).to_contain_text(shown)
        chat.send("one")
        if script == FULL:
            expect(chat.page.locator(".notice")).to_contain_text(shown)
            give_file(chat, tmp_path, conversations(2))
            expect(chat.page.locator(".notice")).to_contain_text("not taken")
            expect(chat.page.locator(".entry-name")).to_have_count(1)
        chat.page.click("#new")
        chat.send("one")
        expect(chat.page.locator(".entry-name")).to_have_count(2)
        chat.page.locator(".entry-name").last.click()
        assert chat.words == ["one", "first"]
        forget(chat, "QuotaExceeded", "full")
