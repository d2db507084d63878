"""From a path to an engine: loads the model, decides how much memory its keys and values get, and says so."""

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from internlm2.checkpoint import memory
from internlm2.checkpoint.load import load_checkpoint, require_head
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.plan import (
    PAGE_TOKENS,
    PREFILL_CHUNK_TOKENS,
    context_limit,
    kv_bytes_per_token,
)
from internlm2.checkpoint.resolve import resolve_model
from internlm2.checkpoint.source import Checkpoint, dtype_name, expected_shapes
from internlm2.engine.admission import Admission
from internlm2.engine.compute.lora import Adapters
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.engine.compute.split import LeadingRunner
from internlm2.engine.core import Drafter, Engine
from internlm2.engine.frontend import Frontend
from internlm2.engine.schedule.pages import PagePool
from internlm2.engine.schedule.scheduler import Scheduler
from internlm2.engine.speculative import (
    NUM_DRAFT_TOKENS,
    TRY_COST,
    TRY_COST_FLOAT32,
    DraftModel,
    PromptLookup,
)
from internlm2.engine.workers import Workers
from internlm2.errors import CheckpointError, MemoryBudgetError, RequestError, check
from internlm2.model.config import ModelConfig
from internlm2.model.heads import CausalLM, Model, RopeMode
from internlm2.parallel import shard_plan
from internlm2.quant.linear import quantize_model
from internlm2.quant.weight import parse_format
from internlm2.tokenizer import Tokenizer

PAGE_SIZE = PAGE_TOKENS  # as the memory plan counts
GIB = memory.GIB
DEFAULT_GIB = 4.0  # keys and values, unless one sequence of the longest length needs more
SAFE_SHARE = 0.7  # of the memory that is left, at most, when nobody says how much
AUTO_SHARE = 0.9  # the same under max_model_len="auto"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine runs. See `LLM` for what each means."""

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
    quantization: str | None = None

    def __post_init__(self) -> None:
        check(self.max_num_seqs >= 1, "max_num_seqs", self.max_num_seqs, "at least 1")
        check(self.chunk_tokens >= 1, "chunk_tokens", self.chunk_tokens, "at least 1")
        is_positive = self.memory_gib is None or self.memory_gib > 0
        check(is_positive, "memory_gib", self.memory_gib, "above 0, or None")
        check(self.host_memory_gib >= 0, "host_memory_gib", self.host_memory_gib, "at least 0")
        check(self.kv_dtype in (None, "int8"), "kv_dtype", self.kv_dtype, "None (as the model) or 'int8'")
        length = self.max_model_len
        is_length = length is None or length == "auto" or (isinstance(length, int) and length >= 2)
        check(is_length, "max_model_len", length, "'auto', None, or at least 2 (a prompt and an answer)")
        check(self.num_draft_tokens >= 1, "num_draft_tokens", self.num_draft_tokens, "at least 1")
        check(self.tensor_parallel >= 1, "tensor_parallel", self.tensor_parallel, "at least 1")
        self._check_split()
        self._check_quantization()
        if self.deterministic and self.speculative is not None:
            raise RequestError(
                "deterministic=True does not go with speculative decoding: how many tokens are checked together "
                "depends on the guesses. Leave one of them off."
            )
        if self.host_memory_gib > 0 and self.draft_path is not None:
            raise RequestError(
                "host_memory_gib does not go with a draft model, whose keys and values stay on the device. Leave "
                "one of them off, or use speculative='lookup'."
            )
        if self.deterministic and self.adapters:
            raise RequestError(
                "deterministic=True does not go with adapters: their matrix products depend on the batch. Merge the "
                "adapter into the weights, or leave deterministic off."
            )

    def _check_split(self) -> None:
        kinds = {
            "deterministic=True": self.deterministic,
            "adapters": bool(self.adapters),
            "a draft model": self.draft_path is not None,
        }
        for name, is_wanted in kinds.items():
            if self.tensor_parallel > 1 and is_wanted:
                raise RequestError(
                    f"tensor_parallel={self.tensor_parallel} does not go with {name}, which needs the whole model in "
                    "one process. Leave one of them off."
                )

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        parse_format(self.quantization)
        kinds = {
            "deterministic=True": self.deterministic,
            "adapters": self.adapters is not None,
            "tensor_parallel": self.tensor_parallel > 1,
        }
        for name, is_wanted in kinds.items():
            if is_wanted:
                raise RequestError(
                    f"quantization={self.quantization!r} does not go with {name} yet. Leave one of them off."
                )

    @property
    def draft_path(self) -> str | Path | None:
        """Where the draft model lies; None without one."""
        return None if self.speculative == "lookup" else self.speculative


