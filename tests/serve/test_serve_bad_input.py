"""Whatever is sent, the answer is a clear 4xx in OpenAI's shape, and the server goes on."""

import json

import httpx2
import pytest

from internlm2.serve.errors import ApiError

MESSAGE = {"role": "user", "content": "x"}
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def chat(**changes) -> bytes:
    return json.dumps({"messages": [MESSAGE]} | changes).encode()


TABLE = {
    "broken JSON": (CHAT, b'{"messages": [', 400, "The body is not JSON"),
    "no body": (CHAT, b"", 400, "must be a JSON object"),
    "a list": (CHAT, b"[]", 400, "must be a JSON object"),
    "a number": (CHAT, b"3", 400, "must be a JSON object"),
    "null": (CHAT, b"null", 400, "must be a JSON object"),
    "not UTF-8": (
        CHAT,
        b'{"messages": "\xff\xfe"}',
        400,
        "The body is not UTF-8: invalid start byte, at byte 14",
    ),
    "deep nesting": (CHAT, b"[" * 100_000 + b"]" * 100_000, 400, "nested too deeply"),
    "deep nesting in a tool": (
        CHAT,
        chat().replace(b"}]}", b'}], "tools": ' + b'[{"a":' * 400 + b"1" + b"}]" * 400 + b"}"),
        400,
        "nested too deeply",
    ),
    "no messages": (CHAT, b"{}", 400, "messages"),
    "empty messages": (CHAT, chat(messages=[]), 400, "messages"),
    "a message that is a text": (CHAT, chat(messages=["x"]), 400, "messages.0"),
    "an unknown role": (CHAT, chat(messages=[{"role": "king", "content": "x"}]), 400, "messages.0.role"),
    "an unknown field of a message": (CHAT, chat(messages=[MESSAGE | {"x": 1}]), 400, "messages.0.x"),
    "a picture": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "This model reads text only",
    ),
    "no content": (CHAT, chat(messages=[{"role": "user"}]), 400, "has no content"),
    "a lone surrogate": (
        CHAT,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        "lone surrogate",
    ),
    "a lone surrogate in a tool": (
        CHAT,
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": '
        b'{"name": "f", "parameters": {"\\ud800": 1}}}], "tool_choice": "required"}',
        400,
        None,
    ),
    "a lone surrogate as a field": (CHAT, b'{"\\ud800": 1}', 400, "lone surrogate"),
    "a lone surrogate in bytes": (
        CHAT,
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        400,
        "not UTF-8",
    ),
    "UTF-16": (CHAT, chat().decode().encode("utf-16"), 400, "not UTF-8"),
    "minus infinity in a tool": (
        RESPONSES,
        b'{"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"minimum": -Infinity}}]}',
        400,
        "The body holds -Infinity",
    ),
    "a lone surrogate in metadata": (
        RESPONSES,
        b'{"input": "x", "metadata": {"a": "\\uDbff"}}',
        400,
        "lone surrogate",
    ),
    "a temperature in quotes": (CHAT, chat(temperature="0.5"), 400, "'temperature'"),
    "a negative temperature": (CHAT, chat(temperature=-1), 400, "'temperature'"),
    "NaN": (
        CHAT,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        400,
        "The body holds NaN, which JSON has not",
    ),
    "a huge number": (
        CHAT,
        b'{"messages": [{"role": "user", "content": "x"}], "top_p": 1e999}',
        400,
        "the number 1e999, which is beyond every float",
    ),
    "a number of many digits": (
        CHAT,
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        400,
        "a number of too many digits",
    ),
    "max_tokens 0": (CHAT, chat(max_tokens=0), 400, "'max_tokens'"),
    "max_tokens true": (CHAT, chat(max_tokens=True), 400, "'max_tokens'"),
    "a tool by a bad name": (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "a b"}}]),
        400,
        "Invalid value for 'tools.0.function.name'",
    ),
    "a choice of no kind": (
        CHAT,
        chat(tool_choice="must"),
        400,
        "Invalid value for 'tool_choice': Input should be 'none', 'auto' or 'required', or: Input should be a JSON object.",
    ),
    "n 1000": (CHAT, chat(n=1000), 400, "'n'"),
    "top_logprobs alone": (CHAT, chat(top_logprobs=2), 400, "top_logprobs needs logprobs=true"),
    "an empty stop": (CHAT, chat(stop=""), 400, "stop"),
    "functions": (CHAT, chat(functions=[{"name": "f"}]), 400, "functions is not supported"),
    "audio": (CHAT, chat(modalities=["text", "audio"]), 400, "modalities is not supported"),
    "a misspelt field": (CHAT, chat(max_token=3), 400, "Did you mean 'max_tokens'?"),
    "a schema without a schema": (CHAT, chat(response_format={"type": "json_schema"}), 400, "has no schema"),
    "an unknown form": (CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type"),
    "a schema that nothing matches": (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}),
        400,
        "cannot be followed",
    ),
    "ten thousand tools": (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": f"f{n}"}} for n in range(10_000)]),
        400,
        "'tools'",
    ),
    "a prompt that is a dict": (TEXT, b'{"prompt": {}}', 400, "prompt"),
    "ids with a text": (TEXT, b'{"prompt": [1, "x"]}', 400, None),
    "an id that is true": (TEXT, b'{"prompt": [true]}', 400, "prompt"),
    "a negative id": (TEXT, b'{"prompt": [-1]}', 400, "token id -1"),
    "a huge id": (TEXT, b'{"prompt": [' + b"9" * 400 + b"]}", 400, None),
    "three thousand texts": (TEXT, json.dumps({"prompt": ["x"] * 3000}).encode(), 400, "prompt"),
    "items of a wrong type": (RESPONSES, b'{"input": [1]}', 400, "input"),
    "no input": (RESPONSES, b"{}", 400, "input"),
    "an item without content": (RESPONSES, b'{"input": [{"role": "user"}]}', 400, "reads text only"),
    "a call without a name": (
        RESPONSES,
        b'{"input": [{"type": "function_call", "call_id": "c", "arguments": "{}"}]}',
        400,
        "must hold a function",
    ),
    "no such path": ("/v1/chat", chat(), 404, "There is no such path"),
    "a wrong method": ("/v1/models", b"{}", 405, "another method"),
    "a path of nonsense": ("/%ff%00/../x", b"{}", 404, "There is no such path"),
}


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_a_clear_refusal(tiny, tools, name):
    path, body, status, message = TABLE[name]
    for server in (tiny, tools):
        got = httpx2.post(
            server.url + path, content=body, headers={"content-type": "application/json"}, timeout=30
        )
        assert got.status_code == status, got.text
        error = got.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        if message is not None:
            assert message in error["message"]


