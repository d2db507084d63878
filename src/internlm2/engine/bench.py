"""How fast a loaded model answers here: alone, in a batch, under load, on long prompts; and what it costs in memory.

Prompts are random ids, so that no prefix is found in the cache, and answers never end early. Under load requests
arrive at random (Poisson), and the time to the first token counts from the arrival, also of requests that had to wait.
"""

import asyncio
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from internlm2 import __version__
from internlm2.checkpoint.inference import weight_bytes
from internlm2.checkpoint.source import dtype_name
from internlm2.engine.async_llm import AsyncLLM
from internlm2.engine.llm import LLM
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.text import Piece
from internlm2.errors import RequestError, check
from internlm2.log import progress

PARTS = ("latency", "throughput", "rate", "prefill", "memory")
MIB = 1 << 20
LOUD = 0.1  # share of the processor in other hands from which on the figures mislead

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and on what. Raises RequestError for values outside their range.

    only: some of PARTS. prompt_tokens, output_tokens: of every request but those of "prefill", which has prompts of
    `prefill_tokens` and answers of one token. num_prompts: at once for "throughput", in all for "rate".
    rate_per_second: mean number of arrivals. repeats: of every part. seed: of prompts and arrivals.
    """

    only: tuple[str, ...] = PARTS
    prompt_tokens: int = 128
    output_tokens: int = 64
    num_prompts: int = 16
    rate_per_second: float = 4.0
    prefill_tokens: tuple[int, ...] = (128, 512)
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for part in self.only:
            if part not in PARTS:
                raise RequestError(f"There is no part {part!r} to measure. Known: {', '.join(PARTS)}.")
        for name, least in (("prompt_tokens", 1), ("output_tokens", 2), ("num_prompts", 1), ("repeats", 1)):
            value: int = asdict(self)[name]
            check(value >= least, name, value, f"at least {least}")
        if not 0 < self.rate_per_second < float("inf"):
            raise RequestError(f"rate is {self.rate_per_second:g}, but must be a number above 0.")
        is_positive = min(self.prefill_tokens, default=0) >= 1
        check(is_positive, "prefill_tokens", self.prefill_tokens, "numbers of at least 1")


@dataclass(frozen=True)
class Figure:
    """One measured thing: the value of every repeat (for "rate": of every request, where it belongs to one)."""

    part: str
    what: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of all values."""
        return statistics.median(self.values)


@dataclass(frozen=True)
class Report:
    """All figures, and what must be known to compare them.

    foreign_load: share of all processor cores that other programs used just before, 0..1; None: not known here.
    """

    settings: dict[str, object]
    foreign_load: float | None
    figures: list[Figure]

    def as_json(self) -> dict[str, object]:
        """Everything, every single value included."""
        rows = [
            asdict(f) | {"median": f.median, "min": min(f.values), "max": max(f.values)} for f in self.figures
        ]
        return {"settings": self.settings, "foreign_load": self.foreign_load, "figures": rows}

    def as_text(self) -> str:
        """A table."""
        load = "unknown" if self.foreign_load is None else f"{self.foreign_load:.0%}"
        lines = [f"{name}: {value}" for name, value in self.settings.items()]
        lines += [f"foreign CPU load before: {load}", ""]
        lines.append(f"{'part':<11} {'what':<34} {'median':>10}   {'min..max':<23} unit")
        for figure in self.figures:
            spread = f"{_short(min(figure.values))}..{_short(max(figure.values))}"
            lines.append(
                f"{figure.part:<11} {figure.what:<34} {_short(figure.median):>10}   {spread:<23} {figure.unit}"
            )
        return "\n".join(lines)