@dataclass(frozen=True)
class Loaded:
    """A model that is ready for requests. close: lets the other processes of a split model go; else nothing."""

    model: Model
    tokenizer: Tokenizer
    frontend: Frontend
    adapters: Adapters | None
    max_model_len: int
    close: Callable[[], object]


def open_with_tokenizer(path: str | Path) -> tuple[Checkpoint, Tokenizer]:
    """A checkpoint and the tokenizer beside it. Raises CheckpointError when there is none or it does not fit."""
    checkpoint = open_checkpoint(resolve_model(path))
    if checkpoint.tokenizer_folder is None:
        raise CheckpointError(
            f"{checkpoint.path} has weights but no tokenizer. Convert it with a tokenizer beside it: "
            "`internlm2 model convert`, then copy tokenizer.model into the new folder."
        )
    tokenizer = Tokenizer.from_pretrained(checkpoint.tokenizer_folder)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, but the embedding has "
            f"{checkpoint.config.vocab_size} rows. The tokenizer files belong to another model; copy the right ones."
        )
    return checkpoint, tokenizer


def load(path: str | Path, options: EngineOptions) -> Loaded:
    """Load a checkpoint of any head with its tokenizer and build an engine around it."""
    checkpoint, tokenizer = open_with_tokenizer(path)
    if options.tensor_parallel == 1:
        model = load_checkpoint(
            checkpoint, dtype=options.dtype, device=options.device, rope_mode=options.rope_mode
        )
        if options.quantization is not None:
            quantize_model(model, parse_format(options.quantization))
        return build(model, tokenizer, options)
    shard_plan(
        checkpoint.config, options.tensor_parallel
    )  # refuses what cannot be split, before anything starts
    workers = Workers(
        str(checkpoint.path),
        size=options.tensor_parallel,
        dtype=options.dtype,
        device=options.device,
        rope_mode=options.rope_mode,
    )
    try:
        model = load_checkpoint(
            checkpoint,
            dtype=options.dtype,
            device=workers.device,
            rope_mode=options.rope_mode,
            group=workers.group,
        )
        return build(model, tokenizer, options, workers)
    except BaseException:
        workers.kill()
        raise


def build(
    model: Model, tokenizer: Tokenizer, options: EngineOptions, workers: Workers | None = None
) -> Loaded:
    """An engine around a model that is loaded already. workers: who holds the other parts of it."""
    weight = model.model.tok_embeddings.weight
    draft = None if options.draft_path is None else _load_draft(options.draft_path, tokenizer, options)
    left = memory.available_on(weight.device) if workers is None else workers.bytes_left()
    sizes = _sizes(
        model.config, None if draft is None else draft.config, options, dtype=weight.dtype, left=left
    )
    pool = PagePool(
        sizes.num_pages,
        page_size=PAGE_SIZE,
        num_host_pages=sizes.num_host_pages,
        shares_prefixes=options.prefix_cache and not options.deterministic,
    )
    cache = PageCache(
        model.config,
        num_pages=sizes.num_pages,
        page_size=PAGE_SIZE,
        dtype=weight.dtype,
        device=weight.device,
        kv_dtype=options.kv_dtype,
        num_host_pages=sizes.num_host_pages,
    )
    adapters = Adapters.attach(model) if options.adapters is not None else None
    for name, folder in (options.adapters or {}).items():
        assert adapters is not None
        adapters.add(name, folder)
    close: Callable[[], object] = _nothing
    if workers is None:
        runner = Runner(model, cache, adapters=adapters, is_deterministic=options.deterministic)
    else:
        leader = workers.lead(cache, num_pages=sizes.num_pages, num_host_pages=sizes.num_host_pages)
        runner = LeadingRunner(model, cache, leader)
        close = weakref.finalize(
            runner, workers.close, leader
        )  # at the end of the interpreter, if not before
    scheduler = Scheduler(
        pool,
        max_num_seqs=options.max_num_seqs,
        chunk_tokens=options.chunk_tokens,
        fixed_chunks=options.deterministic,
    )
    admission = Admission(
        model.config,
        tokenizer,
        max_model_len=sizes.max_model_len,
        rope_mode=model.rope_mode,
        adapters=lambda: () if adapters is None else adapters.names,
    )
    drafter = _drafter(draft, model, options, num_pages=sizes.num_pages)
    engine = Engine(runner, scheduler, vocab_size=tokenizer.vocab_size, drafter=drafter)
    frontend = Frontend(engine, tokenizer, admission)
    return Loaded(model, tokenizer, frontend, adapters, sizes.max_model_len, close)


def _nothing() -> None:
    """What closing a model of one process does."""


