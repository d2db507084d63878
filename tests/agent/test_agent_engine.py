"""The loop over our engine: calls as control tokens, calls held to schemas, ends of all kinds."""

import json
import time

import pytest
from agent_scripts import Notes, double

from internlm2 import LLM, SamplingParams
from internlm2.agent import Agent, EngineModel, Limits, PythonTool, Tool, ToolResult, tool
from internlm2.agent.model import Ask, ContextFullError
from internlm2.agent.tool_type import ToolDefinitionError
from internlm2.engine.text import Piece
from internlm2.tokenizer.special import ACTION_END, ACTION_START, INTERPRETER, PLUGIN

GREEDY = SamplingParams(max_tokens=24)
CODE = Tool("python", "Run code.", {"type": "object"}, lambda a: ToolResult(f"ran {a['code']}"), is_code=True)


@tool
def weather(city: str, days: int = 1) -> str:
    """The weather."""
    return f"sunny in {city}"


@pytest.fixture(scope="module")
def llm(official_folder):
    return LLM(official_folder, dtype="float32", memory_gib=0.02, max_num_seqs=4, max_model_len=1024)


@pytest.fixture(scope="module")
def plain_llm(chat_folder):
    return LLM(chat_folder, dtype="float32", memory_gib=0.02, max_num_seqs=4, max_model_len=2048)


class Puppet:
    """An LLM whose words are given: real tokenizer, real prompts, no network."""

    def __init__(self, llm, *answers: str):
        self.tokenizer, self.max_model_len = llm.tokenizer, 4000
        self.requests = []
        self._answers = list(answers)

    def stream(self, ids, params, *, adapter=None):
        self.requests.append((list(ids), params))
        answer = self.tokenizer.encode(self._answers.pop(0), allow_special=True)
        for n, token in enumerate(answer):
            text = "" if token in self.tokenizer.specials.names else self.tokenizer.decode([token])
            if n == params.max_tokens:
                yield Piece("", (), "length")
                return
            yield Piece(text, (token,), None)
        yield Piece("", (), "stop")


def plugin(body: str) -> str:
    return f"{ACTION_START}{PLUGIN}\n{body}{ACTION_END}"


def test_calls_are_read_from_control_tokens_and_results_return_as_environment(llm):
    body = '{"name": "weather", "parameters": {"city": "上海"}}'
    puppet = Puppet(
        llm,
        f"Look.{plugin(body)}{ACTION_START}{INTERPRETER}\n```python\n1 + 1\n```{ACTION_END}",
        "Sunny.",
    )
    outcome = Agent(EngineModel(puppet, GREEDY.__class__(max_tokens=100)), [weather, CODE]).run("How is it?")
    assert outcome.answer == "Sunny."
    assert [(r.call.name, r.text) for r in outcome.calls] == [
        ("weather", "sunny in 上海"),
        ("python", "ran 1 + 1"),
    ]
    first, second = (puppet.tokenizer.decode(ids) for ids, _ in puppet.requests)
    assert "<|im_start|>system name=<|interpreter|>" in first
    assert '<|im_start|>system name=<|plugin|>\n[{"name": "weather"' in first
    assert (
        f"assistant\nLook.{plugin(body)}<|action_start|><|interpreter|>\n```python\n1 + 1\n```<|action_end|><|im_end|>"
        in second
    )
    assert "<|im_start|>environment name=<|plugin|>\nsunny in 上海<|im_end|>\n" in second
    assert "<|im_start|>environment name=<|interpreter|>\nran 1 + 1<|im_end|>\n" in second
    assert outcome.prompt_tokens == sum(len(ids) for ids, _ in puppet.requests)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (plugin("not json"), "its body is not JSON"),
        (plugin('{"name": ""}'), "its name is empty"),
        (plugin('{"name": "python", "parameters": {"x": 1}}'), "the interpreter is called with"),
        (f"{ACTION_START}{PLUGIN}\n{{", "it was cut off before"),
        (f"{ACTION_START}weather{ACTION_END}", "must be followed by"),
    ],
)
def test_broken_calls_are_told_and_the_history_stays_sound(llm, written, problem):
    puppet = Puppet(llm, "Hm." + written, "ok")
    outcome = Agent(EngineModel(puppet, SamplingParams(max_tokens=100)), [weather, CODE]).run("?")
    assert outcome.answer == "ok"
    assert problem in puppet.tokenizer.decode(puppet.requests[1][0])
    assert "<|im_start|>environment\n" in puppet.tokenizer.decode(puppet.requests[1][0])


def test_code_without_an_interpreter_is_told(llm):
    puppet = Puppet(llm, f"{ACTION_START}{INTERPRETER}\n1{ACTION_END}", "ok")
    Agent(EngineModel(puppet), [weather]).run("?")
    assert "there is no code interpreter" in puppet.tokenizer.decode(puppet.requests[1][0])


def test_a_tool_cannot_take_the_interpreters_names(llm):
    other = Tool("interpreter", "", {"type": "object"}, lambda _: ToolResult(""))
    with pytest.raises(ToolDefinitionError, match="A tool is named 'interpreter', as the model calls"):
        Agent(EngineModel(Puppet(llm, "x")), [CODE, other]).run("?")


