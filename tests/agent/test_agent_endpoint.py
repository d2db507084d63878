"""The same loop over HTTP: a server that misbehaves, and our own."""

import json
import socket
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from internlm2 import LLM, SamplingParams
from internlm2.agent import Agent, EndpointModel, Limits, tool
from internlm2.agent.model import Ask, ContextFullError, ModelError
from internlm2.serve.server import Server, bind
from internlm2.serve.service import Service
from internlm2.serve.settings import ServeSettings


@tool
def weather(city: str, days: int = 1) -> str:
    """The weather."""
    return f"sunny in {city}"


@pytest.fixture
def server():
    """Answers what it is told: a list of (status, body or bytes, headers)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            made.seen.append((self.path, dict(self.headers), json.loads(self.rfile.read(length))))
            status, body, headers = made.script.pop(0)
            if status == 0:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.seen, made.script = [], []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    made.url = f"http://127.0.0.1:{made.server_port}/v1"
    yield made
    made.shutdown()
    made.server_close()


def said(content=None, *, tool_calls=None, reason="stop", usage=(3, 2)):
    message = {"role": "assistant", "content": content, "tool_calls": tool_calls}
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, {"choices": [{"message": message, "finish_reason": reason}], "usage": counts}, {}


def test_an_endpoint_runs_the_same_loop(server):
    made = {"id": "theirs", "type": "function", "function": {"name": "weather", "arguments": '{"city": "B"}'}}
    server.script = [said("", tool_calls=[made], reason="tool_calls"), said("fine")]
    model = EndpointModel(server.url, "m", api_key="k", options={"temperature": 0})
    outcome = Agent(model, [weather], system="S", constrain=True).run("?")
    assert (outcome.answer, outcome.prompt_tokens, outcome.output_tokens) == ("fine", 6, 4)
    path, headers, body = server.seen[1]
    assert (path, headers["Authorization"], body["model"], body["temperature"]) == (
        "/v1/chat/completions",
        "Bearer k",
        "m",
        0,
    )
    assert body["tools"] == [{"type": "function", "function": {**weather.function, "strict": True}}]
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "tool"]
    assert body["messages"][2]["tool_calls"][0]["id"] == body["messages"][3]["tool_call_id"] == "call_0"


def test_passing_faults_are_tried_again(server):
    pauses = []
    server.script = [(503, "busy", {}), (429, "slow", {"Retry-After": "7"}), (0, "", {}), said("ok")]
    model = EndpointModel(server.url, "m", pause=pauses.append)
    assert model.respond(Ask([{"role": "user", "content": "?"}])).text == "ok"
    assert pauses == [1.0, 7.0, 4.0]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((401, {"error": "key"}, {}), ModelError, "answered 401"),
        ((302, "", {"Location": "http://127.0.0.1:1/"}), ModelError, "answered 302"),
        (
            (400, {"error": {"code": "context_length_exceeded"}}, {}),
            ContextFullError,
            "context_length_exceeded",
        ),
        ((200, b"no json", {}), ModelError, "no JSON"),
        ((200, b"[" * 100_000, {}), ModelError, "no JSON"),
        ((200, [1], {}), ModelError, "no JSON object"),
        ((200, {"choices": []}, {}), ModelError, "no message"),
        ((200, {"choices": [{"message": None}]}, {}), ModelError, "no message"),
    ],
)
def test_hopeless_answers_are_errors(server, answer, error, message):
    server.script = [answer]
    with pytest.raises(error, match=message):
        EndpointModel(server.url, "m").respond(Ask([{"role": "user", "content": "?"}]))
    assert len(server.seen) == 1


def test_odd_answers_are_made_sound(server):
    odd = [
        {"function": {"name": "weather", "arguments": {"city": "x"}}},
        {"type": "custom"},
        3,
        {"function": {"name": 1}},
    ]
    server.script = [said("half \ud800", tool_calls=odd, reason="length")]
    reply = EndpointModel(server.url, "m").respond(Ask([{"role": "user", "content": "?"}]))
    assert (reply.text, reply.finish_reason) == ("half ?", "length")
    assert [(c.name, c.arguments) for c in reply.calls] == [("weather", '{"city": "x"}')]
    assert len(reply.problems) == 3


def test_an_endpoint_that_is_not_there_is_told():
    model = EndpointModel("http://127.0.0.1:1/v1", "m", pause=lambda _: None)
    with pytest.raises(ModelError, match=r"No answer from http://127\.0\.0\.1:1/v1/chat/completions"):
        model.respond(Ask([{"role": "user", "content": "?"}]))
    for url in ("ftp://x", "http://user:pw@host/v1", "host:80", "http://h/v1?k=1"):
        with pytest.raises(ModelError, match="must be like"):
            EndpointModel(url, "m")


def test_the_environment_becomes_a_user_for_openai(server):
    server.script = [said("x", tool_calls=[{"function": {}}]), said("ok")]
    Agent(EndpointModel(server.url, "m"), [weather]).run("?")
    assert [m["role"] for m in server.seen[1][2]["messages"]] == ["user", "assistant", "user"]


def test_our_own_server_runs_the_loop(official_folder):
    """Through the real server over HTTP: tools are offered and constrained, and an answer comes."""
    llm = LLM(official_folder, dtype="float32", memory_gib=0.02, max_num_seqs=4, max_model_len=1024)
    settings = ServeSettings(
        port=0, model_name="tiny", defaults=SamplingParams(max_tokens=250, temperature=0.0)
    )
    with ExitStack() as stack:
        listener = stack.enter_context(bind(settings))
        running = Server(Service.of(llm, settings))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        stack.callback(thread.join, 60)
        stack.callback(setattr, running, "should_exit", True)
        while not running.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        model = EndpointModel(url, "tiny")
        one = Agent(
            EndpointModel(url, "tiny", options={"max_tokens": 12}),
            [weather],
            constrain=True,
            limits=Limits(turns=2),
        ).run("How is it?")
        assert one.prompt_tokens > 20
        schema = {
            "type": "object",
            "properties": {"x": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        }
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Action Input:\n"}]
        reply = model.respond(Ask(messages, json_schema=schema, continues=True))
        assert isinstance(json.loads(reply.text)["x"], bool)
        with pytest.raises(ContextFullError):
            model.respond(Ask([{"role": "user", "content": "word " * 5000}]))
    assert not thread.is_alive()
