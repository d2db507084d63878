"""How fast a device computes: as its data sheet says, or as `internlm2 bench` measured it with a model."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from internlm2.checkpoint.plan import plan
from internlm2.config import suggest
from internlm2.eval.task import EvalError
from internlm2.model.config import ModelConfig

GIB = 1 << 30
_PROMPT = re.compile(r"prompt of ([1-9][0-9]{0,8}) tokens")


@dataclass(frozen=True)
class Device:
    """Rates of a device. flops_per_second: of dense matrix products in bfloat16.

    prefill_share, decode_share: how much of them a run reaches, of the products and of the memory's bandwidth. 1 is
    what no program can beat. is_measured: the rates are those that a model reached, not those of a data sheet.
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: float
    prefill_share: float = 1.0
    decode_share: float = 1.0
    is_measured: bool = False

    def __post_init__(self) -> None:
        for name in ("flops_per_second", "bytes_per_second", "memory_bytes", "prefill_share", "decode_share"):
            if not 0 < getattr(self, name) < float("inf"):
                raise EvalError(f"{name} is {getattr(self, name)}, but must be a number above 0.")


# The makers' data sheets: dense bfloat16, without sparsity.
DEVICES = {
    "h100": Device("H100 SXM", 989.4e12, 3.35e12, 80 * GIB),
    "h200": Device("H200 SXM", 989.4e12, 4.8e12, 141e9),
    "a100": Device("A100 80GB SXM", 312e12, 2.039e12, 80 * GIB),
}


def find_device(name: str) -> Device:
    """The stated rates of "h100", "h200" or "a100". Raises EvalError otherwise."""
    if name.lower() not in DEVICES:
        raise EvalError(f"No device called {name!r}. {suggest(name, list(DEVICES))}")
    return DEVICES[name.lower()]


def measured_device(report: Path, config: ModelConfig, *, dtype: str = "bfloat16") -> Device:
    """The rates that a model reached where `internlm2 bench MODEL --json` wrote this report.

    config: of the measured model. Its longest prompt says how many products a second, its answers that were written
    alone how many bytes a second, counted as `estimate` counts them for weights of `dtype`: whatever else a step takes,
    and other weights in memory, are in the rates. Memory is not looked at.
    Raises EvalError for a file that is no such report.
    """
    settings, medians = _read(report)
    prompts = {int(m[1]): value for (_, what, _), value in medians.items() if (m := _PROMPT.fullmatch(what))}
    step = medians.get(("latency", "time per token after it", "ms"))
    if not prompts or step is None:
        raise _bad(report, "it has not both prefill and latency")
    longest = max(prompts)
    prompt = plan(config, num_tokens=longest, dtype=dtype)
    flops = prompt.prefill_linear_flops + prompt.prefill_attention_flops
    keys = _number(report, settings, "prompt tokens") + _number(report, settings, "output tokens") / 2
    read_bytes = plan(config, num_tokens=max(1, round(keys)), dtype=dtype).decode_read_bytes
    return Device(
        f"{settings.get('model')} on {settings.get('runs on')}",
        flops_per_second=flops * prompts[longest] / longest,
        bytes_per_second=read_bytes * 1000 / step,
        memory_bytes=_MUCH_BYTES,
        is_measured=True,
    )


_MUCH_BYTES = float(1 << 50)
Figure = tuple[str, str, str]  # part, what, unit


def _read(report: Path) -> tuple[Mapping[str, object], dict[Figure, float]]:
    """The settings of a report and the medians of its figures."""
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        rows = [(row["part"], row["what"], row["unit"], row["median"]) for row in found["figures"]]
        settings = found["settings"]
    except OSError as error:
        raise EvalError(f"{report} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _bad(report, f"{type(error).__name__}: {error}") from error
    if not isinstance(settings, dict):
        raise _bad(report, "its settings are no object")
    medians: dict[Figure, float] = {}
    for part, what, unit, median in rows:
        if not all(isinstance(text, str) for text in (part, what, unit)) or not _is_rate(median):
            raise _bad(report, f"a figure is {[part, what, unit, median]!r:.80}")
        medians[part, what, unit] = median
    return settings, medians


def _number(report: Path, settings: Mapping[str, object], name: str) -> int:
    value = settings.get(name)
    if not isinstance(value, int) or not 0 < value < 1 << 40:
        raise _bad(report, f"{name} is {value!r:.80}")
    return value


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _bad(report: Path, why: str) -> EvalError:
    return EvalError(
        f"{report} is no report of a model's speed: {why}. Write one where it runs: "
        f"internlm2 bench MODEL --only prefill,latency --json > {report}"
    )
