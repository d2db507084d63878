"""A transcript survives its writer, and run again it shows what comes out differently."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from agent_scripts import Notes, call, calls, double, fail
from hypothesis import given
from hypothesis import strategies as st

from internlm2.agent import (
    Agent,
    Limits,
    Picture,
    Renderer,
    Reply,
    ScriptedModel,
    ToolCall,
    ToolResult,
    Transcript,
    TranscriptWriter,
    replay,
    tool,
)
from internlm2.agent.calling import CallResult
from internlm2.agent.model import ModelError
from internlm2.agent.record.events import TranscriptError, reply_event, reply_of, result_event, result_of
from internlm2.agent.record.pictures import PictureSaver
from internlm2.errors import ConfigError, ExportError

TEXTS = st.text(alphabet=st.characters(codec=None), max_size=30)
CALLS = st.builds(ToolCall, TEXTS, TEXTS, TEXTS)


@given(
    st.builds(
        Reply,
        TEXTS,
        st.lists(CALLS, max_size=2).map(tuple),
        st.lists(TEXTS, max_size=2).map(tuple),
        st.sampled_from(["stop", "length"]),
        st.integers(0, 99),
        st.integers(0, 99),
    )
)
def test_a_reply_survives_the_file(reply):
    line = json.dumps(reply_event(1, reply, 0.1), ensure_ascii=False).encode("utf-8", "backslashreplace")
    assert reply_of(json.loads(line)) == reply


@given(CALLS, st.sampled_from(["ok", "error", "timeout", "refused"]), TEXTS, st.binary(max_size=20))
def test_a_result_survives_the_file(given_call, status, text, data):
    result = CallResult(given_call, status, text, (Picture("image/png", data),), 0.5)
    line = json.dumps(result_event(1, result), ensure_ascii=False).encode("utf-8", "backslashreplace")
    assert result_of(json.loads(line)) == result


@tool
def draw(n: int) -> ToolResult:
    """Draw."""
    return ToolResult("drawn", (Picture("image/png", b"\x89PNG" + bytes([n])),))


SCRIPT = [
    calls(
        call("double", x=4), call("draw", n=7), text="Thinking \ud800 中", prompt_tokens=5, output_tokens=6
    ),
    calls(call("fail"), call("nothing")),
    Reply("<|x|>", problems=("bad",)),
    "eight",
    calls(call("double", x=5)),
    "ten",
]


def write(path, *, script=SCRIPT, tools=(double, draw, fail), questions=("one?", "two?"), **options):
    with TranscriptWriter(path) as writer:
        agent = Agent(ScriptedModel(script, **options), list(tools), system="Sys.", limits=Limits(turns=8))
        with agent.session(listeners=[writer]) as session:
            return [session.ask(question) for question in questions]


def test_everything_that_happens_is_written(tmp_path):
    first, second = write(tmp_path / "t.jsonl")
    assert (first.answer, second.answer) == ("eight", "ten")
    found = Transcript.load(tmp_path / "t.jsonl")
    assert found.is_whole
    first_round = [
        "question",
        "reply",
        "result",
        "result",
        "reply",
        "result",
        "result",
        "reply",
        "reply",
        "end",
    ]
    assert [e["event"] for e in found.events] == [*first_round, "question", "reply", "result", "reply", "end"]
    assert found.text("dialect") == "native"
    assert reply_of(found.of("reply")[0]) == SCRIPT[0]  # with its lone surrogate
    assert [t.function for t in found.tools()] == [double.function, draw.function, fail.function]
    assert tuple(result_of(e) for e in found.of("result")[:4]) == first.calls
    assert found.of("end")[0] | {"seconds": 0} == {
        "event": "end", "ending": "answered", "answer": "eight", "turns": 4, "calls": 4, "prompt_tokens": 5, "output_tokens": 6, "seconds": 0,
    }  # fmt: skip
    assert all(e["took_seconds"] >= 0 for e in found.of("reply") + found.of("result"))
    seconds = [e["seconds"] for e in found.events]
    assert seconds == sorted(seconds)
    assert (tmp_path / "t.jsonl").stat().st_mode & 0o777 == 0o600  # it may hold secrets


def test_a_file_that_is_there_is_never_written_over(tmp_path):
    (tmp_path / "t.jsonl").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        TranscriptWriter(tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_text() == "mine"


def test_a_killed_run_can_be_read_and_run_again(tmp_path):
    path = tmp_path / "t.jsonl"
    program = f"""
import time
from pathlib import Path
from internlm2.agent import *
@tool
def double(x: int) -> int:
    "Double a number."
    if x == 2:
        print("now", flush=True)
        time.sleep(60)
    return 2 * x
