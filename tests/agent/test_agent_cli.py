"""`internlm2 agent` in a process of its own, and as a function with a scripted model."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agent_scripts import DRAW, call, calls

from internlm2.agent import Reply, ScriptedModel
from internlm2.cli import agent as command
from internlm2.cli.main import run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def in_process(*arguments, stdin=None):
    return subprocess.run(
        [sys.executable, "-m", "internlm2", "agent", *map(str, arguments)],
        input=stdin, stdin=subprocess.DEVNULL if stdin is None else None, capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT,
    )  # fmt: skip


@pytest.fixture
def scripted(monkeypatch):
    """The next runs are answered by a script."""

    def use(*script, **options):
        model = ScriptedModel(list(script), **options)
        monkeypatch.setattr(command, "_model", lambda *_: model)
        return model

    return use


def test_help_is_quick_and_loads_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "internlm2", "agent", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "--mcp" in done.stdout
    loaded = re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.M)
    assert not {"torch", "numpy", "mcp", "pydantic", "internlm2.agent"} & set(loaded)


def test_the_agent_room_loads_no_torch():
    code = "import sys, internlm2.agent; assert not {'torch', 'mcp', 'pydantic'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_question_is_answered_with_tools(scripted, capsys, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "note.txt").write_text("the note")
    model = scripted(
        calls(
            call("calculator", expression="6*7"),
            call("python", code="1 + 1"),
            call("read_file", path="note.txt"),
        ),
        "It is 42.",
    )
    code = run(
        ["agent", "m", "What?", "--tool", "calculator", "--tool", "python", "--files", str(tmp_path / "f"), "--system", "Sys.",
         "--transcript", str(tmp_path / "t.jsonl")]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert (code, out) == (0, "It is 42.\n")
    for part in ("Question\n  What?", "Result of calculator\n  42", "Result of python\n  2", "the note"):
        assert part in err
    assert [t.name for t in model.asks[0].tools] == ["calculator", "python", "read_file", "list_files"]
    assert model.asks[0].messages[0]["content"] == "Sys."

    assert run(["agent", "m", "--replay", str(tmp_path / "t.jsonl"), "--quiet"]) == 0
    assert capsys.readouterr().out == "1 replies and 3 results, 0 differences.\n".replace(
        "1 replies", "2 replies"
    )
    (tmp_path / "f" / "note.txt").write_text("another")
    assert (
        run(
            [
                "agent",
                "m",
                "--replay",
                str(tmp_path / "t.jsonl"),
                "--live",
                "tools",
                "--tool",
                "calculator",
                "--tool",
                "python",
                "--files",
                str(tmp_path / "f"),
                "--json",
                "--quiet",
            ]
        )
        == 1
    )
    found = json.loads(capsys.readouterr().out)
    assert [(d["place"], d["now"]) for d in found["differences"]] == [("result of call_2", "ok: another")]
    scripted("x", "It is 43.")
    assert run(["agent", "m", "--replay", str(tmp_path / "t.jsonl"), "--live", "model", "--quiet"]) == 1
    assert "now:      It is 43." in capsys.readouterr().out


def test_json_holds_all_that_counts(scripted, capsys):
    scripted(
        calls(call("calculator", expression="1/0"), text="hm", prompt_tokens=3), Reply("no", output_tokens=2)
    )
    assert run(["agent", "m", "?", "--tool", "calculator", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("seconds") >= 0
    assert found == {
        "answer": "no", "ending": "answered", "turns": 2, "prompt_tokens": 3, "output_tokens": 2,
        "calls": [{"id": "call_0", "name": "calculator", "arguments": '{"expression": "1/0"}', "status": "error",
                   "text": "Division by zero.", "num_pictures": 0}],
    }  # fmt: skip


def test_a_limit_without_an_answer_is_a_users_error(scripted, capsys):
    scripted(
        calls(call("calculator", expression="1"), text="let me"), calls(call("calculator", expression="1"))
    )
    assert run(["agent", "m", "?", "--tool", "calculator", "--max-turns", "1", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "let me\n"
    assert "No whole answer: The limit of turns is reached." in err


def test_piped_lines_are_one_conversation(scripted, capsys, monkeypatch):
    model = scripted("one", "two")
    monkeypatch.setattr(sys, "stdin", io.StringIO("first?\n\nsecond?\n"))
    assert run(["agent", "m", "--quiet"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert [m["content"] for m in model.asks[1].messages] == ["first?", "one", "second?"]


def test_an_answer_cannot_steer_the_terminal(scripted, capsys):
    scripted("\x1b[2Jhello\x1b]0;x\x07")
    assert run(["agent", "m", "?", "--tool", "calculator"]) == 0
    assert "\x1b" not in "".join(capsys.readouterr())


def test_default_tools_depend_on_what_is_asked_for(scripted, tmp_path, monkeypatch, capsys):
    seen = []
    for arguments in ([], ["--files", str(tmp_path)], ["--loop", "interpreter"]):
        model = scripted("x", calls_tools=True)
        run(["agent", "m", "?", "--quiet", *arguments])
        seen.append([t.name for t in model.asks[0].tools])
    assert seen == [["calculator", "python"], ["read_file", "list_files"], ["python"]]


def test_missing_isolation_is_told_at_the_start(scripted, capsys, monkeypatch):
    from dataclasses import replace

    from internlm2 import sandbox

    real = sandbox.examine_isolation()
    monkeypatch.setattr(sandbox, "examine_isolation", lambda: replace(real, network=False))
    scripted("x")
    assert run(["agent", "m", "?", "--tool", "python"]) == 0
    assert "Sandbox: NOT isolated: a program can open network connections" in capsys.readouterr().err


def test_pictures_are_saved(scripted, tmp_path, capsys):
    scripted(calls(call("python", code=DRAW)), "drawn")
    assert run(["agent", "m", "?", "--tool", "python", "--pictures", str(tmp_path / "p"), "--quiet"]) == 0
    assert (tmp_path / "p" / "call_0-0.png").read_bytes().startswith(b"\x89PNG")


def test_an_mcp_server_is_used(scripted, capsys):
    pytest.importorskip("mcp")
    server = Path(__file__).with_name("mcp_server.py")
    scripted(calls(call("mine_add", a=1)), "ok")
    assert (
        run(["agent", "m", "?", "--mcp", f"mine={sys.executable} {server} stdio", "--json", "--quiet"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["calls"][0]["text"] == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--live", "model"], "--live model needs --replay FILE"),
        (["--replay", "missing.jsonl"], "Cannot read the transcript missing.jsonl"),
        (["--files", "missing"], "Cannot read the folder missing"),
        (["--mcp", "'"], "Close the quotes"),
        (["--max-turns", "0"], "turns is 0, but must be a number above 0"),
        (["--tool", "hammer"], "hammer"),
        (["--loop", "interpreter", "--tool", "calculator"], "The interpreter loop has one tool"),
        (["--api-key-env", "X"], "--api-key-env is for an endpoint"),
        (
            ["--endpoint", "http://127.0.0.1:1/v1", "--quantization", "int8"],
            "--quantization is for models that run here",
        ),
        (
            ["--endpoint", "http://127.0.0.1:1/v1", "--api-key-env", "NO_SUCH_KEY"],
            "The environment variable NO_SUCH_KEY is not set",
        ),
        (["--endpoint", "127.0.0.1"], "must be like http://localhost:8000/v1"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys, monkeypatch):
    if "--loop" in arguments:
        monkeypatch.setattr(command, "_model", lambda *_: ScriptedModel([]))
    assert run(["agent", "m", "?", *arguments]) == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in err
    assert "Traceback" not in err


def test_ctrl_c_leaves_cleanly(tmp_path, chat_folder):
    """A real process with a real model, interrupted while it writes: 130, a readable transcript, no traceback."""
    path = tmp_path / "t.jsonl"
    running = subprocess.Popen(
        [sys.executable, "-m", "internlm2", "agent", str(chat_folder), "hello", "--tool", "calculator", "--transcript", str(path),
         "--max-tokens", "100000", "--temperature", "1", "--max-model-len", "100000", "--memory-gib", "0.2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not (path.exists() and b'"question"' in path.read_bytes()):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if lines[-1].get("ending") == "answered":
        pytest.skip("the random model ended its answer by itself")
    assert running.returncode == 130, err
    assert "Traceback" not in err
    assert lines[-1]["ending"] == "interrupted"


@pytest.mark.slow
def test_the_demo_model_answers(demo, tmp_path):
    done = in_process(
        "demo",
        "What is 12*13?",
        "--max-tokens",
        "60",
        "--max-turns",
        "2",
        "--temperature",
        "0",
        "--transcript",
        tmp_path / "t",
    )
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    again = in_process(
        "demo", "--replay", tmp_path / "t", "--live", "both", "--temperature", "0", "--max-tokens", "60"
    )
    assert again.returncode == 0, again.stdout
    assert "0 differences" in again.stdout
