"""How a run is stopped: by its limits, by repetition, from outside; and calls that run at the same time."""

import signal
import threading
import time

import pytest
from agent_scripts import Notes, call, calls, double, fail

from internlm2.agent import Agent, Limits, Reply, ScriptedModel, ToolCall, tool
from internlm2.agent.model import ContextFullError, ModelError
from internlm2.agent.tool_type import ToolDefinitionError
from internlm2.errors import RequestError


def test_the_limit_of_turns_ends_the_run():
    model = ScriptedModel(lambda ask: calls(call("double", x=len(ask.messages)), text="again"))
    outcome = Agent(model, [double], limits=Limits(turns=3)).run("?")
    assert (outcome.ending, outcome.turns, outcome.answer) == ("turns", 3, "again")
    assert outcome.reason == "The limit of turns is reached."


def test_the_limit_of_tokens_ends_the_run():
    model = ScriptedModel(lambda ask: Reply("", (call("double", x=1),), prompt_tokens=40, output_tokens=10))
    assert Agent(model, [double], limits=Limits(tokens=100)).run("?").turns == 2


def test_the_limit_of_time_ends_waiting_for_a_tool_and_the_run():
    @tool
    def sleep() -> None:
        """Sleep."""
        time.sleep(20)

    started = time.monotonic()
    outcome = Agent(ScriptedModel([calls(call("sleep")), "late"]), [sleep], limits=Limits(seconds=0.3)).run(
        "?"
    )
    assert outcome.ending == "seconds"
    assert outcome.calls[0].status == "timeout"
    assert time.monotonic() - started < 5


def test_a_full_context_ends_the_run():
    def script(ask):
        if len(ask.messages) > 2:
            raise ContextFullError("too long")
        return calls(call("double", x=1))

    outcome = Agent(ScriptedModel(script), [double]).run("?")
    assert (outcome.ending, len(outcome.calls)) == ("context", 1)


def test_an_answer_that_was_cut_is_told():
    assert Agent(ScriptedModel([Reply("half", finish_reason="length")])).run("?").ending == "cut"


def test_the_same_failing_call_is_refused_and_then_ends_the_run():
    model = ScriptedModel(
        lambda ask: Reply(
            "", (ToolCall("i", "fail", '{"why":"x"}' if len(ask.messages) % 4 else '{ "why": "x" }'),)
        )
    )
    outcome = Agent(model, [fail], limits=Limits(same_failures=2)).run("?")
    assert outcome.ending == "repeats"
    assert [r.status for r in outcome.calls] == ["error", "error", "refused", "refused"]
    assert "failed 2 times" in outcome.calls[2].text


def test_other_arguments_and_successes_are_no_repetition():
    numbers = iter(range(100))
    model = ScriptedModel(lambda ask: calls(call("fail", why=str(next(numbers)))))
    assert Agent(model, [fail], limits=Limits(turns=6)).run("?").ending == "turns"
    model = ScriptedModel(lambda ask: calls(call("double", x=1)))
    assert Agent(model, [double], limits=Limits(turns=6)).run("?").ending == "turns"


def test_the_same_unreadable_words_end_the_run():
    model = ScriptedModel(lambda ask: Reply("Thought: hm"), calls_tools=False)
    outcome = Agent(model, [double]).run("?")
    assert (outcome.ending, outcome.turns) == ("repeats", 4)


def test_too_many_calls_at_once_are_refused():
    reply = calls(*[call("double", x=n) for n in range(5)])
    outcome = Agent(ScriptedModel([reply, "ok"]), [double], limits=Limits(calls_per_turn=3)).run("?")
    assert [r.status for r in outcome.calls] == ["ok"] * 3 + ["refused"] * 2


@pytest.mark.parametrize(
    "wrong", [{"turns": 0}, {"seconds": -1}, {"tokens": 0}, {"tool_seconds": float("inf")}]
)
def test_limits_must_be_positive(wrong):
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} is .*, but must be a number above 0"):
        Limits(**wrong)


# -- several at once, and being stopped -----------------------------------------------------------------------


def test_calls_of_one_answer_run_at_the_same_time_and_keep_their_order():
    both = threading.Barrier(2, timeout=10)

    @tool
    def meet(n: int) -> int:
        """Wait for the other."""
        both.wait()
        return n

    outcome = Agent(ScriptedModel([calls(call("meet", n=1), call("meet", n=2)), "ok"]), [meet]).run("?")
    assert [r.text for r in outcome.calls] == ["1", "2"]


def test_no_more_than_the_limit_run_at_once_and_exclusive_tools_alone():
    running, most, lock = [0], {}, threading.Lock()

    def work(name):
        with lock:
            running[0] += 1
            most[name] = max(most.get(name, 0), running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1

    @tool
    def free(n: int) -> None:
        """Free."""
        work("free")

    @tool(one_at_a_time=True)
    def alone(n: int) -> None:
        """Alone."""
        work("alone")

    for name in ("free", "alone"):
        script = [calls(*[call(name, n=n) for n in range(8)]), "ok"]
        outcome = Agent(ScriptedModel(script), [free, alone], limits=Limits(parallel_calls=3)).run("?")
        assert [r.status for r in outcome.calls] == ["ok"] * 8
    assert most["free"] in (2, 3)
    assert most["alone"] == 1


def test_a_cancelled_session_ends_and_forgets_the_question():
    @tool
    def wait() -> None:
        """Wait."""
        threading.Timer(0.2, session.cancel).start()
        time.sleep(20)

    notes = Notes()
    started = time.monotonic()
    with Agent(ScriptedModel([calls(call("wait")), "hello"]), [wait]).session(listeners=[notes]) as session:
        assert session.ask("?").ending == "cancelled"
        assert session.messages == []
        assert session.ask("again?").answer == "hello"
    assert time.monotonic() - started < 5
    assert [event["ending"] for event in notes.of("end")] == ["cancelled", "answered"]


def test_ctrl_c_leaves_at_once_and_is_noted():
    @tool
    def wait() -> None:
        """Wait."""
        threading.Timer(
            0.2, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        ).start()
        time.sleep(20)

    notes = Notes()
    started = time.monotonic()
    with Agent(ScriptedModel([calls(call("wait")), "on"]), [wait]).session(listeners=[notes]) as session:
        with pytest.raises(KeyboardInterrupt):
            session.ask("?")
        assert session.messages == []
        assert session.ask("?").answer == "on"
    assert time.monotonic() - started < 10
    assert notes.of("end")[0]["ending"] == "interrupted"


def test_an_error_of_the_model_is_noted_and_raised():
    notes = Notes()
    with pytest.raises(ModelError, match="one more is asked for"):
        Agent(ScriptedModel([])).run("?", listeners=[notes])
    assert notes.of("end")[0]["ending"] == "error"


# -- what does not fit together -------------------------------------------------------------------------------


def test_what_does_not_fit_together_is_refused():
    speechless = ScriptedModel([], calls_tools=False, name="tiny")
    with pytest.raises(RequestError, match="tiny has no tokens for calls"):
        Agent(speechless, [double], dialect="native")
    with pytest.raises(
        RequestError, match="The interpreter loop has one tool, which runs code, but the tools are: double"
    ):
        Agent(speechless, [double], dialect="interpreter")
    with pytest.raises(
        RequestError, match="The loop is 'plan', but must be one of auto, native, react, interpreter"
    ):
        Agent(speechless, dialect="plan")
    with pytest.raises(ToolDefinitionError, match="Two tools are named 'double'"):
        Agent(speechless, [double, double])