def _load_draft(path: str | Path, tokenizer: Tokenizer, options: EngineOptions) -> CausalLM:
    """The small model that guesses, once its vocabulary is known to be that of `tokenizer`."""
    checkpoint, own = open_with_tokenizer(path)
    if list(own.token_bytes) != list(tokenizer.token_bytes):
        differing = sum(a != b for a, b in zip(own.token_bytes, tokenizer.token_bytes, strict=False))
        raise RequestError(
            f"The draft model {path} has another vocabulary ({own.vocab_size} tokens against {tokenizer.vocab_size}, "
            f"{differing} of them different). Give a model with the same tokenizer, or use speculative='lookup'."
        )
    model = load_checkpoint(checkpoint, dtype=options.dtype, device=options.device)
    return require_head(model, CausalLM, use="drafting")


def _drafter(
    draft: CausalLM | None, model: Model, options: EngineOptions, *, num_pages: int
) -> Drafter | None:
    if options.speculative is None:
        return None
    own = model.model.tok_embeddings.weight
    is_slow = own.dtype == torch.float32 and own.device.type == "cpu"
    try_cost = TRY_COST_FLOAT32 if is_slow else TRY_COST
    if draft is None:
        return PromptLookup(num_draft_tokens=options.num_draft_tokens, try_cost=try_cost)
    weight = draft.model.tok_embeddings.weight
    cache = PageCache(
        draft.config, num_pages=num_pages, page_size=PAGE_SIZE, dtype=weight.dtype, device=weight.device
    )
    cost = _num_weights(draft) / _num_weights(model)
    return DraftModel(draft, cache, cost=cost, num_draft_tokens=options.num_draft_tokens, try_cost=try_cost)


def _num_weights(model: Model) -> int:
    return memory.count_parameters(expected_shapes(model.config)).total  # packed weights are no parameters


@dataclass(frozen=True)
class _Sizes:
    num_pages: int
    num_host_pages: int
    max_model_len: int


def _sizes(
    config: ModelConfig,
    draft: ModelConfig | None,
    options: EngineOptions,
    *,
    dtype: torch.dtype,
    left: int | None,
) -> _Sizes:
    """How many pages there are, and the longest sequence that they allow.

    draft: of the draft model. left: bytes that the device has left for this process; None: the system does not tell.
    """
    page_bytes = PAGE_SIZE * kv_bytes_per_token(config, options.kv_dtype or dtype_name(dtype))
    if draft is not None:
        page_bytes += PAGE_SIZE * kv_bytes_per_token(draft, dtype_name(dtype))
    trained = context_limit(config)
    asked = options.max_model_len
    longest = asked if isinstance(asked, int) else trained  # None: as long as the memory allows
    num_pages = _budget_bytes(options, longest, page_bytes, left) // page_bytes
    if longest is not None:
        num_pages = min(num_pages, options.max_num_seqs * -(-longest // PAGE_SIZE))
    capacity = num_pages * PAGE_SIZE
    if capacity < 2 or (isinstance(asked, int) and capacity < asked):
        raise MemoryBudgetError(
            f"The memory for keys and values holds {capacity} tokens of {page_bytes / PAGE_SIZE / 1024:.1f} KiB, but "
            f"one sequence may have {longest or 2}. Raise memory_gib, lower max_model_len, or set kv_dtype='int8'."
        )
    max_model_len = capacity if longest is None else min(longest, capacity)
    if asked == "auto":
        _log.info("Longest context that fits: %s tokens.", f"{max_model_len:,}")
    elif trained is not None and asked is None and max_model_len < trained:
        _log.warning(
            "The model takes %s tokens, but the memory holds %s. Raise memory_gib or set kv_dtype='int8'.",
            f"{trained:,}",
            f"{max_model_len:,}",
        )
    num_host_pages = int(options.host_memory_gib * GIB) // page_bytes
    memory.check_fits(
        num_host_pages * page_bytes * options.tensor_parallel,
        device=torch.device("cpu"),
        what="The host memory for idle keys and values",
    )
    return _Sizes(num_pages, num_host_pages, max_model_len)


def _budget_bytes(options: EngineOptions, longest: int | None, page_bytes: int, left: int | None) -> int:
    if options.memory_gib is not None:
        budget = int(options.memory_gib * GIB)
        if left is not None and budget > left:
            raise MemoryBudgetError(
                f"memory_gib is {options.memory_gib:g}, but {options.device} has {left / GIB:.1f} GiB left. Close "
                "other programs, or give less."
            )
        return budget
    if left is None:
        return int(DEFAULT_GIB * GIB)
    if options.max_model_len == "auto":
        return int(left * AUTO_SHARE)
    needed = 0 if longest is None else -(-longest // PAGE_SIZE) * page_bytes
    wanted = max(int(DEFAULT_GIB * GIB), needed)
    return min(wanted, int(left * (AUTO_SHARE if options.device.startswith("cuda") else SAFE_SHARE)))
