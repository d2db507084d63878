"""Too much, too slow, gone: the right status, and nothing left in the engine."""

import asyncio
import json
import socket
import threading
import time

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from serve_running import DEFAULTS, assert_idle, running, wait_for

from internlm2 import AsyncLLM, SamplingParams
from internlm2.errors import ConfigError
from internlm2.serve.events import EventStream
from internlm2.serve.gate import Gate
from internlm2.serve.guard import Exchange
from internlm2.serve.keys import digest
from internlm2.serve.settings import ServeSettings

MESSAGES = [{"role": "user", "content": "Hello"}]
LONG = {"model": "tiny", "messages": MESSAGES, "max_tokens": 400, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def slow(tiny_llm, monkeypatch):
    """Every step takes at least 20 ms, so that answers last."""
    real = tiny_llm.frontend.engine.runner.forward

    def forward(batch):
        time.sleep(0.02)
        return real(batch)

    monkeypatch.setattr(tiny_llm.frontend.engine.runner, "forward", forward)
    return tiny_llm


def started(client, **changes):
    """A stream whose first text has come."""
    stream = client.chat.completions.create(**LONG | {"stream": True} | changes)
    iterator = iter(stream)
    while not next(iterator).choices[0].delta.content:
        pass
    return stream, iterator


def test_a_full_queue_answers_429_with_a_time_and_goes_on(slow):
    with running(slow, max_running=1, max_queue=1, defaults=DEFAULTS) as server:
        client = server.client()
        one, _ = started(client)
        two = client.chat.completions.create(**LONG | {"stream": True})
        with pytest.raises(openai.RateLimitError) as found:
            client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert found.value.code == "server_busy"
        assert 1 <= int(found.value.response.headers["retry-after"]) <= 60
        assert httpx2.get(f"{server.url}/health").status_code == 200
        with pytest.raises(openai.BadRequestError, match="asks for 3 answers, but 2 may be open at once"):
            client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, temperature=1)
        one.close()
        two.close()
        wait_for(lambda: server.service.gate.num_open == 0)
        assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1).choices


def test_each_key_has_its_share(slow):
    keys = {"ann": digest("key-a"), "bob": digest("key-b")}
    with running(slow, keys=keys, max_per_key=1, defaults=DEFAULTS) as server:
        ann, bob = (server.client(api_key=key) for key in ("key-a", "key-b"))
        stream, _ = started(ann)
        with pytest.raises(openai.RateLimitError, match="This key has 1 answers open already"):
            ann.chat.completions.create(model="tiny", messages=MESSAGES)
        assert bob.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2).choices
        stream.close()


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_a_client_that_leaves_a_stream_frees_its_pages(tiny, slow, path):
    body = {"model": "tiny", "stream": True}
    if path == "responses":
        body |= {"input": "x", "max_output_tokens": 400, "temperature": 0}  # drawn tokens may end it soon
    else:
        body |= {"max_tokens": 400, "ignore_eos": True}
        body |= (
            {"messages": MESSAGES}
            if path.startswith("chat")
            else {"prompt": ["x", "y"], "n": 2, "temperature": 1}
        )
    with (
        httpx2.Client() as client,
        client.stream("POST", f"{tiny.url}/v1/{path}", json=body, timeout=30) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()  # kept: a reader that is let go of closes the stream
        next(lines)
        wait_for(lambda: slow.frontend.engine.has_work)
    produced = slow.stats.num_output_tokens
    assert_idle(tiny.service)
    assert slow.stats.num_output_tokens - produced < 100


def test_a_client_that_leaves_a_plain_answer_frees_its_pages(tiny, slow):
    for path, body in (
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 400, "ignore_eos": True}),
        ("completions", {"prompt": "x", "max_tokens": 400, "ignore_eos": True}),
        ("embeddings", {"input": ["x" * 400] * 50}),
    ):
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{tiny.url}/v1/{path}", json=body, timeout=0.3)
        assert_idle(tiny.service)


def test_a_hundred_streams_at_once_are_all_answered_and_a_third_may_leave(tiny, tiny_llm):
    expected = tiny_llm.chat(MESSAGES, DEFAULTS).text

    async def go():
        client = AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="x", max_retries=0, timeout=120)

        async def one(n: int) -> str:
            stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            text = ""
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if n % 3 == 0 and text:
                    await stream.close()
                    return expected
            return text

        return await asyncio.gather(*map(one, range(100)))

    assert asyncio.run(go()) == [expected] * 100
    assert_idle(tiny.service)


def test_an_answer_that_takes_too_long_is_ended(slow):
    with running(slow, request_seconds=0.5, defaults=DEFAULTS) as server:
        client = server.client()
        with pytest.raises(openai.APIStatusError, match=r"not complete after 0\.5 s") as found:
            client.chat.completions.create(**LONG)
        assert found.value.status_code == 504
        assert found.value.response.headers["x-should-retry"] == "false"
        _, iterator = started(client)
        with pytest.raises(openai.APIError, match=r"not complete after 0\.5 s"):
            list(iterator)


def test_the_end_lets_open_answers_finish_and_takes_nothing_new(slow):
    with running(slow, drain_seconds=20, defaults=DEFAULTS) as server:
        client = server.client()
        _, iterator = started(client, max_tokens=60)
        kept = httpx2.Client()
        assert kept.get(f"{server.url}/ready").json() == {"status": "ready"}
        server.server.should_exit = True
        wait_for(lambda: server.service.gate.is_draining)
        with pytest.raises(httpx2.TransportError):
            kept.get(f"{server.url}/ready")  # nobody listens any more
        chunks = list(iterator)
        assert chunks[-1].choices[0].finish_reason == "length"
    assert not server.thread.is_alive()


