"""Models behind an endpoint: what is sent, what is read, what is tried again, and what ends the run."""

import socket
import threading
import time

import pytest
from endpoint_server import completion, echo, serving

from internlm2.endpoint import EndpointError
from internlm2.engine.llm import LLM
from internlm2.eval.backends.endpoint import NUM_TRIES, EndpointModel
from internlm2.eval.backends.engine import EngineModel
from internlm2.eval.model import Request
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import RunSettings, choose_questions
from internlm2.eval.run_folder import read_samples
from internlm2.eval.runner import evaluate
from internlm2.eval.task import ChatPrompt, TextPrompt, Turn
from serve.serve_running import running

TEXT = Request("gsm8k:0", TextPrompt("", "Question: 1?"), max_tokens=5, stop=("\n\n",))
CHAT = Request("gsm8k:1", ChatPrompt((), (Turn("user", "Hello"),)), max_tokens=5)
LABELS = Request("mmlu.anatomy:0", TextPrompt("", "Answer: "), ("A", "B"))


def model_of(url: str, waits: list[float] | None = None, **more) -> EndpointModel:
    return EndpointModel(url, "tiny", pause=(waits if waits is not None else []).append, **more)


def answer(model: EndpointModel, request: Request):
    ((same, found),) = model.answer([request])
    assert same is request
    return found


def test_text_is_completed_and_a_chat_is_answered_without_a_system_message():
    with serving(lambda path, body: (200, completion("42"))) as server:
        model = model_of(server.url + "/", api_key="secret")
        text, chat = answer(model, TEXT), answer(model, CHAT)
    for found in (text, chat):
        assert (found.text, found.finish_reason, found.prompt_tokens, found.output_tokens) == (
            "42",
            "stop",
            11,
            3,
        )
    assert [path for path, _, _ in server.seen] == ["/v1/completions", "/v1/chat/completions"]
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer secret"}
    common = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    assert server.bodies[0] == common | {"prompt": "Question: 1?", "stop": ["\n\n"]}
    assert server.bodies[1] == common | {"messages": [{"role": "user", "content": "Hello"}]}
    assert "secret" not in str(model.description)


def test_labels_are_compared_by_echoed_log_probabilities():
    def likely(token: str) -> float:
        return {"A": -3.0, "B": -1.0, "!": -100.0}.get(token, -0.5)

    with serving(lambda path, body: (200, echo(body["prompt"], likely))) as server:
        found = answer(model_of(server.url), LABELS)
    assert found.logprobs == {"A": -3.0, "B": -1.0}
    assert found.prompt_tokens == 2 * len("Answer: A")
    assert [body["prompt"] for body in server.bodies] == ["Answer: A", "Answer: B"]
    assert all(body["echo"] and body["logprobs"] == 1 for body in server.bodies)


def test_a_server_without_echo_cannot_compare_labels():
    told = r"does not give log-probabilities of a prompt .* Use --chat"
    with (
        serving(lambda path, body: (200, completion("A"))) as server,
        pytest.raises(EndpointError, match=told),
    ):
        answer(model_of(server.url), LABELS)


def test_log_probabilities_of_a_part_of_the_prompt_are_an_error():
    def part(path, body):
        reply = echo(body["prompt"], lambda _: -1.0)
        reply["choices"][0]["logprobs"]["token_logprobs"][3] = None
        return 200, reply

    with serving(part) as server:
        assert "log-probabilities of a part of the prompt only" in answer(model_of(server.url), LABELS).error


def test_what_may_pass_is_tried_again_after_a_while():
    left = [(429, {"error": "slow down"}), (503, b"")]
    with serving(
        lambda path, body: left.pop(0) if left else (200, completion("ok")), {"Retry-After": "7"}
    ) as server:
        waits: list[float] = []
        assert answer(model_of(server.url, waits), TEXT).text == "ok"
    assert waits == [7.0, 7.0]


def test_a_question_that_never_passes_fails_alone_with_growing_waits():
    def reply(path, body):
        return (500, {"error": "out of memory"}) if "prompt" in body else (200, completion("fine"))

    with serving(reply) as server:
        waits: list[float] = []
        found = {r.key: a for r, a in model_of(server.url, waits).answer([TEXT, CHAT])}
    assert found["gsm8k:1"].text == "fine"
    assert found["gsm8k:0"].error.startswith(f"The endpoint answered 500 after {NUM_TRIES} tries: ")
    assert "out of memory" in found["gsm8k:0"].error
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<html>", "The endpoint's reply is no JSON: b'<html>'."),
        ([], "The endpoint's reply is no JSON object"),
        ({"choices": []}, "The endpoint's reply holds no choice"),
        ({"choices": [{"text": 3}]}, "The endpoint's reply holds no text"),
    ],
)
def test_a_reply_that_is_none_is_an_error_of_the_question(content, told):
    with serving(lambda path, body: (200, content)) as server:
        assert told in answer(model_of(server.url), TEXT).error


