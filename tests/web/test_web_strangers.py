"""Files and addresses from strangers: large, broken, hostile; and what the page makes of them."""

import base64
import json

import pytest
from page_browser import conversations, forget, give_file
from playwright.sync_api import expect

from internlm2.agent import Agent, Picture, Reply, ScriptedModel, ToolCall, ToolResult, TranscriptWriter, tool

pytestmark = pytest.mark.slow
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="


def test_a_file_of_five_megabytes_and_three_hundred_conversations_is_taken_at_once(chat, tmp_path):
    chat.page.evaluate(
        "window.drawn = 0; new MutationObserver(() => { window.drawn += 1; }).observe(document.getElementById('conversations'), {childList: true})"
    )
    give_file(chat, tmp_path, conversations(300, words="word " * 3500))
    expect(chat.page.locator(".notice")).to_have_text("Conversations added: 300.")
    expect(chat.page.locator(".entry-name")).to_have_count(300)
    assert chat.page.evaluate("window.drawn") < 10
    assert chat.words[0] == "question 0"
    chat.page.reload()
    expect(chat.page.locator(".entry-name")).to_have_count(300)
    chat.page.fill("#search", "title 299")
    expect(chat.page.locator(".entry-name")).to_have_text(["title 299"])


@pytest.mark.parametrize(
    "content",
    ["", "{", "[[[[", '{"format": "x"}', "\x00\x01", '[{"role": "user", "content": 1}]', "[" * 100_000],
)
def test_a_broken_file_is_refused_and_changes_nothing(chat, tmp_path, content):
    give_file(chat, tmp_path, content)
    expect(chat.page.locator(".notice.problem")).to_contain_text("not taken")
    expect(chat.page.locator(".entry-name")).to_have_count(0)


def test_words_in_every_field_of_a_file_stay_words(chat, tmp_path):
    evil = "<img src=x onerror=alert(1)>\"'${alert(1)}</script><script>alert(1)</script>javascript:alert(1)"
    call = {"id": evil, "function": {"name": evil, "arguments": json.dumps({evil: evil})}}
    picture = {"type": "image_url", "image_url": {"url": f"javascript:alert(1)//{evil}"}}
    vector = {"type": "image_url", "image_url": {"url": "data:image/svg+xml,<svg onload=alert(1)>"}}
    messages = [
        {"role": "system", "content": evil},
        {"role": "user", "content": evil, "name": evil},
        {
            "role": "assistant",
            "content": evil,
            "tool_calls": [call],
            "model": evil,
            "error": evil,
            "finish": evil,
        },
        {
            "role": "tool",
            "tool_call_id": evil,
            "name": evil,
            "content": [{"type": "text", "text": evil}, picture, vector],
        },
        {"role": "environment", "name": evil, "content": [picture]},
        {
            "role": "assistant",
            "content": f"[{evil}](javascript:alert(1)) ![x](data:text/html,{evil}) ```{evil}\n{evil}\n```",
        },
    ]
    give_file(chat, tmp_path, messages)
    expect(chat.page.locator(".card")).to_have_count(2)
    chat.page.locator(".card summary").first.click()
    chat.page.locator(".entry .icon-button").click()
    chat.page.get_by_role("menuitem", name="Delete").click()
    expect(chat.page.get_by_role("dialog")).to_contain_text("<img src=x")
    assert chat.page.locator("#thread script, #thread img, dialog img, #thread [onerror]").count() == 0
    assert (
        chat.page.evaluate(
            "[...document.querySelectorAll('#thread a')].filter((a) => a.protocol === 'javascript:').length"
        )
        == 0
    )


def test_the_transcript_of_an_agent_is_shown(chat, tmp_path):
    @tool
    def draw(what: str) -> ToolResult:
        """Draw."""
        return ToolResult(f"drew {what}", (Picture("image/png", base64.b64decode(PIXEL)),))

    script = [Reply("Look:", (ToolCall("1", "draw", '{"what": "<b>a cat</b>"}'),)), "That is a **cat**."]
    with TranscriptWriter(tmp_path / "run.jsonl") as writer:
        Agent(ScriptedModel(script), [draw]).run("A cat?", listeners=[writer])
    chat.page.set_input_files("#file", tmp_path / "run.jsonl")
    expect(chat.page.locator(".card")).to_contain_text("Calls draw")
    expect(chat.page.locator(".card")).to_contain_text("drew <b>a cat</b>")
    expect(chat.page.locator(".prose strong")).to_have_text("cat")
    assert chat.page.evaluate("document.querySelector('.card img').naturalWidth") == 1


def test_what_an_address_says_behind_the_hash_is_nothing_to_the_page(chat):
    chat.page.goto(chat.url + "/?q=<script>alert(1)</script>#<img src=x onerror=alert(1)>")
    chat.page.wait_for_selector("html[data-ready]")
    expect(chat.page.locator("#empty")).to_be_visible()
    assert "onerror" not in chat.page.content()


def test_a_file_name_is_made_of_letters_and_digits(chat, tmp_path):
    file = conversations(1)
    file["conversations"][0]["title"] = '../../etc/passwd\x00 <b>"报告"'
    give_file(chat, tmp_path, file)
    chat.page.locator(".entry .icon-button").click()
    with chat.page.expect_download() as found:
        chat.page.get_by_role("menuitem", name="Export").click()
    assert found.value.suggested_filename == "etc-passwd-b-报告.json"


def test_two_thousand_messages_are_drawn_once_and_kept(chat, book, tmp_path):
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": f"**message** {n} with `code` and $x_{n}$"}
        for n in range(2000)
    ]
    give_file(chat, tmp_path, messages)
    expect(chat.page.locator(".message")).to_have_count(2000)
    chat.page.evaluate(
        "document.querySelectorAll('.message').forEach((each) => { each.dataset.kept = 'yes'; })"
    )
    chat.page.evaluate("window.moved = 0; new MutationObserver((all) => { for (const each of all) window.moved += each.removedNodes.length; })"
                       ".observe(document.getElementById('thread'), {childList: true})")  # fmt: skip
    book.tell("more", "the end")
    chat.send("more")
    expect(chat.page.locator(".message")).to_have_count(2002)
    assert chat.page.locator("[data-kept]").count() >= 1999
    assert chat.page.evaluate("window.moved") < 10
    forget(chat, "Failed to load")  # so many do not fit into the model's context