script = [Reply("", (ToolCall("", "double", '{{"x": %d}}' % n),)) for n in (1, 2)]
Agent(ScriptedModel(script), [double]).run("?", listeners=[TranscriptWriter(Path({str(path)!r}))])
"""
    running = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert running.stdout.readline() == b"now\n"
    running.send_signal(signal.SIGKILL)
    running.wait()
    found = Transcript.load(path)
    assert [e["event"] for e in found.events] == ["question", "reply", "result", "reply"]
    again = replay(found, tools=[double])
    assert (again.differences, again.is_whole, again.num_replies, again.num_results) == ((), False, 2, 1)


def test_a_torn_last_line_is_left_out_and_told(tmp_path):
    write(tmp_path / "t.jsonl")
    content = (tmp_path / "t.jsonl").read_bytes()
    whole = Transcript.load(tmp_path / "t.jsonl")
    for cut in range(1, 200, 7):
        (tmp_path / "torn").write_bytes(content[:-cut])
        found = Transcript.load(tmp_path / "torn")
        assert not found.is_whole
        assert found.events == whole.events[: len(found.events)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with a start"),
        (b"hello\n", "line 1, is no JSON"),
        (b'{"event": "start", "version": 1}\n[]\n', 'line 2, has no "event"'),
        (b'{"event": "question"}\n', "does not begin with a start"),
        (b'{"event": "start", "version": 99}\n', "has version 99; this program reads 1"),
        (b"\xff\n", "line 1, is no JSON"),
        (b"[" * 100_000 + b"\n", "line 1, is no JSON"),
    ],
)
def test_what_is_no_transcript_is_refused(tmp_path, content, message):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TranscriptError, match=message):
        Transcript.load(tmp_path / "t")
    with pytest.raises(TranscriptError, match="Cannot read the transcript"):
        Transcript.load(tmp_path / "missing")


# -- replay ---------------------------------------------------------------------------------------------------


def test_a_recording_runs_again_without_model_and_tools(tmp_path):
    write(tmp_path / "t.jsonl")
    found = Transcript.load(tmp_path / "t.jsonl")
    notes = Notes()
    again = replay(found, listeners=[notes])
    assert (again.differences, again.num_replies, again.num_results, again.is_whole) == ((), 6, 5, True)

    def bare(event):
        return {k: v for k, v in event.items() if k not in ("seconds", "took_seconds")}

    assert [bare(e) for e in notes[1:]] == [bare(e) for e in found.events]


def test_live_tools_are_compared(tmp_path):
    write(tmp_path / "t.jsonl")

    @tool(name="double")
    def wrong(x: int) -> int:
        """Not quite."""
        return 2 * x + (x == 5)

    found = Transcript.load(tmp_path / "t.jsonl")
    assert replay(found, tools=[draw, double, fail]).differences == ()
    (difference,) = replay(found, tools=[wrong, draw, fail]).differences
    assert (difference.place, difference.recorded, difference.now) == ("result of call_4", "ok: 10", "ok: 11")
    with pytest.raises(TranscriptError, match="tools draw, fail are not among those given"):
        replay(found, tools=[double])


def test_a_live_model_is_compared_step_by_step(tmp_path):
    write(tmp_path / "t.jsonl")
    found = Transcript.load(tmp_path / "t.jsonl")
    other = list(SCRIPT)
    other[1] = calls(call("fail", why="other"), call("nothing"))
    other[5] = "eleven"
    model = ScriptedModel(other)
    again = replay(found, model=model)
    assert [d.place for d in again.differences] == ["reply 2", "reply 6"]
    assert again.differences[0].now.startswith('\nfail({"why": "other"})')
    # After a difference the recorded words go on: the third question is asked as it was then.
    assert model.asks[2].messages[-3]["tool_calls"][0]["function"]["arguments"] == "{}"


def test_a_changed_recording_shows(tmp_path):
    write(tmp_path / "t.jsonl")
    lines = (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    changed = [json.loads(line) for line in lines]
    changed[3]["arguments"] = '{"x": 5}'
    changed[-1]["answer"] = "twelve"
    (tmp_path / "c").write_text("\n".join(map(json.dumps, changed)) + "\n")
    again = replay(Transcript.load(tmp_path / "c"))
    assert [d.place for d in again.differences] == ["call call_0", "end of question 2"]
    del changed[-2]
    (tmp_path / "d").write_text("\n".join(map(json.dumps, changed)) + "\n")
    with pytest.raises(ModelError, match=r"one more is asked for\. It was changed"):
        replay(Transcript.load(tmp_path / "d"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dialect": "dance"}, TranscriptError, "loop is 'dance'"),
        ({"limits": {"turns": "x"}}, ConfigError, "'turns'"),
        ({"limits": None}, TranscriptError, "holds no limits"),
        ({"model": 3}, TranscriptError, "model is 3"),
        ({"tools": [{"name": "a"}]}, TranscriptError, "A tool in the transcript is damaged"),
    ],
)
def test_damaged_beginnings_are_refused(tmp_path, change, error, message):
    write(tmp_path / "t.jsonl")
    first, *rest = (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "c").write_text("\n".join([json.dumps(json.loads(first) | change), *rest]) + "\n")
    with pytest.raises(error, match=message):
        replay(Transcript.load(tmp_path / "c"))


def test_damaged_events_are_refused(tmp_path):
    write(tmp_path / "t.jsonl")
    lines = (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    for n, change, message in [
        (2, {"calls": 3}, "A reply"),
        (2, {"calls": [3]}, "A reply"),
        (3, {"status": "fine"}, "A result"),
        (4, {"pictures": [{"media_type": "x", "base64": "%"}]}, "A result"),
    ]:
        changed = list(lines)
        changed[n] = json.dumps(json.loads(lines[n]) | change)
        (tmp_path / "c").write_text("\n".join(changed) + "\n")
        with pytest.raises(TranscriptError, match=f"{message} in the transcript is damaged"):
            replay(Transcript.load(tmp_path / "c"))


@pytest.mark.parametrize("calls_tools", [True, False])
def test_every_loop_runs_again(tmp_path, calls_tools):
    script = (
        [calls(call("double", x=1)), "2"]
        if calls_tools
        else ['Action: double\nAction Input: {"x": 1}', "Final Answer: 2"]
    )
    write(tmp_path / "t.jsonl", script=script, questions=["?"], calls_tools=calls_tools)
    again = replay(Transcript.load(tmp_path / "t.jsonl"), tools=[double, draw, fail])
    assert (again.differences, again.is_whole, again.num_results) == ((), True, 1)


def test_limits_that_time_decided_are_not_repeated(tmp_path):
    def slow(ask):
        time.sleep(0.15)
        return calls(call("double", x=len(ask.messages)))

    agent = Agent(ScriptedModel(slow), [double], limits=Limits(seconds=0.25))
    with TranscriptWriter(tmp_path / "t.jsonl") as writer, agent.session(listeners=[writer]) as session:
        assert session.ask("one?").ending == "seconds"
        assert session.ask("two?").ending == "seconds"
    again = replay(Transcript.load(tmp_path / "t.jsonl"), tools=[double])
    assert again.differences == ()
    assert again.is_whole


# -- in the terminal ------------------------------------------------------------------------------------------


def test_the_terminal_shows_the_steps_without_obeying_them(capsys):
    @tool
    def evil() -> str:
        """Tries."""
        return "\x1b[2J\x1b]0;owned\x07gone?"

    script = [
        calls(call("evil"), call("python_", code="print(1)\nprint(2)"), text="I \x1b[31mthink"),
        Reply("z", problems=("p",)),
        "a\nb",
    ]
    outcome = Agent(ScriptedModel(script), [evil]).run("q?", listeners=[Renderer()])
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert outcome.answer == "a\nb"
    for part in (
        "Question\n  q?",
        "Model, turn 1\n  I think",
        "Call evil\n  {}",
        "print(1)\n  print(2)",
        "Result of evil\n  gone?",
        "python_: error",
        "Unreadable call\n  p",
        "Model, turn 3\n  a\n  b",
        "[answered; 3 turns, 2 calls",
    ):
        assert part in shown, (part, shown)


def test_colours_are_for_terminals(capsys):
    Agent(ScriptedModel(["a"])).run("q?", listeners=[Renderer(colour=True)])
    assert "\x1b[" in capsys.readouterr().err


def test_pictures_become_files(tmp_path):
    script = [calls(call("draw", n=1), call("draw", n=2)), "ok"]
    Agent(ScriptedModel(script), [draw]).run("?", listeners=[PictureSaver(tmp_path / "p")])
    assert {p.name: p.read_bytes() for p in (tmp_path / "p").iterdir()} == {
        "call_0-0.png": b"\x89PNG\x01",
        "call_1-0.png": b"\x89PNG\x02",
    }
    with pytest.raises(ExportError, match="exists already"):
        Agent(ScriptedModel(script), [draw]).run("?", listeners=[PictureSaver(tmp_path / "p")])
    assert os.listdir(tmp_path / "p")  # noqa: PTH208
