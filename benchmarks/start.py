"""How long a process takes from its start to a model that is ready, and to its first token. On the demo model.

Run: python benchmarks/start.py. Each row is the median of five processes; rows take turns. The files of torch and of
the model are in the system's cache; "cold" means that no packed weights are kept yet.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hardware import RESULTS, header

from internlm2.checkpoint.resolve import cache_root, resolve_model
from internlm2.kernels.library import cache_folder, library

ROUNDS = 5
IMPORT = """
import json, resource, sys, time
{imported}
ready = time.monotonic()
print(json.dumps([ready, ready, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
ENGINE = """
import json, resource, sys, time
from internlm2 import LLM, SamplingParams
llm = LLM("demo", **json.loads(sys.argv[1]))
ready = time.monotonic()
llm.generate(["The capital of France is"], SamplingParams(max_tokens=1))
first = time.monotonic()
print(json.dumps([ready, first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


@dataclass(frozen=True)
class Case:
    """One row. options: of `LLM`. is_cold: packed weights are thrown away before every start."""

    name: str
    code: str
    options: dict[str, str]
    is_cold: bool = False


CASES = (
    Case("`import torch` alone", IMPORT.format(imported="import torch"), {}),
    Case("`from internlm2 import LLM` alone", IMPORT.format(imported="from internlm2 import LLM"), {}),
    Case("`LLM('demo')`, packed weights kept", ENGINE, {}),
    Case("`LLM('demo')`, none kept yet", ENGINE, {}, is_cold=True),
    Case("`quantization='int4'`, kept", ENGINE, {"quantization": "int4"}),
    Case("`quantization='int4'`, none kept yet", ENGINE, {"quantization": "int4"}, is_cold=True),
    Case("`quantization='none'`", ENGINE, {"quantization": "none"}),
)


def start(case: Case, cache: Path) -> tuple[float, float, float]:
    """Seconds to ready, seconds to the first token, and the peak of memory in MiB, of one new process."""
    packed = cache / "internlm2" / "packed"
    if case.is_cold:
        shutil.rmtree(packed, ignore_errors=True)
    began = time.monotonic()  # the same clock for all processes of the system
    done = subprocess.run(
        [sys.executable, "-c", case.code, json.dumps(case.options)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    ready, first, peak_bytes = json.loads(done.stdout.strip().splitlines()[-1])
    return ready - began, first - began, peak_bytes / (1 << 20)


def own_cache(folder: Path) -> Path:
    """A cache with the demo model and the built kernels of the user's, and no packed weights."""
    inner = folder / "internlm2"
    inner.mkdir()
    demo = resolve_model("demo")
    (inner / demo.relative_to(cache_root())).symlink_to(demo)
    if library() is not None and cache_folder().exists():
        (inner / "kernels").symlink_to(cache_folder())
    return folder


def row(case: Case, found: list[tuple[float, float, float]]) -> str:
    """A line of the table."""
    ready, first, peak = zip(*found, strict=True)
    cells = [f"{statistics.median(ready):.2f} [{min(ready):.2f}..{max(ready):.2f}]"]
    has_tokens = case.code == ENGINE
    cells.append(
        f"**{statistics.median(first):.2f}** [{min(first):.2f}..{max(first):.2f}]" if has_tokens else ""
    )
    return f"| {case.name} | " + " | ".join([*cells, f"{statistics.median(peak):.0f}"]) + " |"


def main() -> None:
    """Measure all cases in turns and write the result file."""
    found: dict[int, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        cache = own_cache(Path(temporary))
        for index in range(ROUNDS + 1):
            for number, case in enumerate(CASES):
                if CASES[number - 1].is_cold and not case.is_cold:
                    start(case, cache)  # makes again what the row before threw away
                times = start(case, cache)
                if index:  # the first round warms up
                    found.setdefault(number, []).append(times)
                    print(case.name, *(f"{x:.2f}" for x in times), flush=True)
    text = header("From the start of a process to its first token", "python benchmarks/start.py", ("torch",))
    text += (
        "Seconds since the process was started, medians of five with their range; resident memory at its peak.\n\n"
        "| | ready, s | first token, s | peak, MiB |\n|---|---|---|---|\n"
    )
    text += "\n".join(row(case, found[number]) for number, case in enumerate(CASES)) + "\n"
    (RESULTS / "start.md").write_text(text)


if __name__ == "__main__":
    main()