def test_the_end_does_not_wait_for_ever(slow):
    with running(slow, drain_seconds=0.5, defaults=DEFAULTS) as server:
        _, iterator = started(server.client())
        server.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(iterator)
        server.stop()


def raw(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """What comes back on a connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        found = b""
        while data := connection.recv(65536):
            found += data
        return found


def head(*lines: str) -> bytes:
    return "\r\n".join(["POST /v1/completions HTTP/1.1", "host: localhost", *lines, "", ""]).encode()


def test_slow_clients_are_cut_off(tiny_llm):
    with running(tiny_llm, header_seconds=0.5, body_seconds=0.5, keep_alive_seconds=1) as server:
        began = time.monotonic()
        assert raw(server.port) == b""  # says nothing
        assert raw(server.port, b"POST /v1/comp") == b""  # half a head
        trickled = raw(server.port, head("content-type: application/json", "content-length: 100"), b"{")
        assert trickled.startswith(b"HTTP/1.1 408")
        assert b"The body did not come within 0.5 s" in trickled
        used = raw(server.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET /hea", pause=0.2)
        assert used.startswith(b"HTTP/1.1 200")  # the first was answered, the half one ended the connection
        assert time.monotonic() - began < 15
        assert httpx2.get(f"{server.url}/health").status_code == 200


def test_large_bodies_are_refused_told_or_not(tiny_llm):
    with running(tiny_llm, body_bytes=1000) as server:
        told = raw(server.port, head("content-type: application/json", "content-length: 100000000"))
        assert told.startswith(b"HTTP/1.1 413")
        chunked = raw(
            server.port,
            head("content-type: application/json", "transfer-encoding: chunked"),
            b"800\r\n" + b"x" * 0x800 + b"\r\n",
        )
        assert chunked.startswith(b"HTTP/1.1 413")
        assert json.loads(chunked.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"
        assert raw(server.port, head("content-length: " + "9" * 30)).startswith(b"HTTP/1.1 400")
        fits = httpx2.post(f"{server.url}/tokenize", json={"prompt": "x" * 900})
        assert fits.status_code == 200


def test_a_client_that_does_not_read_is_left_in_the_end():
    """The engine's request goes when the time is over, though not a byte can be sent."""
    closed = []

    async def events():
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            closed.append(True)

    async def go():
        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.sleep(3600)

        async def receive():
            await asyncio.sleep(3600)

        stream = EventStream(events(), Gate(ServeSettings(request_seconds=0.2)))
        scope = {"type": "http", "internlm2.exchange": Exchange("id")}
        await asyncio.wait_for(stream(scope, receive, send), 10)

    asyncio.run(go())
    assert closed == [True]


def test_the_end_of_a_request_lets_everything_go_that_it_held(slow):
    async def go():
        gate, exchange = Gate(ServeSettings()), Exchange("id")
        async with AsyncLLM.of(slow) as twin:
            exchange.slots.append(gate.enter("ann", 3))
            exchange.streams.append(
                await twin.open_stream("Hello", SamplingParams(max_tokens=300, ignore_eos=True))
            )
            await asyncio.to_thread(wait_for, lambda: slow.frontend._streams)
            assert gate.num_open == 3
            await exchange.close()
            assert not exchange.streams[0]._waiter.tickets[0].is_done
            assert gate.num_open == 0
            await asyncio.to_thread(wait_for, lambda: not slow.frontend._streams)
            await exchange.close()  # a second time changes nothing
            assert gate.num_open == 0

    asyncio.run(go())


def test_a_schema_that_takes_long_does_not_hold_up_others(tiny, tiny_llm, monkeypatch):
    real = tiny_llm.frontend.prepare

    def prepare(ids, params, **options):
        if params.json_schema is not None:
            time.sleep(1.0)
        return real(ids, params, **options)

    monkeypatch.setattr(tiny_llm.frontend, "prepare", prepare)
    client = tiny.client()
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
    thread = threading.Thread(
        target=client.chat.completions.create,
        kwargs={"model": "tiny", "messages": MESSAGES, "response_format": form},
    )
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    assert httpx2.get(f"{tiny.url}/health").status_code == 200
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1).choices
    assert time.monotonic() - began < 0.7
    thread.join()


def test_a_client_that_leaves_while_its_schema_is_compiled_leaves_nothing(tiny, tiny_llm, monkeypatch):
    real = tiny_llm.frontend.prepare

    def prepare(ids, params, **options):
        time.sleep(0.6)
        return real(ids, params, **options)

    monkeypatch.setattr(tiny_llm.frontend, "prepare", prepare)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{tiny.url}/v1/completions", json={"prompt": "x", "max_tokens": 300}, timeout=0.2)
    time.sleep(0.8)
    assert_idle(tiny.service)


def test_settings_that_cannot_be_meant_are_refused():
    cases = [
        ({"host": "0.0.0.0"}, "0.0.0.0 can be reached by others, and no key is asked for"),
        ({"host": "192.168.1.5"}, "--insecure"),
        ({"port": 70000}, "port is 70000"),
        ({"max_running": 0}, "max_running is 0"),
        ({"max_queue": -1}, "max_queue is -1"),
        ({"request_seconds": 0}, "request_seconds is 0"),
        ({"drain_seconds": -1}, "drain_seconds is -1"),
        ({"model_name": ""}, "The served name is empty"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            ServeSettings(**options)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert ServeSettings(host=host).is_loopback
    assert ServeSettings(host="0.0.0.0", insecure=True, defaults=SamplingParams()).host == "0.0.0.0"
    assert ServeSettings(host="::", keys={"a": digest("x")}).keys
