"""The fused, interleaved wqkv of the official layout, and the three projections that others keep apart.

Rows of wqkv, for each of the K key/value heads in turn: its G query heads, its key, its value (report,
figure 2).
The functions work alike on weights (rows, C) and on biases (rows,).
"""

from dataclasses import dataclass

import torch

from internlm2.model.config import ModelConfig


@dataclass(frozen=True)
class Projections:
    """Queries (H D, ...), keys (K D, ...) and values (K D, ...), heads in their natural order."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def fuse(parts: Projections, config: ModelConfig) -> torch.Tensor:
    """Interleave three projections into one wqkv ((H + 2 K) D, ...)."""
    groups, width, rest = config.num_key_value_heads, config.head_dim, parts.q.shape[1:]
    q = parts.q.reshape(groups, config.queries_per_group, width, *rest)  # (K, G, D, ...)
    k = parts.k.reshape(groups, 1, width, *rest)
    v = parts.v.reshape(groups, 1, width, *rest)
    return torch.cat((q, k, v), dim=1).flatten(0, 2)


def split(wqkv: torch.Tensor, config: ModelConfig) -> Projections:
    """Undo `fuse`. wqkv: ((H + 2 K) D, ...)."""
    groups, per_group = config.num_key_value_heads, config.queries_per_group
    slots = wqkv.reshape(groups, per_group + 2, config.head_dim, *wqkv.shape[1:])  # (K, G + 2, D, ...)
    return Projections(
        q=slots[:, :per_group].flatten(0, 2), k=slots[:, -2].flatten(0, 1), v=slots[:, -1].flatten(0, 1)
    )


def half_split_rows(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rotary pairs stored side by side (0, 1), (2, 3), ... -> evens first, then odds, within each head.

    rows: (num_heads D, ...). The official layout turns row i together with row i + D/2.
    """
    pairs = rows.reshape(
        num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:]
    )  # (heads, D/2, 2, ...)
    return pairs.transpose(1, 2).reshape(rows.shape)


def paired_rows(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo `half_split_rows`: rows i and i + D/2 of each head side by side."""
    halves = rows.reshape(
        num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:]
    )  # (heads, 2, D/2, ...)
    return halves.transpose(1, 2).reshape(rows.shape)
