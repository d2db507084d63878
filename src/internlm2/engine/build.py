"""From a path to an engine: loads the model, decides how much memory its keys and values get, and says so."""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from internlm2.checkpoint import memory
from internlm2.checkpoint.inference import AUTO, NONE, WeightChoice, choose_for, load_for_inference
from internlm2.checkpoint.load import load_checkpoint, require_head
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.plan import PAGE_TOKENS, context_limit, kv_bytes_per_token
from internlm2.checkpoint.resolve import resolve_model
from internlm2.checkpoint.source import Checkpoint, check_complete, dtype_name, expected_shapes
from internlm2.engine.admission import Admission
from internlm2.engine.compute.lora import Adapters, check_adapter
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.engine.compute.split import LeadingRunner
from internlm2.engine.core import Drafter, Engine
from internlm2.engine.frontend import Frontend
from internlm2.engine.options import EngineOptions, is_path
from internlm2.engine.schedule.pages import PagePool
from internlm2.engine.schedule.scheduler import Scheduler
from internlm2.engine.speculative import (
    TRY_COST,
    TRY_COST_FLOAT32,
    DraftModel,
    PromptLookup,
)
from internlm2.engine.workers import Workers
from internlm2.errors import CheckpointError, MemoryBudgetError, RequestError, check
from internlm2.model.config import ModelConfig
from internlm2.model.heads import CausalLM, Model, build_model
from internlm2.parallel import shard_plan
from internlm2.tokenizer import Tokenizer

