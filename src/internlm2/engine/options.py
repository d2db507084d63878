"""How an engine runs: the options of `LLM`, checked before anything is opened."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Literal

from internlm2.checkpoint.inference import AUTO, NONE
from internlm2.checkpoint.load import parse_device
from internlm2.checkpoint.plan import PREFILL_CHUNK_TOKENS
from internlm2.checkpoint.source import DTYPES
from internlm2.engine.speculative import NUM_DRAFT_TOKENS
from internlm2.errors import RequestError, check
from internlm2.model.heads import ROPE_MODES, RopeMode
from internlm2.quant.gpu import FP8
from internlm2.quant.weight import FORMATS

_MOST_GIB = 1e9


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """See `LLM` for what each means. Raises RequestError for values that cannot be, alone or together."""

    dtype: str = "bfloat16"
    device: str = "cpu"
    rope_mode: RopeMode = "stateless"
    max_model_len: int | Literal["auto"] | None = None
    kv_dtype: str | None = None
    memory_gib: float | None = None
    host_memory_gib: float = 0.0
    max_num_seqs: int = 64
    chunk_tokens: int = PREFILL_CHUNK_TOKENS
    prefix_cache: bool = True
    deterministic: bool = False
    adapters: Mapping[str, str | Path] | None = None
    speculative: str | Path | None = None
    num_draft_tokens: int = NUM_DRAFT_TOKENS
    tensor_parallel: int = 1
    quantization: str | None = AUTO

    def __post_init__(self) -> None:
        for name, (is_good, allowed) in _ALLOWED.items():
            value = getattr(self, name)
            check(is_good(value), name, value, allowed)
            if isinstance(value, Integral) and not isinstance(value, bool):  # numpy's become plain ones
                object.__setattr__(self, name, int(value))
        parse_device(self.device)
        self._check_together()

    def _check_together(self) -> None:
        """Raise RequestError when two of the options exclude each other."""
        wanted = {
            "deterministic=True": self.deterministic,
            "speculative decoding": self.speculative is not None,
            "a draft model": self.draft_path is not None,
            "adapters": self.adapters is not None,
            "host_memory_gib": self.host_memory_gib > 0,
            "quantization": self.wanted_weights not in (AUTO, NONE),
            "tensor_parallel": self.tensor_parallel > 1,
        }
        for one, other, why, remedy in _APART:
            if wanted[one] and wanted[other]:
                raise RequestError(f"{one} does not go with {other}: {why}. {remedy}.")

    @property
    def wanted_weights(self) -> str:
        """`quantization`, with the word for None: nobody else has to know of both."""
        return NONE if self.quantization is None else self.quantization

    @property
    def needs_plain(self) -> str | None:
        """Which of the options needs the weights as they are; None: none of them."""
        wanted = {
            "deterministic=True": self.deterministic,
            "an adapter": self.adapters is not None,
            "tensor_parallel": self.tensor_parallel > 1,
        }
        return next((name for name, is_wanted in wanted.items() if is_wanted), None)

    @property
    def draft_path(self) -> str | Path | None:
        """Where the draft model lies; None without one."""
        return None if self.speculative == "lookup" else self.speculative


def _is_whole(value: object, *, least: int = 1) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_gib(value: object) -> bool:
    # NOTE: nan fails both comparisons, and a whole number may be too large for any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_GIB


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def is_path(value: object) -> bool:
    """Whether a value can name a file or folder."""
    return isinstance(value, str | os.PathLike)


def _is_length(value: object) -> bool:
    return value is None or (isinstance(value, str) and value == "auto") or _is_whole(value, least=2)


def _is_adapters(value: object) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return all(isinstance(name, str) and name and is_path(folder) for name, folder in value.items())


def _one_of(*words: str | None) -> Callable[[object], bool]:
    return lambda value: (value is None or isinstance(value, str)) and value in words


_COUNT = (_is_whole, "at least 1 (a whole number)")
_FLAG = (_is_flag, "True or False")

# Name of an option -> whether a value of it is possible, and how the possible ones are described.
_ALLOWED: dict[str, tuple[Callable[[object], bool], str]] = {
    "dtype": (_one_of(*DTYPES, "auto"), f"one of {', '.join(DTYPES)}, auto (a text)"),
    "device": (_is_text, "'cpu', 'cuda' or 'cuda:N' (a text)"),
    "rope_mode": (_one_of(*ROPE_MODES), f"one of {', '.join(ROPE_MODES)}"),
    "max_model_len": (_is_length, "'auto', None, or a whole number from 2 on (a prompt and an answer)"),
    "kv_dtype": (_one_of(None, "int8"), "None (as the model) or 'int8'"),
    "memory_gib": (
        lambda value: value is None or (_is_gib(value) and value != 0),
        "above 0 and at most 1e9, or None",
    ),
    "host_memory_gib": (_is_gib, "from 0 to 1e9"),
    "max_num_seqs": _COUNT,
    "chunk_tokens": _COUNT,
    "prefix_cache": _FLAG,
    "deterministic": _FLAG,
    "adapters": (_is_adapters, "a dict of names and folders, such as {'poet': 'poet-folder'}, or None"),
    "speculative": (
        lambda value: value is None or (is_path(value) and value != ""),
        "'lookup', the path of a draft model, or None",
    ),
    "num_draft_tokens": _COUNT,
    "tensor_parallel": _COUNT,
    "quantization": (
        _one_of(AUTO, NONE, *FORMATS, FP8, None),
        f"one of {AUTO}, {NONE}, {', '.join(FORMATS)}, {FP8}, or None (as none)",
    ),
}

_LEAVE = "Leave one of them off"
_DRAFT = f"{_LEAVE}, or use speculative='lookup'"
_MERGE = "Merge the adapter into the weights, or leave one of them off"
# Two wishes that exclude each other, why, and what to do.
_APART = (
    ("deterministic=True", "speculative decoding", "how much is checked together depends on the guesses", _LEAVE),
    ("deterministic=True", "adapters", "their matrix products depend on the batch", _MERGE),
    ("host_memory_gib", "a draft model", "its keys and values stay on the device", _DRAFT),
    ("tensor_parallel", "deterministic=True", "it needs the whole model in one process", _LEAVE),
    ("tensor_parallel", "adapters", "they need the whole model in one process", _MERGE),
    ("tensor_parallel", "a draft model", "it needs the whole model in one process", _DRAFT),
    ("quantization", "deterministic=True", "it is made for plain weights", _LEAVE),
    ("quantization", "adapters", "they are added to plain weights", _MERGE),
    ("quantization", "tensor_parallel", "packed weights are not split yet", _LEAVE),
)  # fmt: skip
