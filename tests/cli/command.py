"""The command line in a process of its own."""

import os
import subprocess
import sys

COMMAND = [sys.executable, "-m", "internlm2"]


def run(*arguments: object, stdin: str | None = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def refuse(message: str, *arguments: object, **options: str) -> None:
    done = run(*arguments, **options)
    # cyclopts breaks lines inside a box; undo that before looking for the message
    text = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2, done.stderr
    assert message in text
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
