"""What an evaluation will cost, before it runs: prompts and tokens exactly, hours from the device's stated rates.

Tokens are counted as our engine computes them: labels of one token share their question's pass, and what prompts have
in common from their beginning is computed once, in whole pages. Answers are as long as their limit allows at most; how
long they get, only a run can say. Times are a roofline (Williams, Waterman, Patterson 2009): work over rate, no more.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from internlm2.checkpoint.plan import PAGE_TOKENS, plan
from internlm2.errors import RequestError
from internlm2.eval.backends.engine import encode_prompt, scored_from, without_system
from internlm2.eval.devices import GIB, Device
from internlm2.eval.model import Prompt, Request, fit
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import Part, RunSettings
from internlm2.eval.run_folder import Sample
from internlm2.eval.runner import request_of
from internlm2.eval.task import EvalError
from internlm2.model.config import ModelConfig
from internlm2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Load:
    """What a task asks of a model.

    prompt_tokens: as `results.json` counts them, all labels together. computed_tokens: those that are left when what
    prompts share is computed once. attended: keys that the computed ones look at, summed. output_tokens: at most, or
    as measured. decoded_keys: keys that those look at. num_answers: of written ones. num_scored: positions whose
    logits labels need.
    """

    task: str
    num_questions: int = 0
    num_errors: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    attended: int = 0
    num_scored: int = 0
    num_answers: int = 0
    output_tokens: float = 0.0
    decoded_tokens: float = 0.0
    decoded_keys: float = 0.0

    def __add__(self, other: "Load") -> "Load":
        """Both together, under the name of the first."""
        own, more = asdict(self), asdict(other)
        return Load(self.task, **{name: own[name] + more[name] for name in own if name != "task"})


class _Counter:
    """Prompts one after the other, and the pages of all of them: where pages give way, more is computed."""

    def __init__(self, config: ModelConfig | None) -> None:
        scaling = None if config is None else config.rope_scaling
        is_dynamic = config is not None and scaling is not None and scaling.kind == "dynamic"
        self._window = config.max_position_embeddings if config is not None and is_dynamic else math.inf
        self._pages: dict[tuple[int, ...], int] = {}  # the page before it and its ids -> its number

    def computed(self, ids: Sequence[int], *, wanted_from: int, num_total: int) -> int:
        """How many of these tokens are not there yet; those from `wanted_from` are computed in any case.

        num_total: with the answer. It decides about the rotary angles of texts beyond the trained length, and only
        texts with the same angles share.
        """
        size, num_shared = PAGE_TOKENS, 0
        before = -1 - num_total if num_total > self._window else -1
        for start in range(0, len(ids) - size + 1, size):
            key = (before, *ids[start : start + size])
            if key in self._pages and num_shared == start and start + size <= wanted_from:
                num_shared = start + size
            before = self._pages.setdefault(key, len(self._pages))
        return len(ids) - num_shared


def count(
    tokenizer: Tokenizer,
    parts: Sequence[Part],
    settings: RunSettings,
    *,
    max_model_len: int,
    answers: Mapping[str, "MeanAnswer"] | None = None,
    config: ModelConfig | None = None,
) -> list[Load]:
    """What each task asks. answers: how long they are by task, as a run measured it; None: as long as they may be.

    config: of the model; None: as if no text were longer than those that it was trained on.
    """
    tokenizer = without_system(tokenizer)
    counter = _Counter(config)

    def encode(prompt: Prompt, label: str) -> list[int]:
        return encode_prompt(tokenizer, prompt, label)

    def load_of(part: Part) -> Load:
        mean = (answers or {}).get(part.facts.name)
        total = Load(part.facts.name)
        for item in part.items:
            request = request_of(item, find_profile(settings.profile), settings)
            try:
                fitted = fit(
                    request, encode, max_model_len=max_model_len, num_start=int(tokenizer.bos_id is not None)
                )
            except RequestError:
                total += Load(total.task, num_questions=1, num_errors=1)
            else:
                total += _question(request, fitted.token_ids, mean, counter)
        return total

    return [load_of(part) for part in parts]


@dataclass(frozen=True)
class MeanAnswer:
    """How long answers are on average. tokens: written. decoded_tokens: read to write the next, or the end."""

    tokens: float
    decoded_tokens: float

    @classmethod
    def longest(cls, max_tokens: int) -> "MeanAnswer":
        """An answer that its limit cuts: its last token is never read."""
        return cls(max_tokens, max(0, max_tokens - 1))


def mean_answers(samples: Iterable[Sample]) -> dict[str, MeanAnswer]:
    """The mean answer that was written, by task."""
    found: dict[str, list[tuple[int, int]]] = {}
    for sample in samples:
        if sample.finish_reason and not sample.error:
            is_cut = sample.finish_reason == "length"
            pair = sample.output_tokens, max(0, sample.output_tokens - is_cut)
            found.setdefault(sample.task, []).append(pair)
    return {
        task: MeanAnswer(*map(statistics.fmean, zip(*pairs, strict=True))) for task, pairs in found.items()
    }


def _question(
    request: Request, texts: Sequence[list[int]], mean: MeanAnswer | None, counter: _Counter
) -> Load:
    """One question. mean: how long its answer is; None: as long as it may be."""
    computed = attended = num_scored = 0
    for ids, wanted_from, num_rows in _passes(texts, has_labels=bool(request.labels)):
        new = counter.computed(ids, wanted_from=wanted_from, num_total=len(ids) + max(1, request.max_tokens))
        computed += new
        attended += _keys(len(ids) - new, len(ids))
        num_scored += num_rows
    load = Load(
        "",
        num_questions=1,
        prompt_tokens=sum(map(len, texts)),
        computed_tokens=computed,
        attended=attended,
        num_scored=num_scored,
    )
    if request.labels:
        return load
    longest = MeanAnswer.longest(request.max_tokens)
    if mean is None or mean.tokens > longest.tokens:
        mean = longest
    decoded = mean.decoded_tokens
    return replace(
        load,
        num_answers=1,
        output_tokens=mean.tokens,
        decoded_tokens=decoded,
        decoded_keys=decoded * (len(texts[0]) + (decoded + 1) / 2),
    )


def _passes(texts: Sequence[list[int]], *, has_labels: bool) -> list[tuple[list[int], int, int]]:
    """The texts that the engine computes for a question, where logits are first wanted, and of how many positions."""
    if not has_labels:
        return [(texts[0], len(texts[0]) - 1, 0)]
    start = scored_from(texts)
    bodies = dict.fromkeys(tuple(ids[:-1]) for ids in texts)
    return [(list(ids), start - 1, len(ids) - start + 1) for ids in bodies]


def _keys(first: int, end: int) -> int:
    """Keys that the positions from `first` up to `end` look at: each sees itself and all before it."""
    return (end * (end + 1) - first * (first + 1)) // 2


@dataclass(frozen=True)
class Cost:
    """Seconds of a task. prefill_*: of prompts; decode_*: of answers. num_at_once: of those written together."""

    load: Load
    prefill_flops: int
    decode_flops: int
    decode_bytes: int
    num_at_once: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.prefill_seconds + self.decode_seconds


def estimate(
    loads: Sequence[Load],
    config: ModelConfig,
    device: Device,
    *,
    max_num_seqs: int = 64,
    dtype: str = "bfloat16",
) -> list[Cost]:
    """How long tasks take at the least. dtype: of weights, keys and values.

    Prompts are bound by matrix products. A step of answering reads all weights but the embedding table, and the keys
    and values of the answers that are written together: as many as `max_num_seqs` and the memory allow.
    Raises EvalError where the weights alone do not fit.
    """
    one, two = (plan(config, num_tokens=count, dtype=dtype) for count in (1, 2))
    flops_per_token = two.prefill_linear_flops - one.prefill_linear_flops
    flops_per_row = one.prefill_linear_flops - flops_per_token  # of logits
    flops_per_key = one.decode_attention_flops
    step_bytes = one.decode_read_bytes - one.kv_bytes_per_token
    left_bytes = device.memory_bytes - one.weight_bytes
    if left_bytes <= 0:
        raise EvalError(
            f"The weights have {one.weight_bytes / GIB:.1f} GiB, but {device.name} has "
            f"{device.memory_bytes / GIB:.1f} GiB. Choose a smaller shape or another device."
        )
    costs: list[Cost] = []
    for load in loads:
        flops = flops_per_token * load.computed_tokens + flops_per_key * load.attended
        flops += flops_per_row * (load.num_scored + load.num_answers)
        num_at_once, read, products = 0, 0.0, 0.0
        if load.decoded_tokens:
            mean_keys = max(1.0, load.decoded_keys / load.decoded_tokens)
            room = int(left_bytes / (mean_keys * one.kv_bytes_per_token))
            num_at_once = max(1, min(max_num_seqs, load.num_answers, room))
            read = step_bytes * load.decoded_tokens / num_at_once + one.kv_bytes_per_token * load.decoded_keys
            products = (flops_per_token + flops_per_row) * load.decoded_tokens
            products += flops_per_key * load.decoded_keys
        decode_seconds = max(
            read / (device.bytes_per_second * device.decode_share),
            products / (device.flops_per_second * device.prefill_share),
        )
        prefill_seconds = flops / (device.flops_per_second * device.prefill_share)
        costs.append(
            Cost(load, flops, round(products), round(read), num_at_once, prefill_seconds, decode_seconds)
        )
    return costs


def _cells(load: Load, prefill_seconds: float, decode_seconds: float) -> tuple[str, ...]:
    counts = (load.num_questions, load.prompt_tokens, load.computed_tokens, load.output_tokens)
    return load.task, *(f"{n:,.0f}" for n in counts), f"{prefill_seconds:,.1f}", f"{decode_seconds:,.1f}"


def as_text(costs: Sequence[Cost], device: Device, *, are_answers_measured: bool) -> str:
    """A table for the terminal."""
    names = (
        "task",
        "questions",
        "prompt tokens",
        "computed",
        "answer tokens",
        "prefill s",
        "decode s",
        "at once",
    )
    whole = sum((cost.load for cost in costs), Load("all"))
    seconds = sum(c.prefill_seconds for c in costs), sum(c.decode_seconds for c in costs)
    rows = [names]
    rows += [(*_cells(c.load, c.prefill_seconds, c.decode_seconds), str(c.num_at_once)) for c in costs]
    rows.append((*_cells(whole, *seconds), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:>{width}}" if n else f"{cell:<{width}}" for n, (cell, width) in enumerate(pairs)
        ).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    total = sum(seconds)
    length = "as long as in the run" if are_answers_measured else "as long as their limit allows"
    lines += [
        "",
        _rates(device),
        f"answers are {length}; computed: tokens of prompts that are left when what they share is computed once",
        f"all together {'about' if device.is_measured else 'at least'} {total / 3600:,.2f} hours ({total:,.0f} s), "
        "without loading the model",
    ]
    if whole.num_errors:
        lines.append(f"{whole.num_errors:,} questions do not fit into the context and are not counted")
    return "\n".join(lines)


def _rates(device: Device) -> str:
    rates = device.flops_per_second / 1e12, device.bytes_per_second / 1e12
    if device.is_measured:
        return f"{device.name}: {rates[0]:.3g} TFLOP/s and {rates[1]:.3g} TB/s were measured"
    return (
        f"{device.name}: {rates[0]:g} TFLOP/s of which {device.prefill_share:.0%} are reached, "
        f"{rates[1]:g} TB/s of which {device.decode_share:.0%}"
    )
