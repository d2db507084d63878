"""Who may ask, from where, and what the log and the counters tell."""

import logging
import re

import httpx2
import openai
import pytest
from serve_running import DEFAULTS, running, wait_for

from internlm2.errors import ConfigError
from internlm2.serve.app import create_app
from internlm2.serve.keys import add_key, digest, owner, read_keys
from internlm2.serve.service import Service
from internlm2.serve.settings import ServeSettings

MESSAGES = [{"role": "user", "content": "a secret word"}]


@pytest.fixture(scope="module")
def locked(tiny_llm, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    key = add_key(path, "ann")
    with running(
        tiny_llm, keys=read_keys(path), cors_origins=("https://page.example",), defaults=DEFAULTS
    ) as server:
        yield server, key


def test_a_key_opens_and_its_file_does_not_hold_it(locked, tmp_path):
    server, key = locked
    assert server.client(api_key=key).models.list().data
    path = tmp_path / "keys"
    first, second = add_key(path, "ann"), add_key(path, "bob")
    assert first != second
    assert first not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    keys = read_keys(path)
    assert tuple(owner(keys, each.encode()) for each in (first, second, first[:-1])) == ("ann", "bob", None)
    assert owner(keys, b"\xff\xed\xa0\x80") is None
    assert keys["ann"] == digest(first)


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", "Basic abc", "Bearer \xff"])
def test_without_a_key_nothing_opens_but_health(locked, given):
    server, _ = locked
    headers = {"authorization": given.encode("latin-1")} if given else {}
    paths = ["/v1/models", "/metrics", "/version", "/openapi.json", "/docs", "/v1/nothing", "/v1/responses"]
    for path in paths:
        got = httpx2.get(server.url + path, headers=headers)
        assert got.status_code == 401, path
        assert got.json()["error"]["code"] == "invalid_api_key"
        assert got.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready"):
        assert httpx2.get(server.url + path, headers=headers).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").chat.completions.create(model="tiny", messages=MESSAGES)


def test_the_body_of_a_stranger_is_not_even_read(locked):
    server, _ = locked
    import socket

    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/responses HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# only a remark\n", "holds no key"),
        ("ann sk-internlm2-plain", "line 1: not `NAME sha256"),
        (f"a sha256:{'0' * 64}\na sha256:{'1' * 64}", "line 2: 'a' has a key already"),
    ],
)
def test_bad_key_files_say_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_keys(path)


def test_key_files_that_are_missing_and_names_that_are_taken(tmp_path):
    with pytest.raises(ConfigError, match="Cannot read the keys"):
        read_keys(tmp_path / "none")
    add_key(tmp_path / "keys", "ann")
    with pytest.raises(ConfigError, match="has a key of 'ann' already"):
        add_key(tmp_path / "keys", "ann")
    with pytest.raises(ConfigError, match="must be 1 to 64 letters"):
        add_key(tmp_path / "keys", "two words")


def test_a_web_page_that_pretends_to_be_this_machine_is_refused(tiny, tiny_llm):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        got = httpx2.get(f"{tiny.url}/v1/models", headers={"host": host})
        assert got.status_code == 403
        assert got.json()["error"]["code"] == "host_not_allowed"
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000", "[::1]"):
        assert httpx2.get(f"{tiny.url}/v1/models", headers={"host": host}).status_code == 200
    with running(tiny_llm, allowed_hosts=("llm.example",)) as server:
        got = httpx2.get(f"{server.url}/v1/models", headers={"host": "llm.example:443"})
        assert got.status_code == 200


def test_pages_of_other_servers_may_call_only_where_named(tiny, locked):
    server, key = locked
    origin = {"origin": "https://page.example"}
    ask = origin | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    got = httpx2.options(f"{server.url}/v1/chat/completions", headers=ask)
    assert got.headers["access-control-allow-origin"] == "https://page.example"
    refused = httpx2.get(f"{server.url}/v1/models", headers=origin)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (
        401,
        "https://page.example",
    )
    other = httpx2.get(
        f"{server.url}/v1/models", headers={"origin": "https://x", "authorization": f"Bearer {key}"}
    )
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in httpx2.get(f"{tiny.url}/v1/models", headers=origin).headers
    # a form of a page, which needs no permission, is not read as JSON
    form = httpx2.post(
        f"{tiny.url}/v1/completions", content='{"prompt": "x"}', headers={"content-type": "text/plain"}
    )
    assert form.status_code == 400
    assert "content-type: application/json" in form.json()["error"]["message"]


def test_the_log_tells_who_and_how_much_but_not_what(locked, caplog):
    server, key = locked
    with caplog.at_level(logging.INFO, logger="internlm2"):
        got = server.client(api_key=key).chat.completions.create(model="tiny", messages=MESSAGES)
        wait_for(lambda: any(r.name == "internlm2.serve.guard" for r in caplog.records))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "internlm2.serve.guard"]
    assert re.match(
        r"POST /v1/chat/completions 200 \d+\.\d{3} s key=ann in=\d+ out=16 id=[0-9a-f]{24}$", line
    )
    assert got._request_id in line
    assert "secret" not in caplog.text
    assert key not in caplog.text


def test_prompts_are_logged_where_asked_for(tiny_llm, caplog):
    with (
        caplog.at_level(logging.INFO, logger="internlm2"),
        running(tiny_llm, logs_prompts=True, defaults=DEFAULTS) as server,
    ):
        stream = server.client().chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in stream)
    assert "a secret word" in caplog.text
    assert any(r.getMessage().endswith(text) for r in caplog.records)


def test_the_counters_count(tiny):
    def numbers() -> dict[str, float]:
        text = httpx2.get(f"{tiny.url}/metrics").text
        return {k: float(v) for k, v in re.findall(r"^(\S+) (\S+)$", text, flags=re.M)}

    before = numbers()
    tiny.client().chat.completions.create(model="tiny", messages=MESSAGES)
    httpx2.get(f"{tiny.url}/some/path")
    after = numbers()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('internlm2_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert grown('internlm2_requests_total{path="other",status="404"}') == 1
    assert grown("internlm2_output_tokens_total") == 16
    assert grown("internlm2_first_token_seconds_count") == 1
    assert grown('internlm2_request_seconds_count{path="/v1/chat/completions"}') == 1
    assert after["internlm2_open_answers"] == after["internlm2_pages_held"] == 0


def test_the_page_is_served_when_it_is_there(tiny_llm, tmp_path):
    import asyncio

    from httpx2 import ASGITransport, AsyncClient

    (tmp_path / "index.html").write_text("<p>hello</p>")
    (tmp_path / "page.js").write_text("1")
    keys = {"a": digest("x")}
    app = create_app(Service.of(tiny_llm, ServeSettings(keys=keys)), web_folder=tmp_path)

    async def go():
        async with AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as client:
            page, script = await client.get("/"), await client.get("/web/page.js")
            outside = await client.get("/web/..%2f..%2fetc/passwd")
            return page, script, outside

    page, script, outside = asyncio.run(go())
    assert page.text == "<p>hello</p>"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert script.text == "1"
    assert outside.status_code in (404, 405)


def test_the_description_of_the_api_is_there_without_other_hosts(tiny):
    schema = httpx2.get(f"{tiny.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/responses", "/v1/rank", "/metrics"} <= set(schema["paths"])
    assert "422" not in schema["paths"]["/v1/completions"]["post"]["responses"]
    page = httpx2.get(f"{tiny.url}/docs").text
    assert "POST /v1/chat/completions" in page
    assert "http://" not in page
    assert "https://" not in page
    assert httpx2.get(f"{tiny.url}/version").json()["version"]
