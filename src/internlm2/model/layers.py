"""RMSNorm (arXiv 1910.07467), SwiGLU (arXiv 2002.05202) and the pre-norm decoder layer that joins them."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from internlm2.model.attention import Attend, Attention
from internlm2.model.config import ModelConfig
from internlm2.model.rope import Rotary


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the statistics in float32, the product in the dtype of x, as the official code."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., C) -> same shape and dtype."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on the normalised stream and added back to it.

    attention_class: what a subclass puts in the place of `Attention` (same weights, same forward).
    """

    attention_class: ClassVar[type[Attention]] = Attention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = self.attention_class(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: torch.Tensor, angles: Rotary, attend: Attend) -> torch.Tensor:
        """hidden: (B, T, C) -> (B, T, C)."""
        hidden = hidden + self.attention(self.attention_norm(hidden), angles, attend)
        return hidden + self.feed_forward(self.ffn_norm(hidden))