def test_a_bound_call_is_written_in_parts(llm):
    body = '{"name": "weather", "parameters": {"city": "a"}}'
    puppet = Puppet(llm, f"I see.{ACTION_START}", body, " So.", "Done.")
    outcome = Agent(EngineModel(puppet, SamplingParams(max_tokens=100)), [weather], constrain=True).run("?")
    assert outcome.answer == "Done."
    assert [r.text for r in outcome.calls] == ["sunny in a"]
    special = puppet.tokenizer.special_tokens
    free, bound, rest, _ = (params for _, params in puppet.requests)
    assert free.stop_token_ids == rest.stop_token_ids == (special[PLUGIN],)
    assert bound.json_schema["properties"]["name"] == {"const": "weather"}
    assert bound.json_schema["$defs"]["tool0"]["properties"] == weather.parameters["properties"]
    assert free.json_schema is None
    assert puppet.tokenizer.decode(puppet.requests[1][0]).endswith(
        f"assistant\nI see.{ACTION_START}{PLUGIN}\n"
    )
    assert puppet.tokenizer.decode(puppet.requests[2][0]).endswith(plugin(body))
    used = len(puppet.tokenizer.encode(f"I see.{plugin(body)}", allow_special=True))
    assert rest.max_tokens <= 100 - used + 1


def test_a_bound_call_that_is_cut_off_is_not_carried_out(llm):
    puppet = Puppet(llm, ACTION_START, '{"name": "weather", "parameters": {"city": "aaaaaaaaaa"}}', "ok")
    outcome = Agent(EngineModel(puppet, SamplingParams(max_tokens=6)), [weather], constrain=True).run("?")
    assert outcome.calls == ()
    assert "cut off" in puppet.tokenizer.decode(puppet.requests[2][0])


def test_the_engine_itself_obeys_the_schema_of_a_tool(llm):
    """A random model cannot write a call by chance; held to the schema it must."""
    pytest.importorskip("llguidance")

    @tool
    def choose(choice: bool, other: bool) -> str:
        """Choose."""
        return "chosen"

    special = llm.tokenizer.special_tokens
    pushed = {special[ACTION_START]: 100.0}  # so that it begins a call
    params = SamplingParams(max_tokens=60, logit_bias=pushed)
    model = EngineModel(llm, params)
    written = []
    real = llm.stream

    class Begun:
        """The real engine, which is made to begin a call at first."""

        tokenizer, max_model_len = llm.tokenizer, llm.max_model_len

        def stream(self, ids, given, *, adapter=None):
            first = not written
            written.append(given)
            if first:
                yield Piece("", (special[ACTION_START],), "stop")
                return
            yield from real(
                ids,
                SamplingParams(max_tokens=given.max_tokens, json_schema=given.json_schema),
                adapter=adapter,
            )

    model._llm = Begun()
    reply = model.respond(Ask([{"role": "user", "content": "?"}], [choose], constrain=True))
    (found,) = reply.calls
    assert found.name == "choose"
    arguments = json.loads(found.arguments)
    assert set(arguments) == {"choice", "other"}
    assert {type(v) for v in arguments.values()} == {bool}


def test_constrained_react_on_the_engine_writes_valid_arguments(plain_llm):
    pytest.importorskip("llguidance")
    model = EngineModel(plain_llm, SamplingParams(max_tokens=40))
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "Action: double\nAction Input:\n"},
    ]
    schema = {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    reply = model.respond(Ask(messages, json_schema=schema, continues=True))
    assert isinstance(json.loads(reply.text)["x"], bool)


def test_a_model_without_call_tokens_takes_the_react_loop(plain_llm):
    model = EngineModel(plain_llm, SamplingParams(max_tokens=8, seed=1))
    assert not model.calls_tools
    notes = Notes()
    Agent(model, [double], limits=Limits(turns=2)).run("Hi", listeners=[notes])
    assert notes[0]["dialect"] == "react"
    assert notes.of("reply")[0]["prompt_tokens"] > 50


def test_a_conversation_beyond_the_context_ends(plain_llm):
    outcome = Agent(EngineModel(plain_llm)).run("x" * 3000)
    assert outcome.ending == "context"
    with pytest.raises(ContextFullError, match="the model's context 2048"):
        EngineModel(plain_llm).respond(Ask([{"role": "user", "content": "x" * 3000}]))


def test_time_and_cancellation_end_an_answer(plain_llm):
    model = EngineModel(plain_llm, SamplingParams(max_tokens=1000, ignore_eos=True))
    for ask in (
        Ask([{"role": "user", "content": "?"}], deadline=time.monotonic()),
        Ask([{"role": "user", "content": "?"}], is_cancelled=lambda: True),
    ):
        reply = model.respond(ask)
        assert reply.finish_reason == "length"
        assert reply.output_tokens < 10
    end = time.monotonic() + 20
    while plain_llm.frontend.engine.has_work:  # the engine ends it before its next step
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_the_demo_model_goes_through_every_loop(demo):
    """It is small and seldom calls rightly; what matters is that each run ends in order and can be run again."""
    from internlm2.agent import calculator

    llm = LLM(demo, dtype="float32", memory_gib=0.2, max_num_seqs=2)
    model = EngineModel(llm, SamplingParams(max_tokens=60), name="demo")
    with PythonTool() as python:
        for tools, loop, constrain in (
            ([calculator(), python.tool], "react", False),
            ([calculator()], "react", True),
            ([python.tool], "interpreter", False),
        ):
            agent = Agent(model, tools, dialect=loop, constrain=constrain, limits=Limits(turns=3))
            outcome = agent.run("What is 37 * 43? Use a tool.")
            assert outcome.ending in ("answered", "cut", "turns", "repeats")
            assert 1 <= outcome.turns <= 3
            assert outcome.output_tokens > 0
