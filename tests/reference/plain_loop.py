"""The plain generation loop, the oracle of the engine: dense keys and values, one prompt or many side by side.

Each sequence has one rotary base, fixed by its own length limit when it starts (design: dynamic NTK without
state). Prompts enter in chunks, so memory grows with the prompt and not with its square.
"""

import itertools
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from internlm2.checkpoint import memory
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.sampler import SamplingState, sample
from internlm2.errors import RequestError
from internlm2.model.heads import CausalLM
from reference.dense_cache import CacheAttend, DenseCache

PREFILL_CHUNK_TOKENS = 512

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """token_ids: the new tokens, without the one that ended them. finish_reason: "stop" or "length"."""

    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Step:
    """One new token of one prompt. row: which prompt. finish_reason: None while it goes on.

    A stop token is reported with its reason, so that callers can count it; it is not part of the answer.
    """

    row: int
    token_id: int
    finish_reason: FinishReason | None


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    stop_ids: frozenset[int] = frozenset(),
    vocab_size: int | None = None,
) -> list[Completion]:
    """Complete each prompt of ids; results in prompt order.

    params: for all prompts, or one for each. stop_ids: the model's own end tokens, ignored under
    `params.ignore_eos`. vocab_size: how many ids the tokenizer has, where the embedding has more rows; the others
    are never produced. Raises RequestError for an empty prompt or ids outside the vocabulary, MemoryBudgetError
    when the keys and values cannot fit.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length"] * len(prompts)
    for step in stream(model, prompts, params, stop_ids=stop_ids, vocab_size=vocab_size):
        if step.finish_reason != "stop":
            tokens[step.row].append(step.token_id)
        if step.finish_reason is not None:
            reasons[step.row] = step.finish_reason
    return [Completion(*pair) for pair in zip(tokens, reasons, strict=True)]


@torch.inference_mode()
def stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    stop_ids: frozenset[int] = frozenset(),
    vocab_size: int | None = None,
) -> Iterator[Step]:
    """As `generate`, token by token: one `Step` for each unfinished prompt, in prompt order, round by round."""
    vocab_size = vocab_size or model.config.vocab_size
    check_prompts(prompts, vocab_size=vocab_size)
    if not prompts:
        return
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    assert len(each) == len(prompts)
    stops = [_stops(p, stop_ids, vocab_size=vocab_size) for p in each]
    device = model.model.tok_embeddings.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    limits = lengths + torch.tensor([p.max_tokens for p in each], device=device)
    cache = _new_cache(model, num_rows=len(prompts), capacity=int(limits.max()))
    states = [
        SamplingState(p, ids, vocab_size=vocab_size, stop_ids=ends, seed=_seed(p))
        for p, ids, ends in zip(each, prompts, stops, strict=True)
    ]
    rows = list(range(len(prompts)))  # cache row -> prompt
    logits = torch.cat([prefill(model, cache, p, limits[i], row=i) for i, p in enumerate(prompts)])  # (B, V)
    for num_done in itertools.count(1):
        alive: list[int] = []
        chosen: list[int] = []
        sampled = sample(logits, [states[row] for row in rows])
        for i, row in enumerate(rows):
            error, token = sampled.errors[i], sampled.token_ids[i]
            if error is not None:
                raise error
            states[row].push(token)
            is_last = num_done == each[row].max_tokens
            reason = "stop" if token in stops[row] else "length" if is_last else None
            yield Step(row, token, reason)
            if reason is None:
                alive.append(i)
                chosen.append(token)
        if not alive:
            return
        if len(alive) < len(rows):
            kept = torch.tensor(alive, device=device)
            cache.keep_rows(kept)
            rows, lengths, limits = [rows[i] for i in alive], lengths[kept], limits[kept]
        logits = decode(model, cache, torch.tensor(chosen, device=device), lengths, limits)
        lengths = lengths + 1


def prefill(
    model: CausalLM,
    cache: DenseCache,
    prompt: Sequence[int],
    limit: torch.Tensor,
    *,
    row: int = 0,
    start: int = 0,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> torch.Tensor:
    """Run a prompt into cache row `row`, whose first `start` tokens are there already; chunk by chunk.

    limit: scalar int64, how long this sequence may become. Returns logits of the last position (1, V).
    """
    device = limit.device
    ids = torch.tensor(prompt, device=device)[None]  # (1, T)
    rope_limit = limit if model.rope_mode == "stateless" else torch.tensor(len(prompt), device=device)
    hidden = torch.empty(0)
    for first in range(start, len(prompt), chunk_tokens):
        chunk = ids[:, first : first + chunk_tokens]
        positions = torch.arange(first, first + chunk.shape[1], device=device)[None]
        hidden = model.hidden_states(
            chunk,
            position_ids=positions,
            length_limits=rope_limit[None],
            attend=CacheAttend(cache, positions, first_row=row),
        )
    return model.logits(hidden[:, -1:])[:, 0]


def decode(
    model: CausalLM, cache: DenseCache, tokens: torch.Tensor, lengths: torch.Tensor, limits: torch.Tensor
) -> torch.Tensor:
    """One token more for every row. tokens, lengths (before this token), limits: (B,) int64 -> logits (B, V)."""
    positions = lengths[:, None]  # (B, 1)
    logits = model(
        tokens[:, None],
        position_ids=positions,
        length_limits=limits if model.rope_mode == "stateless" else lengths + 1,
        attend=CacheAttend(cache, positions),
    )
    return logits[:, 0]


def _new_cache(model: CausalLM, *, num_rows: int, capacity: int) -> DenseCache:
    weight = model.model.tok_embeddings.weight
    memory.check_fits(
        num_rows * memory.kv_cache_bytes(model.config, capacity, bytes_per_value=weight.dtype.itemsize),
        device=weight.device,
        what=f"The key/value cache of {num_rows} x {capacity} tokens",
    )
    return DenseCache(
        model.config, num_rows=num_rows, capacity=capacity, dtype=weight.dtype, device=weight.device
    )


def _seed(params: SamplingParams) -> int:
    return secrets.randbits(63) if params.seed is None else params.seed


def _stops(params: SamplingParams, stop_ids: frozenset[int], *, vocab_size: int) -> frozenset[int]:
    for token in params.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"stop_token_ids holds {token}, but ids go from 0 to {vocab_size - 1}.")
    own = frozenset() if params.ignore_eos else stop_ids
    return own | frozenset(params.stop_token_ids)


def check_prompts(prompts: Sequence[Sequence[int]], *, vocab_size: int) -> None:
    """Raise RequestError for an empty prompt or an id that the embedding does not have."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise RequestError(f"Prompt {number} is empty. Give at least one token, such as BOS.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            bad = next(i for i in prompt if not 0 <= i < vocab_size)
            raise RequestError(
                f"Prompt {number} has token id {bad}, but the embedding has {vocab_size} rows. "
                "The tokenizer belongs to another model."
            )
