"""What an engine's process answers, line by line: JSON in, JSON out. Standard library only; peers bring the rest.

A worker is started with one JSON argument, loads once, says what it is, and then measures what it is asked for:
  {"do": "decode", "prompts": [[ids], ...], "tokens": n}  the same prompts come again, so that they may be kept
  {"do": "prefill", "prompt": [ids]}                      a new prompt each time; one token is answered
  {"do": "text", "prompt": text, "tokens": n}             text in, text out, all of it in the time
  {"do": "score", "chunks": [[ids], ...], "start": k}     -sum log p of ids k.. of each chunk; ours only
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Protocol

Times = list[tuple[float, int]]  # when so many tokens of a stream came


class Engine(Protocol):
    """facts: versions and settings as strings. Each measurement gives {"seconds", "tokens"} and what else there is."""

    facts: dict[str, str]

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, object]: ...
    def prefill(self, prompt: list[int]) -> dict[str, object]: ...
    def text(self, prompt: str, tokens: int) -> dict[str, object]: ...


def serve(load: Callable[[dict[str, object]], Engine]) -> None:
    """Load as the command line says and answer until the input ends. A failure is answered, not fatal."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print does not disturb
    started = time.perf_counter()
    engine = load(json.loads(sys.argv[1]))
    ready = {"ready": True, "seconds": time.perf_counter() - started, "facts": engine.facts}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(engine, asked.pop("do"))(**asked)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def end_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it is gone, however that came about."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def window(streams: list[Times]) -> dict[str, object]:
    """Tokens and seconds from when every stream has its first token until the last one ends."""
    start = max(times[0][0] for times in streams)
    end = max(times[-1][0] for times in streams)
    tokens = sum(count for times in streams for at, count in times if at > start)
    return {"seconds": end - start, "tokens": tokens}
