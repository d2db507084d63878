"""docs/serving.md: what it says to type works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serve_running import DEFAULTS, running

from folders import write_chat_folder
from internlm2 import RewardScorer

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.fixture(scope="module")
def served(tool_llm):
    with running(tool_llm, model_name="internlm2-chat-7b", defaults=DEFAULTS) as server:
        yield server


@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_of_the_page_runs(served, block):
    code = block.replace("http://localhost:8000", served.url)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "tool_choice" in block:
        assert done.stdout.startswith('{"city": ')


def test_the_curl_commands_of_the_page_run(served, tmp_path):
    commands = [block for block in blocks("bash") if block.startswith("curl")]
    assert len(commands) == 2
    scorer = RewardScorer(write_chat_folder(tmp_path / "reward", head="reward"), dtype="float32")
    with running(scorer) as rewards:
        for command in commands:
            url = rewards.url if "/rank" in command else served.url
            done = subprocess.run(
                ["bash", "-c", command.replace("http://localhost:8000", url).replace("curl", "curl -sf", 1)],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            assert '"usage"' in done.stdout


def test_the_flags_of_the_page_are_there():
    environment = os.environ | {"COLUMNS": "200"}
    shown = "".join(
        subprocess.run(
            [sys.executable, "-m", "internlm2", command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        ).stdout
        for command in ("serve", "key")
    )
    flags = set(re.findall(r"`(--[a-z-]+)|serve .*(--[a-z-]+)", PAGE))
    named = {flag for pair in flags for flag in pair if flag}
    assert len(named) > 12
    assert {flag for flag in named if flag not in shown} == set()


def test_the_paths_of_the_page_are_those_of_the_server(served):
    import httpx2

    paths = set(httpx2.get(f"{served.url}/openapi.json").json()["paths"])
    table = PAGE[PAGE.index("| path |") : PAGE.index("A folder that holds")]
    told = set(re.findall(r"(/(?:v1/)?[a-z/]+)`", table))
    assert told | {"/v1/models/{model}"} == paths