def test_a_reply_without_bounds_is_an_error_of_the_question(monkeypatch):
    monkeypatch.setattr("internlm2.endpoint.MAX_REPLY_BYTES", 1 << 20)
    with serving(lambda path, body: (200, b"x" * (2 << 20))) as server:
        assert "reply is longer than 1 MiB" in answer(model_of(server.url), TEXT).error


def test_a_refused_question_is_not_tried_again():
    with serving(lambda path, body: (400, {"error": "too long"})) as server:
        waits: list[float] = []
        assert answer(model_of(server.url, waits), TEXT).error == (
            'The endpoint answered 400: {"error": "too long"}.'
        )
    assert waits == []


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_address_ends_the_run(status):
    told = rf"answered {status}: no\. Check the address, the model"
    with (
        serving(lambda path, body: (status, b"no")) as server,
        pytest.raises(EndpointError, match=told),
    ):
        answer(model_of(server.url), TEXT)


def test_a_redirect_does_not_carry_the_key_away():
    with serving(lambda path, body: (200, completion("stolen"))) as other:
        target = {"Location": f"{other.url}/completions"}
        with (
            serving(lambda path, body: (302, b""), target) as server,
            pytest.raises(EndpointError, match="answered 302"),
        ):
            answer(model_of(server.url, api_key="secret"), TEXT)
        assert other.seen == []


def test_a_server_that_is_gone_ends_the_run_with_advice():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    waits: list[float] = []
    with pytest.raises(
        EndpointError, match=f"No answer from .* in {NUM_TRIES} tries: .* goes on where it was"
    ):
        answer(model_of(url, waits), TEXT)
    assert len(waits) == NUM_TRIES - 1


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://user:key@host/v1", "http://h/v1?key=1"]
)
def test_an_address_that_is_none_or_holds_a_key_is_refused(url):
    with pytest.raises(EndpointError, match="but must be like http://localhost:8000/v1"):
        EndpointModel(url, "tiny")
    with pytest.raises(EndpointError, match="concurrency is 0"):
        EndpointModel("http://h/v1", "tiny", concurrency=0)


def test_a_whole_run_over_an_endpoint(sample, tmp_path, caplog):
    settings = RunSettings(("mmlu.abstract_algebra", "gsm8k"), "card-2024-01")
    parts = choose_questions(sample, find_profile(settings.profile), settings)
    golds = {item.prompt.text: item.gold for part in parts for item in part.items}

    def reply(path, body):
        if not body.get("echo"):
            return 200, completion(f"The answer is {golds[body['prompt']]}\ud800")
        gold = golds[body["prompt"][:-1]]
        is_right = body["prompt"].endswith(gold)
        return 200, echo(
            body["prompt"], lambda token: -0.5 if is_right or token != body["prompt"][-1] else -9.0
        )

    with serving(reply) as server, caplog.at_level("WARNING"):
        results = evaluate(model_of(server.url, concurrency=3), parts, tmp_path, settings)
    assert results.tasks["gsm8k"].rows["gsm8k"].percent == 100
    assert results.tasks["mmlu"].subsets["abstract_algebra"].percent == 100
    assert not results.keeps_context_limit
    assert "shortens prompts to 2048 tokens, but this model does not say" in caplog.text
    assert all("?" in one.output for one in read_samples(tmp_path).values() if one.task == "gsm8k")
    assert {body.get("min_tokens") for body in server.bodies} == {None, 3}


def test_leaving_early_asks_no_more_and_leaves_no_thread():
    requests = [Request(f"gsm8k:{n}", TextPrompt("", "1?"), max_tokens=1) for n in range(40)]
    before = threading.active_count()
    with serving(lambda path, body: (200, completion("ok"))) as server:
        found = model_of(server.url, concurrency=2).answer(requests)
        next(found)
        found.close()
        time.sleep(0.1)
        assert len(server.seen) <= 6
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_our_own_server_gives_the_answers_of_the_engine_behind_it(chat_folder):
    llm = LLM(chat_folder, dtype="float32", memory_gib=0.02, max_model_len=512)
    here = EngineModel(llm, name="tiny")
    requests = [
        Request("l:0", TextPrompt("", "Is it A or B? The answer is "), ("A", "B", "C")),
        Request("l:1", TextPrompt("", "Yes or no? "), ("yes", "no")),
        Request("g:0", TextPrompt("", "Count: "), max_tokens=6),
        Request("c:0", CHAT.prompt, max_tokens=6),
    ]
    expected = {request.key: answer for request, answer in here.answer(requests)}
    with running(llm) as server:
        there = model_of(f"{server.url}/v1")
        found = {request.key: answer for request, answer in there.answer(requests)}
    for key, answer in expected.items():
        assert (found[key].error, found[key].text) == ("", answer.text)
        assert found[key].output_tokens == answer.output_tokens
        assert found[key].prompt_tokens == answer.prompt_tokens
    for key in ("l:0", "l:1"):
        assert found[key].logprobs == pytest.approx(expected[key].logprobs, abs=1e-3)
