"""Attention of prompts by torch's own kernels: FlashAttention over several prompts at once where the GPU has it.

Row t of the T new rows of a prompt sees its S keys up to number S - T + t: masks are aligned at the lower right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Method = Literal["varlen", "sdpa"]
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_LONGEST_FLASH_HEAD = 256
_FLASH_CAPABILITY = (8, 0)
_QUERIES_AT_ONCE = 128  # without FlashAttention, when masks and scores would become large
_MANY_KEYS = 8192


@dataclass(frozen=True)
class Prompt:
    """One prompt: its first row in the batch, how many rows are new, and how many keys the last of them sees."""

    start: int
    num_rows: int
    num_keys: int


def choose_method(
    dtype: torch.dtype, head_dim: int, *, capability: tuple[int, int] | None, has_flash: bool
) -> Method:
    """capability: of the GPU; None for other devices. has_flash: whether torch was built with FlashAttention."""
    is_able = capability is not None and capability >= _FLASH_CAPABILITY and has_flash
    fits = dtype in _FLASH_DTYPES and head_dim % 8 == 0 and head_dim <= _LONGEST_FLASH_HEAD
    return "varlen" if is_able and fits else "sdpa"


def method_for(q: torch.Tensor) -> Method:
    """The method for queries like `q` on their device."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    has_flash = q.is_cuda and torch.backends.cuda.is_flash_attention_available()
    return choose_method(q.dtype, q.shape[-1], capability=capability, has_flash=has_flash)


def attend_prompts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompts: Sequence[Prompt],
    *,
    scale: float,
    method: Method,
) -> torch.Tensor:
    """q: (N, H, D), rows of `prompts` side by side. k, v: (S, K, D), all keys of the first prompt, then of the next.
    Returns (N, H, D). `start` of the prompts is not looked at.
    """
    if method == "varlen":
        return _attend_varlen(q, k, v, prompts, scale=scale)
    out = torch.empty_like(q)
    row = key = 0
    for prompt in prompts:
        rows, keys = slice(row, row + prompt.num_rows), slice(key, key + prompt.num_keys)
        out[rows] = _attend_one(q[rows], k[keys], v[keys], scale=scale)
        row, key = rows.stop, keys.stop
    return out


def _attend_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """q: (T, H, D), k, v: (S, K, D) -> (T, H, D)."""
    if len(k) > _MANY_KEYS and len(q) > _QUERIES_AT_ONCE:
        num_seen = len(k) - len(q)
        parts: list[torch.Tensor] = []
        for block in q.split(_QUERIES_AT_ONCE):
            num_seen += len(block)
            parts.append(_attend_one(block, k[:num_seen], v[:num_seen], scale=scale))
        return torch.cat(parts)
    is_square = len(q) == len(k)
    mask = None
    if not is_square:
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=is_square,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _attend_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompts: Sequence[Prompt], *, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        _bounds([prompt.num_rows for prompt in prompts], q.device),
        _bounds([prompt.num_keys for prompt in prompts], q.device),
        max(prompt.num_rows for prompt in prompts),
        max(prompt.num_keys for prompt in prompts),
        scale=scale,
        window_size=(-1, 0),  # causal, aligned at the lower right
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out


def _bounds(sizes: list[int], device: torch.device) -> torch.Tensor:
    """0 and the sums so far: (len(sizes) + 1,) int32."""
    return F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).to(torch.int32).to(device)
