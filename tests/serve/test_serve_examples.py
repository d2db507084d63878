"""What docs/serving.md tells to type works as it stands there; only the port, and the model's folder, are the test's."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serve_running import DEFAULTS, running

from folders import write_chat_folder
from internlm2 import LLM, RewardScorer

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.M | re.S)
REWARDS = ("/v1/rank", "/v1/score")
NAME = "internlm2-chat-7b"

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


def commands() -> list[str]:
    """Each command that begins with curl, and before it the variables of its block."""
    found = []
    for kind, text in BLOCKS:
        if kind == "bash":
            lines = text.replace("\\\n", " ").splitlines()
            before = "".join(f"{line}; " for line in lines if line.startswith("export "))
            found += [before + line for line in lines if line.startswith("curl ")]
    return found


def sent(command: str, port: int) -> str:
    assert "localhost:8000" in command
    done = subprocess.run(
        ["bash", "-euc", command.replace("localhost:8000", f"localhost:{port}")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "INTERNLM2_API_KEY"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(command: str, text: str) -> str:
    """Whether an answer has what its command asks for. The path that was asked."""
    words = shlex.split(command.partition("curl ")[2])
    path = next(word for word in words if word.startswith(("$API/", "http://")))
    path = re.sub(r"^(\$API|http://localhost:8000)", "", path)
    body = json.loads(words[words.index("-d") + 1]) if "-d" in words else {}
    if path == "/metrics":
        assert "internlm2_output_tokens_total" in text
        return path
    if body.get("stream"):
        events = [line for line in text.splitlines() if line.startswith("data: ")]
        assert len(events) > 3
        assert all("error" not in json.loads(line[6:]) for line in events if line != "data: [DONE]")
        assert "completion_tokens" in events[-2] or "response.in" in events[-1] or "completed" in events[-1]
        return path
    got = json.loads(text)
    assert "error" not in got or got["error"] is None, (command, text)
    choices = got.get("choices", [])
    if path == "/v1/chat/completions":
        assert len(choices) == body.get("n", 1)
        assert all((choice["logprobs"] is not None) == bool(body.get("logprobs")) for choice in choices)
        if "tools" in body:
            (call,) = choices[0]["message"]["tool_calls"]
            assert call["function"]["name"] in [tool["function"]["name"] for tool in body["tools"]]
            json.loads(call["function"]["arguments"])
        elif (body.get("response_format") or {}).get("type") == "json_schema":
            assert json.loads(choices[0]["message"]["content"]) in ("good", "bad")
        elif "response_format" in body:
            assert choices[0]["message"]["content"].startswith("{")
    elif path == "/v1/completions":
        assert len(choices) == (len(body["prompt"]) if isinstance(body["prompt"], list) else 1)
    elif path in ("/v1/embeddings", *REWARDS):
        assert len(got["data"]) == len(body.get("input", body.get("answers", body.get("conversations"))))
    return path


def test_every_endpoint_has_a_command_that_works(tool_llm, tmp_path):
    scorer = RewardScorer(write_chat_folder(tmp_path / "reward", head="reward"), dtype="float32")
    paths = set()
    with running(tool_llm, defaults=DEFAULTS, model_name=NAME) as server, running(scorer) as judge:
        for command in commands():
            port = judge.port if any(path in command for path in REWARDS) else server.port
            paths.add(check(command, sent(command, port)))
        described = set(server.server.config.app._app.openapi()["paths"])
    scorer.close()
    assert described - {"/v1/models/{model}"} <= paths
    assert len(commands()) > 20


@pytest.mark.slow
def test_the_demo_model_answers_them_too(demo):
    """All but the reward model's; tools too, whose markers it spells."""
    num_sent = 0
    with LLM(demo, memory_gib=0.5) as llm, running(llm, model_name="demo") as server:
        for command in commands():
            if not any(path in command for path in REWARDS):
                check(command, sent(command, server.port))
                num_sent += 1
    assert num_sent > 15


def test_the_python_of_the_page_runs(tool_llm):
    programs = [text for kind, text in BLOCKS if kind == "python"]
    assert len(programs) == 2
    with running(tool_llm, defaults=DEFAULTS, model_name=NAME) as server:
        for program in programs:
            done = subprocess.run(
                [sys.executable, "-c", program.replace("localhost:8000", f"localhost:{server.port}")],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()
    assert re.match(r'\{"city": ?"(上海|北京)"\}', done.stdout)