PAGE_SIZE = PAGE_TOKENS  # as the memory plan counts
GIB = memory.GIB
DEFAULT_GIB = 4.0  # keys and values, unless one sequence of the longest length needs more
SAFE_SHARE = 0.7  # of the memory that is left, at most, when nobody says how much
AUTO_SHARE = 0.9  # the same under max_model_len="auto"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready for requests.

    weights: how they are held. close: lets the other processes of a split model go; else nothing.
    """

    model: Model
    weights: WeightChoice
    tokenizer: Tokenizer
    frontend: Frontend
    adapters: Adapters | None
    max_model_len: int
    close: Callable[[], object]


def open_with_tokenizer(path: str | Path) -> tuple[Checkpoint, Tokenizer]:
    """A checkpoint and the tokenizer beside it. Raises CheckpointError when there is none or it does not fit."""
    check(is_path(path), "path", path, "a folder, a GGUF file, a Hugging Face id or 'demo'")
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


def load(
    path: str | Path, options: EngineOptions, *, head: type[Model] = Model, use: str = "serving"
) -> Loaded:
    """Load a checkpoint with its tokenizer and build an engine around it.

    head: what the checkpoint must hold for `use`. Everything that files and options tell is checked before any weight
    is read. Raises InternLM2Error of all kinds.
    """
    checkpoint, tokenizer = open_with_tokenizer(path)
    _check_head(checkpoint, head, use=use)
    _check_length(checkpoint, options)
    for folder in (options.adapters or {}).values():
        check_adapter(folder, checkpoint.config)
    draft = None if options.draft_path is None else _open_draft(options.draft_path, tokenizer)
    choice = choose_for(
        checkpoint,
        wanted=options.wanted_weights,
        dtype=options.dtype,
        device=options.device,
        needs_plain=options.needs_plain,
    )
    if options.tensor_parallel > 1:
        return _load_split(checkpoint, tokenizer, choice, options)
    model = load_for_inference(checkpoint, choice, device=options.device, rope_mode=options.rope_mode)
    small = None if draft is None else _load_draft(draft, options)
    return build(model, choice, tokenizer, options, draft=small)


def _load_split(
    checkpoint: Checkpoint, tokenizer: Tokenizer, choice: WeightChoice, options: EngineOptions
) -> Loaded:
    shard_plan(checkpoint.config, options.tensor_parallel)  # refuses what cannot be split
    workers = Workers(
        str(checkpoint.path),
        size=options.tensor_parallel,
        dtype=options.dtype,
        device=options.device,
        rope_mode=options.rope_mode,
    )
    try:
        model = load_checkpoint(
            workers.watch(checkpoint),
            dtype=options.dtype,
            device=workers.device,
            rope_mode=options.rope_mode,
            group=workers.group,
        )
        _log.info("%s", choice)
        return build(model, choice, tokenizer, options, workers=workers)
    except BaseException:
        workers.kill()
        raise


def _check_head(checkpoint: Checkpoint, head: type[Model], *, use: str) -> None:
    with torch.device("meta"):
        require_head(build_model(checkpoint.config), head, use=use)


def _check_length(checkpoint: Checkpoint, options: EngineOptions) -> None:
    trained, asked = context_limit(checkpoint.config), options.max_model_len
    if trained is not None and isinstance(asked, int) and asked > trained:
        first = "convert it with `internlm2 model convert` and " if checkpoint.path.is_file() else ""
        raise RequestError(
            f"max_model_len is {asked}, but {checkpoint.path} is made for {trained} tokens. Give at most that, or "
            f'{first}put "rope_scaling": {{"type": "dynamic", "factor": 2.0}} into config.json, which stretches '
            "positions beyond it (docs/long-context.md)."
        )


def build(
    model: Model,
    weights: WeightChoice,
    tokenizer: Tokenizer,
    options: EngineOptions,
    *,
    draft: CausalLM | None = None,
    workers: Workers | None = None,
) -> Loaded:
    """An engine around a model that is loaded already, its weights held as `weights` says.

    draft: a small model that guesses. workers: who holds the other parts of the model.
    """
    weight = model.model.tok_embeddings.weight
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
    return Loaded(model, weights, tokenizer, frontend, adapters, sizes.max_model_len, close)


def _nothing() -> None:
    """What closing a model of one process does."""


def _open_draft(path: str | Path, tokenizer: Tokenizer) -> Checkpoint:
    """The small model that guesses, known to be complete and to have the vocabulary of `tokenizer`."""
    checkpoint, own = open_with_tokenizer(path)
    if list(own.token_bytes) != list(tokenizer.token_bytes):
        differing = sum(a != b for a, b in zip(own.token_bytes, tokenizer.token_bytes, strict=False))
        raise RequestError(
            f"The draft model {path} has another vocabulary ({own.vocab_size} tokens against {tokenizer.vocab_size}, "
            f"{differing} of them different). Give a model with the same tokenizer, or use speculative='lookup'."
        )
    _check_head(checkpoint, CausalLM, use="drafting")
    check_complete(checkpoint)
    return checkpoint


def _load_draft(checkpoint: Checkpoint, options: EngineOptions) -> CausalLM:
    wanted = NONE if options.wanted_weights == NONE else AUTO
    choice = choose_for(checkpoint, wanted=wanted, dtype=options.dtype, device=options.device)
    model = load_for_inference(checkpoint, choice, device=options.device)
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
    remedies = "Raise memory_gib" + ("" if options.kv_dtype == "int8" else " or set kv_dtype='int8'")
    if capacity < 2 or (isinstance(asked, int) and capacity < asked):
        raise MemoryBudgetError(
            f"The memory for keys and values holds {capacity} tokens of {page_bytes / PAGE_SIZE / 1024:.1f} KiB, but "
            f"one sequence may have {longest or 2}. {remedies}, or lower max_model_len."
        )
    max_model_len = capacity if longest is None else min(longest, capacity)
    if asked == "auto":
        _log.info("Longest context that fits: %s tokens.", f"{max_model_len:,}")
    elif trained is not None and asked is None and max_model_len < trained:
        _log.warning(
            "The model takes %s tokens, but the memory holds %s. %s.",
            f"{trained:,}",
            f"{max_model_len:,}",
            remedies,
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
