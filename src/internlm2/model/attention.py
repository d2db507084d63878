"""Grouped-query attention, and the seam through which the network reaches keys and values.

The network computes rotated queries, keys and values and hands them to `attend`. Who calls the network
decides what attention is: causal over the batch at hand, over a cache, over pages, across processes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from internlm2.model.config import ModelConfig
from internlm2.model.rope import Rotary, rotate


@dataclass(frozen=True)
class AttentionMeta:
    """What the network knows about one call of `attend`. layer: from 0. scale: factor of the scores."""

    layer: int
    scale: float


class Attend(Protocol):
    """Attention as a callable: q (B, T, H, D), k and v (B, T, K, D), already rotated -> (B, T, H, D)."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta
    ) -> torch.Tensor: ...


def causal_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta) -> torch.Tensor:
    """Each position sees itself and what came before it in the same row; no padding, no cache."""
    return sdpa(q, k, v, scale=meta.scale, is_causal=True)


@dataclass(frozen=True)
class MaskedAttend:
    """Attention under an explicit mask. mask: (B or 1, 1, T, S) bool, True where a query may look."""

    mask: torch.Tensor

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta
    ) -> torch.Tensor:
        return sdpa(q, k, v, scale=meta.scale, mask=self.mask)


def padding_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Causal mask of a padded batch. attention_mask: (B, T), 0 at padding -> (B, 1, T, T) bool.

    A padded query may see itself, so that no row of the softmax is empty (an empty row is NaN).
    """
    num_positions = attention_mask.shape[1]
    ones = torch.ones(num_positions, num_positions, dtype=torch.bool, device=attention_mask.device)
    mask = ones.tril() & attention_mask.bool()[:, None, :]  # (B, T, T)
    return (mask | torch.eye(num_positions, dtype=torch.bool, device=mask.device))[:, None]


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """torch's fused attention. q: (B, T, H, D), k and v: (B, S, K, D) -> (B, T, H, D); softmax in float32."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, H, T, D)
        k.transpose(1, 2),  # (B, K, S, D)
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    """One layer's attention with the fused, interleaved projection of the official checkpoints.

    Rows of `wqkv`, for each key/value head in turn: its G query heads, its key, its value (report, figure 2),
    so that splitting for tensor parallelism is a plain split by rows.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_key_value_heads = config.num_key_value_heads
        self.queries_per_group = config.queries_per_group
        self.head_dim = config.head_dim
        self.meta = AttentionMeta(layer=layer, scale=config.head_dim**-0.5)
        self.wqkv = nn.Linear(config.hidden_size, config.qkv_size, bias=config.bias)
        self.wo = nn.Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.bias
        )

    def forward(self, hidden: torch.Tensor, angles: Rotary, attend: Attend) -> torch.Tensor:
        """hidden: (B, T, C) -> (B, T, C)."""
        batch, num_positions, _ = hidden.shape
        qkv = self.wqkv(hidden).view(
            batch, num_positions, self.num_key_value_heads, self.queries_per_group + 2, self.head_dim
        )  # (B, T, K, G + 2, D)
        q = qkv[..., : self.queries_per_group, :].flatten(2, 3)  # (B, T, H, D)
        k, v = qkv[..., -2, :], qkv[..., -1, :]  # (B, T, K, D)
        out = attend(rotate(q, angles), rotate(k, angles), v, self.meta)  # (B, T, H, D)
        return self.wo(out.flatten(2))