def measure(llm: LLM, options: BenchOptions, params: SamplingParams | None = None, *, name: str) -> Report:
    """Measure a model that nobody else uses. params: how tokens are chosen; their lengths are those of `options`.

    name: what the report calls the model. Raises RequestError for lengths that the model does not take.
    """
    longest = _longest(options)
    if longest > llm.max_model_len:
        raise RequestError(
            f"The longest request has {longest} tokens, but the model takes {llm.max_model_len}. Lower the numbers of "
            "prompt, output or prefill tokens."
        )
    load = foreign_load()
    if load is not None and load > LOUD:
        _log.warning(
            "Other programs use %.0f%% of the processor. What follows is too slow; close them.", 100 * load
        )
    params = replace(params or SamplingParams(), max_tokens=options.output_tokens, ignore_eos=True, stop=())
    bench = _Bench(llm, options, params)
    measures: dict[str, Callable[[], None]] = {
        "latency": bench.latency,
        "throughput": bench.throughput,
        "rate": bench.rate,
        "prefill": bench.prefill,
    }
    chosen = [part for part in measures if part in options.only]
    with progress("Measuring", total=len(chosen) * options.repeats, unit="runs") as bar:
        for part in chosen:
            bench.warm_up()
            for _ in range(options.repeats):
                measures[part]()
                bar.advance(1)
    if "memory" in options.only:
        bench.memory()  # last: now everything has been used once
    figures = [Figure(*key, tuple(values)) for key, values in bench.values.items()]
    return Report(_settings(llm, options, params, name), load, figures)


@dataclass
class _Bench:
    """One method a part; each call is one repeat."""

    llm: LLM
    options: BenchOptions
    params: SamplingParams
    values: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.options.seed)

    def warm_up(self) -> None:
        """A short answer that does not count."""
        length = min(self.options.prompt_tokens, max(_longest(self.options) - 2, 1))
        self.llm.generate([self._prompt(length)], replace(self.params, max_tokens=2))

    def latency(self) -> None:
        """One request alone."""
        prompt = self._prompt(self.options.prompt_tokens)
        started = time.perf_counter()
        with self._outside_network("latency"):
            times = _Times(started)
            for piece in self.llm.stream(prompt, self.params):
                times.note(piece)
        self._add_times("latency", times)

    def throughput(self) -> None:
        """All prompts at once."""
        prompts = [self._prompt(self.options.prompt_tokens) for _ in range(self.options.num_prompts)]
        started = time.perf_counter()
        with self._outside_network("throughput"):
            outputs = self.llm.generate(prompts, self.params)
        seconds = time.perf_counter() - started
        num_outputs = sum(len(out.token_ids) for out in outputs)
        num_prompts = sum(len(prompt) for prompt in prompts)
        self._add("throughput", "output tokens", "tokens/s", num_outputs / seconds)
        self._add("throughput", "prompt and output tokens", "tokens/s", (num_prompts + num_outputs) / seconds)

    def rate(self) -> None:
        """Requests that arrive one after the other, whether the ones before are answered or not."""
        started = time.perf_counter()
        each = asyncio.run(self._arrive())
        seconds = time.perf_counter() - started
        for times in each:
            self._add_times("rate", times)
        self._add("rate", "answered requests", "requests/s", len(each) / seconds)
        self._add("rate", "output tokens", "tokens/s", sum(times.num_tokens for times in each) / seconds)

    async def _arrive(self) -> list["_Times"]:
        async def ask(prompt: Sequence[int], arrival: float) -> _Times:
            await asyncio.sleep(arrival - time.perf_counter())
            times = _Times(arrival)
            async for piece in twin.stream(prompt, self.params):
                times.note(piece)
            return times

        arrival = time.perf_counter()
        requests = []
        async with AsyncLLM.of(self.llm) as twin:
            for _ in range(self.options.num_prompts):
                requests.append(ask(self._prompt(self.options.prompt_tokens), arrival))
                arrival += self._random.expovariate(self.options.rate_per_second)
            return await asyncio.gather(*requests)

    def prefill(self) -> None:
        """Long prompts, with an answer of one token."""
        for length in self.options.prefill_tokens:
            prompt = self._prompt(length)
            started = time.perf_counter()
            self.llm.generate([prompt], replace(self.params, max_tokens=1))
            speed = length / (time.perf_counter() - started)
            self._add("prefill", f"prompt of {length} tokens", "tokens/s", speed)

    def memory(self) -> None:
        """What the process and the model hold now."""
        runner = self.llm.frontend.engine.runner
        for what, num_bytes in _process_bytes().items():
            self._add("memory", what, "MiB", num_bytes / MIB)
        self._add("memory", "weights", "MiB", weight_bytes(self.llm.model) / MIB)
        self._add("memory", "keys and values, reserved", "MiB", runner.cache.num_bytes / MIB)
        if runner.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(runner.device)
            self._add("memory", "GPU, peak", "MiB", peak / MIB)

    @contextmanager
    def _outside_network(self, part: str) -> Iterator[None]:
        """Add the share of the steps inside this block that was not spent in the model."""
        before = replace(self.llm.stats)
        yield
        steps = self.llm.stats.step_seconds - before.step_seconds
        network = self.llm.stats.network_seconds - before.network_seconds
        # NOTE: a GPU computes on while the engine goes on, so there the time of the call says nothing.
        if self.llm.frontend.engine.runner.device.type == "cpu":
            self._add(part, "share of a step outside the network", "%", 100 * (1 - network / steps))

    def _prompt(self, length: int) -> list[int]:
        size = min(self.llm.tokenizer.vocab_size, self.llm.model.config.vocab_size)
        return [self._random.randrange(size) for _ in range(length)]

    def _add_times(self, part: str, times: "_Times") -> None:
        self._add(part, "time to first token", "ms", 1000 * times.first_seconds)
        self._add(part, "time per token after it", "ms", 1000 * times.seconds_per_token)

    def _add(self, part: str, what: str, unit: str, value: float) -> None:
        self.values.setdefault((part, what, unit), []).append(value)


