"""How the attacks of test_attacks.py and test_attacks_outside.py are run."""
# ruff: noqa: PTH208

import os
import time
from dataclasses import replace
from pathlib import Path

from internlm2.sandbox import Limits, Outcome
from internlm2.sandbox.program import run_without

QUICK = Limits(wall_seconds=8, cpu_seconds=3, memory_bytes=256 << 20, num_processes=8)
SHORT = replace(QUICK, wall_seconds=0.8)
PASSES = "assert solve(2) == 4"
OPEN = ("namespaces", "files", "user")  # nothing between the program and the files


def attack(
    code: str, *, tests: str = PASSES, limits: Limits = QUICK, without: tuple[str, ...] = ()
) -> Outcome:
    return run_without(without, code, tests=tests, limits=limits)


def num_processes() -> int:
    return sum(name.isdigit() for name in os.listdir("/proc"))


def eventually(condition: object) -> None:
    assert callable(condition)
    for _ in range(100):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("It did not come true within 2 s.")


def commands_with(marker: str) -> list[str]:
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and marker.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(name)
        except OSError:
            continue
    return found
