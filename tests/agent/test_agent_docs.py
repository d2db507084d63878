"""The page and the example do what they say."""

import re
import subprocess
import sys
from pathlib import Path

from internlm2.agent import Limits
from internlm2.agent.run import _REASONS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")


def test_the_example_runs(chat_folder, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "agent_with_tools.py", chat_folder, "How long?"],
        capture_output=True, text=True, timeout=300, check=False, env={"TMPDIR": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (transcript,) = tmp_path.glob("*/transcript.jsonl")
    assert '"event": "end"' in transcript.read_text()
    assert "convert_time" in transcript.read_text()


def test_the_python_of_the_page_runs(chat_folder):
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
    done = subprocess.run(
        [sys.executable, "-c", block.replace('LLM("demo")', f'LLM("{chat_folder}", max_model_len=2000)')],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in {"answered", *_REASONS}


def test_the_flags_of_the_page_exist():
    shown = subprocess.run(
        [sys.executable, "-m", "internlm2", "agent", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for flag in set(re.findall(r"--[a-z][a-z-]+", PAGE)):
        assert f"{flag} " in shown, flag


def test_the_limits_of_the_page_are_those_of_the_code():
    table = PAGE[PAGE.index("| limit |") :]
    named = re.findall(r"`([a-z_]+)`(?=[^|]*\|[^|]*\|\n)", table)
    assert sorted(named) == sorted(Limits.__dataclass_fields__)
    own = Limits()
    for words in (f"`turns` | {own.turns} |", f"`seconds` | {own.seconds:g} |", f"`tool_seconds` | {own.tool_seconds:g} |",
                  f"`result_chars` | {own.result_chars:,} |", f"| {own.pictures}, {own.picture_bytes >> 20} MiB |",
                  f"| {own.parallel_calls}, {own.calls_per_turn} |", f"`same_failures` | {own.same_failures} |"):  # fmt: skip
        assert words in table
    for ending in ("answered", *_REASONS):
        assert f"`{ending}`" in PAGE
