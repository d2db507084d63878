"""Attention of the transformers integration: our `attend` seam filled with transformers' own machinery.

One object per forward pass: it puts keys and values into the cache and calls the implementation that
`config._attn_implementation` names (eager, sdpa, flex_attention, flash_attention_*).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from internlm2.model.attention import Attention, AttentionMeta
from internlm2.model.config import ModelConfig


class InternLM2Attention(Attention):
    """`Attention` with the facts that transformers' attention functions read off the module."""

    is_causal = True

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.layer_idx = layer
        self.config: PreTrainedConfig | None = None  # set by the model; read by flash attention
        self.num_key_value_groups = config.queries_per_group


def eager_attention(  # noqa: PLR0917 - called as transformers calls its own
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its weights in the open. query: (B, H, T, D), key and value: (B, K, S, D).

    Returns (B, T, H, D) and the weights (B, H, T, S); the softmax is in float32.
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    value = value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def attention_function(name: str | None) -> AttentionFunction:
    """The function that transformers knows by this name. Raises KeyError for an unknown one, as it does."""
    return eager_attention if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS[name]


@dataclass
class CachedAttend:
    """`Attend` over a transformers cache.

    modules: the attention module of every layer. mask: what `create_causal_mask` made. cache: None to attend
    to this call alone. weights: filled with (B, H, T, S) per layer if `keep_weights`.
    """

    modules: Sequence[nn.Module]
    function: AttentionFunction
    mask: object
    cache: Cache | None
    options: Mapping[str, object]
    keep_weights: bool = False
    weights: list[torch.Tensor] = field(default_factory=list)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta
    ) -> torch.Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if self.cache is not None:
            k, v = self.cache.update(k, v, meta.layer)  # (B, K, S, D)
        mask = self.mask
        if isinstance(mask, torch.Tensor) and mask.device != q.device:
            mask = mask.to(q.device)  # layers spread over devices
        out, weights = self.function(
            self.modules[meta.layer], q, k, v, mask, dropout=0.0, scaling=meta.scale, **self.options
        )
        if self.keep_weights and weights is not None:
            self.weights.append(weights)
        return out  # (B, T, H, D)

    def kept_weights(self) -> tuple[torch.Tensor, ...] | None:
        """(B, H, T, S) of each layer; None where they were not asked for, or the implementation has none."""
        return tuple(self.weights[: len(self.modules)]) or None
