"""The server under load: 200 clients of which a third hang up, and what HTTP costs beside the bare engine.

Run: python benchmarks/serve_load.py [--seconds 300] [--peer "COMMAND that serves the same model at {port}"]
Each server is a process of its own; the clients share the machine with it. The peer meets the same requests.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hardware import RESULTS, foreign_load, header
from sse_client import Asked, ask

ROUNDS, STREAMS, STREAM_TOKENS = 5, 32, 48
OURS = f"{sys.executable} -m internlm2 serve demo --port {{port}} --memory-gib 1"
TOPICS = (
    "the printing press",
    "how rivers form",
    "a sorting function in Python",
    "长城的历史",
    "a short letter",
    "1+1",
)
BARE = """
import json, sys, time
from internlm2 import LLM, SamplingParams
llm = LLM("demo", dtype="bfloat16", memory_gib=1, quantization=sys.argv[2] or None)
for line in sys.stdin:
    prompts = json.loads(line)
    ids = [llm.tokenizer.apply_chat([{"role": "user", "content": p}]) for p in prompts]
    params = SamplingParams(max_tokens=int(sys.argv[1]), ignore_eos=True, temperature=0.0)
    started = time.perf_counter()
    outs = llm.generate(ids, params)
    seconds = time.perf_counter() - started
    print(sum(len(out.token_ids) for out in outs) / seconds, flush=True)
"""


@contextmanager
def serving(command: str) -> Iterator[tuple[str, int]]:
    """Run a server until the block ends; gives its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        shlex.split(command.format(port=port)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def resident_mib(pid: int) -> float:
    """Memory of a process and its children's children, as the system counts it."""
    pages = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_own = int(folder.name) == pid or f"\nPPid:\t{pid}\n" in (folder / "status").read_text()
            pages += int((folder / "statm").read_text().split()[1]) if is_own else 0
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def request(draw: random.Random) -> dict[str, object]:
    """A short chat; sometimes a long question, or an answer that is long."""
    topic = draw.choice(TOPICS)
    text = f"{draw.randrange(1000)}: Write about {topic}. " * draw.choice((1, 1, 1, 8))
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": draw.choice((16, 32, 64)),
    }


async def load(url: str, pid: int, *, num_clients: int, seconds: float) -> tuple[list[Asked], list[float]]:
    """Let clients ask again and again. Gives what they got, and the memory every five seconds."""
    answers: list[Asked] = []
    memory: list[float] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            leave = draw.randrange(1, 12) if draw.random() < 1 / 3 else None
            asked = await ask(url, request(draw), leave_after=leave)
            answers.append(asked)
            if asked.status == 429:
                await asyncio.sleep(asked.retry_after * draw.uniform(0.5, 1.5))

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(5)
            memory.append(resident_mib(pid))

    await asyncio.gather(watch(), *(client(number) for number in range(num_clients)))
    return answers, memory