@dataclass
class _Times:
    """When the tokens of one answer came."""

    started: float
    num_tokens: int = 0
    num_first: int = 0  # in the first piece that had any
    first: float = 0.0
    last: float = 0.0

    def note(self, piece: Piece) -> None:
        if piece.token_ids:
            self.last = time.perf_counter()
            if not self.num_first:
                self.first, self.num_first = self.last, len(piece.token_ids)
            self.num_tokens += len(piece.token_ids)

    @property
    def first_seconds(self) -> float:
        return self.first - self.started

    @property
    def seconds_per_token(self) -> float:
        return (self.last - self.first) / max(self.num_tokens - self.num_first, 1)


def foreign_load(seconds: float = 2.0, stat: Path = Path("/proc/stat")) -> float | None:
    """Share of the processor that others use while this process sleeps; None where the system does not tell."""

    def read() -> tuple[int, int]:
        numbers = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]

    try:
        total, idle = read()
        time.sleep(seconds)
        total_after, idle_after = read()
    except OSError:
        return None
    return 1 - (idle_after - idle) / max(1, total_after - total)


def _process_bytes(status: Path = Path("/proc/self/status")) -> dict[str, int]:
    """Memory of this process, now and at its peak; nothing where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    except OSError:
        return {}
    names = {"process (RSS)": "VmRSS", "process (RSS), peak": "VmHWM"}
    return {what: int(lines[key].split()[0]) * 1024 for what, key in names.items() if key in lines}


def _longest(options: BenchOptions) -> int:
    """Tokens of the longest request, with its answer."""
    lengths = [n + 1 for n in options.prefill_tokens] if "prefill" in options.only else []
    if {"latency", "throughput", "rate"} & set(options.only):
        lengths.append(options.prompt_tokens + options.output_tokens)
    return max(lengths, default=0)


def _settings(llm: LLM, options: BenchOptions, params: SamplingParams, name: str) -> dict[str, object]:
    weight = llm.model.model.tok_embeddings.weight
    return {
        "model": name,
        "runs on": f"{weight.device}, {dtype_name(weight.dtype)}, {torch.get_num_threads()} threads",
        "weights": str(llm.weights),
        "versions": f"internlm2 {__version__}, torch {torch.__version__}",
        "prompt tokens": options.prompt_tokens,
        "output tokens": options.output_tokens,
        "prompts": options.num_prompts,
        "rate": f"{options.rate_per_second:g} requests/s",
        "temperature": params.temperature,
        "repeats": options.repeats,
    }


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"