def test_the_server_goes_on_after_all_of_it(tiny):
    got = httpx2.post(tiny.url + CHAT, content=chat(), headers={"content-type": "application/json"})
    assert got.status_code == 200


EXPLOSIONS = {
    "nested repeats": {"type": "string", "pattern": "((a{1,999}){1,999}){1,999}"},
    "ambiguous repeats": {"type": "string", "pattern": "(a|aa|aaa)*(a?a?a?){500}b"},
    "a large enum": {"enum": [f"word {n}" for n in range(20_000)]},
    "endless references": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "products": {"allOf": [{"anyOf": [{"minimum": n}, {"maximum": n}]} for n in range(24)]},
    "many required": {
        "type": "object",
        "properties": {f"p{n}": {"anyOf": [{"type": "string"}, {"$ref": "#"}]} for n in range(2000)},
        "required": [f"p{n}" for n in range(2000)],
    },
}


@pytest.mark.parametrize("name", EXPLOSIONS)
def test_schemas_that_explode_are_refused_or_done_soon(tiny, name):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": EXPLOSIONS[name]}}
    body = chat(response_format=form, max_tokens=3)
    got = httpx2.post(tiny.url + CHAT, content=body, headers={"content-type": "application/json"}, timeout=20)
    assert got.status_code in (200, 400), got.text


def test_what_a_client_wrote_comes_back_only_as_text_that_can_be_sent():
    error = ApiError(400, "no \ud800 here " + "x" * 5000, param="\udfff")
    sent = json.loads(error.response().body)["error"]
    assert sent["message"].startswith("no ? here x")
    assert len(sent["message"]) < 1100
    assert sent["param"] == "?"