def left_over(url: str) -> str:
    """Requests and pages that our server still holds when nobody asks any more."""
    for _ in range(100):
        text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
        numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        held = {name: float(numbers[f"internlm2_{name}"]) for name in ("open_answers", "pages_held")}
        if not any(held.values()):
            break
        time.sleep(0.1)
    return ", ".join(f"{name} {value:.0f}" for name, value in held.items())


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def row(name: str, answers: list[Asked], memory: list[float], seconds: float) -> str:
    """One line of the table."""
    first = [a.first_seconds for a in answers if a.first_seconds is not None]
    statuses = Counter(a.status for a in answers)
    whole = [a for a in answers if a.status == 200 and not a.has_left]
    broken = sum(1 for a in whole if not a.has_ended or a.error)
    late = memory[len(memory) // 3 :] or [float("nan")]
    return (
        f"| {name} | {len(answers)} | {dict(statuses)} | {sum(a.has_left for a in answers)} | {broken} | "
        f"{percentile(first, 0.5):.2f} | {percentile(first, 0.99):.2f} | "
        f"{sum(a.num_pieces for a in answers) / seconds:.0f} | {late[0]:.0f} .. {late[-1]:.0f} |"
    )


async def through_http(url: str, prompts: list[str]) -> float:
    """Tokens per second of streams that begin together."""
    body = {"model": "demo", "max_tokens": STREAM_TOKENS, "temperature": 0.0, "ignore_eos": True}
    started = time.perf_counter()
    answers = await asyncio.gather(
        *(ask(url, {**body, "messages": [{"role": "user", "content": p}]}) for p in prompts)
    )
    assert all(a.has_ended and a.num_tokens == STREAM_TOKENS for a in answers), answers
    return len(prompts) * STREAM_TOKENS / (time.perf_counter() - started)


def overhead(ours: str, quantization: str) -> str:
    """Our server against the bare engine, taking turns."""
    ratios, speeds = [], []
    with serving(ours) as (url, _):
        bare = subprocess.Popen(
            [sys.executable, "-c", BARE, str(STREAM_TOKENS), quantization],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert bare.stdin is not None
        assert bare.stdout is not None
        for turn in range(ROUNDS + 1):
            prompts = [f"{turn} {n}: tell me about {TOPICS[n % len(TOPICS)]}" for n in range(STREAMS)]
            print(json.dumps(prompts), file=bare.stdin, flush=True)
            alone = float(bare.stdout.readline())
            served = asyncio.run(through_http(url, prompts))
            if turn:  # the first one warms up
                ratios.append(served / alone)
                speeds.append((served, alone))
        bare.stdin.close()
        bare.wait(60)
    served, alone = (statistics.median(column) for column in zip(*speeds, strict=True))
    return (
        f"{STREAMS} streams of {STREAM_TOKENS} tokens, greedy: {served:.0f} tokens/s through HTTP, clients on the same "
        f"two cores included; {alone:.0f} from the bare engine in a process of its own. Ratio, median of {ROUNDS} "
        f"pairs in turns: {statistics.median(ratios):.3f} [{min(ratios):.3f}..{max(ratios):.3f}]; goal: at least 0.9.\n"
    )


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--quantization", default="", help="of our server: int8 or int4")
    parser.add_argument("--peer", help="command of another server of the same model; {port} is filled in")
    options = parser.parse_args()
    ours = OURS + (f" --quantization {options.quantization}" if options.quantization else "")
    before = foreign_load()
    rows, left = [], ""
    for name, command in (("internlm2 serve", ours), ("peer", options.peer)):
        if command is None:
            continue
        with serving(command) as (url, pid):
            answers, memory = asyncio.run(
                load(url, pid, num_clients=options.clients, seconds=options.seconds)
            )
            rows.append(row(name, answers, memory, options.seconds))
            print(rows[-1], flush=True)
            if name != "peer":
                left = left_over(url)
            for error, count in Counter(a.error[:160] for a in answers if a.error).most_common(5):
                print(f"  {count} x {error}", flush=True)
    cost = overhead(ours, options.quantization)
    print(cost)
    text = header("The server under load", "python benchmarks/serve_load.py", ("torch", "fastapi", "uvicorn"))
    text += (
        f"Demo model (135M). {options.clients} clients for {options.seconds:.0f} s, each asking again at once; a "
        "third of the requests hang up after 1 to 11 pieces. Clients and server share the two cores. Foreign load "
        f"before: {before:.0%}. Held by our server afterwards: {left}. "
        f"Weights: {options.quantization or 'bfloat16'}.\n\n"
        "| server | requests | by status | hung up | broken | first token p50, s | p99, s | tokens/s | memory, MiB |\n"
        "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        + (f"Peer: `{options.peer}`.\n\n" if options.peer else "") + f"## What HTTP costs\n\n{cost}"
    )  # fmt: skip
    (RESULTS / "serve_load.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
