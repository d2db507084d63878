"""Below the API: methods, connections, bytes that are no HTTP, proxies, keys as bytes, ports that are taken."""

import contextlib
import functools
import gzip
import json
import logging
import re
import socket

import httpx2
import pytest
from openai import OpenAI
from serve_running import DEFAULTS, running, wait_for

from internlm2.cli import serve as serve_command
from internlm2.cli.serve import ServeConfig
from internlm2.errors import ConfigError
from internlm2.serve.api.body import read_json
from internlm2.serve.keys import digest, read_keys
from internlm2.serve.server import bind, serve
from internlm2.serve.service import Service
from internlm2.serve.settings import ServeSettings

get, head, post, request = (
    functools.partial(each, timeout=60) for each in (httpx2.get, httpx2.head, httpx2.post, httpx2.request)
)
CHAT = json.dumps(
    {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "temperature": 0}
).encode()
HEAD = b"host: localhost\r\ncontent-type: application/json\r\n"
WEBSOCKET = (
    b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


def exchange(port: int, data: bytes, *, host: str = "127.0.0.1") -> bytes:
    """All that comes back until the server closes."""
    with socket.create_connection((host, port), timeout=20) as connection:
        connection.sendall(data)
        found = b""
        while more := connection.recv(65536):
            found += more
        return found


def request_of(body: bytes, *headers: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
    lines = b"".join(line + b"\r\n" for line in headers)
    return b"POST %b HTTP/1.1\r\n%bcontent-length: %d\r\n%b\r\n%b" % (path, HEAD, len(body), lines, body)


def error_in(answer: bytes) -> dict:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_head_is_get_without_the_body(tiny):
    for path in ("/health", "/ready", "/v1/models", "/version", "/metrics", "/"):
        got, whole = head(tiny.url + path), get(tiny.url + path)
        assert (got.status_code, got.content) == (200, b""), path
        assert got.headers["content-type"] == whole.headers["content-type"]
        assert int(got.headers["content-length"]) > 0
    text = get(f"{tiny.url}/metrics").text
    assert 'internlm2_requests_total{path="/version",status="200"}' in text


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("HEAD", "/v1/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("OPTIONS", "/v1/responses", "POST"),
        ("TRACE", "/health", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(tiny, method, path, allowed):
    got = request(method, tiny.url + path)
    assert got.status_code == 405
    assert got.headers["allow"] == allowed


@pytest.mark.parametrize(
    "data",
    [
        b"GET /v1/models HTTP/1.1\r\n\r\n",  # no host
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 70_000,
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\norigin: a\x0bb\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n12345",
        b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_bytes_that_are_no_request_are_refused_in_the_shape_of_all_errors(tiny, data):
    answer = exchange(tiny.port, data)
    assert answer.startswith(b"HTTP/1.1 400")
    assert error_in(answer)["code"] == "invalid_http"
    assert get(f"{tiny.url}/health").status_code == 200


def test_nonsense_after_an_answer_has_begun_ends_the_connection_quietly(tiny_llm, caplog):
    with running(tiny_llm, keys={"ann": digest("k")}) as server, caplog.at_level(logging.ERROR):
        start = b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + b"transfer-encoding: chunked\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(start)
            assert connection.recv(65536).startswith(b"HTTP/1.1 401")
            connection.sendall(b"zz\r\n")
            while connection.recv(65536):
                pass
        assert get(f"{server.url}/health").status_code == 200
    assert not caplog.records


def test_one_connection_more_than_allowed_is_told_so(tiny_llm):
    with running(tiny_llm, max_connections=3) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        wait_for(lambda: len(server.server.server_state.connections) == 3)
        answer = exchange(server.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in answer
        assert error_in(answer)["code"] == "too_many_connections"
        for each in held:
            each.close()
        wait_for(lambda: not server.server.server_state.connections)
        assert get(f"{server.url}/health").status_code == 200


def test_requests_sent_at_once_are_answered_in_order(tiny):
    stream = CHAT[:-1] + b', "stream": true}'
    last = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    answer = exchange(tiny.port, request_of(CHAT) + request_of(stream) + request_of(b"[]") + last)
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"200", b"400", b"200"]
    kinds = (b'"chat.completion",', b'"chat.completion.chunk"', b"data: [DONE]", b'"object":"list"')
    places = [answer.index(kind) for kind in kinds]
    assert places == sorted(places)


def test_a_websocket_is_answered_by_http_without_noise_in_the_log(tiny, caplog):
    with caplog.at_level(logging.WARNING):
        ask = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n" + WEBSOCKET + b"\r\n"
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=20) as connection:
            connection.sendall(ask)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert not caplog.records


def test_what_a_proxy_adds_changes_nothing(tiny):
    """Who may ask is told by the Host header and the key, never by a header that anybody can send."""
    forged = {"x-forwarded-host": "localhost", "x-forwarded-for": "127.0.0.1", "x-forwarded-proto": "https"}
    got = get(f"{tiny.url}/v1/models", headers={"host": "evil.example"} | forged)
    assert got.status_code == 403
    odd = b"x-forwarded-for: \xff, 1.2.3\r\nx-forwarded-proto: \xfe\r\nforwarded: for=;x\r\n"
    answer = exchange(
        tiny.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" + odd + b"\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 200")


def test_ids_of_requests_are_the_servers_own(tiny):
    ids = {
        get(f"{tiny.url}/health", headers={"x-request-id": "mine"}).headers["x-request-id"] for _ in range(3)
    }
    assert len(ids) == 3
    assert all(re.fullmatch(r"[0-9a-f]{24}", each) for each in ids)


def test_a_compressed_body_is_refused_by_name(tiny):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    got = post(f"{tiny.url}/v1/completions", content=gzip.compress(CHAT), headers=headers)
    assert (got.status_code, got.json()["error"]["code"]) == (415, "unsupported_content_encoding")
    headers["content-encoding"] = "identity"
    assert post(f"{tiny.url}/v1/chat/completions", content=CHAT, headers=headers).status_code == 200


def test_a_hundred_megabytes_are_not_waited_for(tiny):
    for header in (b"expect: 100-continue", b"x: y"):
        ask = b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + b"content-length: 100000000\r\n" + header
        assert exchange(tiny.port, ask + b"\r\n\r\n").startswith(b"HTTP/1.1 413")
    with contextlib.suppress(httpx2.TransportError):  # it closes while the rest is on its way
        assert post(f"{tiny.url}/tokenize", content=b"x" * 100_000_000).status_code == 413
    assert get(f"{tiny.url}/health").status_code == 200


def test_what_is_read_as_json_can_be_written_again():
    assert read_json(b'\xef\xbb\xbf{"a": 1, "a": 2}') == {"a": 2}  # a mark of bytes; the last of two names
    assert read_json(rb'"\ud83d\ude42 \\ud800"') == "🙂 \\ud800"
    assert read_json(b"[1e308, -0.0, 123456789012345678901234567890]")[2] == 123456789012345678901234567890


def test_a_key_may_hold_any_letters(tiny_llm):
    with running(tiny_llm, keys={"ann": digest("ключ 密")}) as server:
        for given, status in (("ключ 密", 200), ("ключ", 401)):
            headers = {"authorization": b"Bearer " + given.encode()}
            assert get(f"{server.url}/v1/models", headers=headers).status_code == status


def test_the_key_of_the_environment_takes_nobodys_place(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbfenvironment sha256:" + digest("a").hex().encode() + b"\r\n# end\r\n")
    assert read_keys(path) == {"environment": digest("a")}
    monkeypatch.setenv(serve_command.KEY_VARIABLE, " b\n")
    keys = serve_command._settings("demo", ServeConfig(keys=str(path))).keys
    assert sorted(keys.values()) == sorted([digest("a"), digest("b")])
    monkeypatch.setenv(serve_command.KEY_VARIABLE, " \n")
    with pytest.raises(ConfigError, match="holds only blanks"):
        serve_command._settings("demo", ServeConfig())


def test_ipv6_with_and_without_brackets(tiny_llm):
    for host in ("::1", "[::1]"):
        with running(tiny_llm, host=host, defaults=DEFAULTS) as server:
            url = f"http://[::1]:{server.port}"
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            assert client.models.list().data[0].id == "tiny"
            assert get(f"{url}/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_two_servers_that_start_at_once_on_one_port(tiny_llm):
    """Both may bind before one listens: the second is told then, not by a traceback."""
    with bind(ServeSettings(port=0)) as first:
        port = first.getsockname()[1]
        settings = ServeSettings(port=port)
        with bind(settings) as second:
            first.listen()
            with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1:{port}"):
                serve(Service.of(tiny_llm, settings), second)


def test_a_text_beyond_the_context_is_told_as_such_everywhere(tiny):
    for path, body in (
        ("/v1/embeddings", {"input": ["x", "long " * 600]}),
        ("/v1/completions", {"prompt": "long " * 600}),
        ("/v1/responses", {"input": "long " * 600}),
    ):
        error = post(tiny.url + path, json=body).json()["error"]
        assert error["code"] == "context_length_exceeded", path
        assert "maximum context length is 512 tokens" in error["message"]
    fits = post(f"{tiny.url}/v1/embeddings", json={"input": [[100] * 512]})
    assert fits.status_code == 200
