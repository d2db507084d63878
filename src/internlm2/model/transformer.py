"""The trunk: embedding, decoder layers, final norm. Parameters carry the checkpoint's own names.

It knows nothing of caches, masks, devices or parallelism: positions come in as angles, attention as a
callable (see `attention.py`), and whoever needs more wraps it from outside.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from internlm2.model.attention import Attend
from internlm2.model.config import ModelConfig
from internlm2.model.layers import DecoderLayer, RMSNorm
from internlm2.model.rope import Rotary


class Transformer(nn.Module):
    """Token embeddings or ids in, final-norm hidden states out.

    layer_class: a subclass of DecoderLayer, for those who wrap layers (gradient checkpointing in transformers).
    """

    def __init__(self, config: ModelConfig, *, layer_class: type[DecoderLayer] = DecoderLayer) -> None:
        super().__init__()
        self.config = config
        # NOTE: no padding_idx: pad is eos (2), and the official `padding_idx=2` keeps </s> from being trained.
        shape = (config.vocab_size, config.hidden_size)
        # Drawing on the meta device draws nothing, but makes torch import its compiler, a second of every start.
        empty = torch.empty(shape) if torch.get_default_device().type == "meta" else None
        self.tok_embeddings = nn.Embedding(*shape, _weight=empty)
        self.layers = nn.ModuleList(layer_class(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeddings: torch.Tensor, angles: Rotary, attend: Attend) -> torch.Tensor:
        """embeddings: (B, T, C) from `tok_embeddings` -> hidden states (B, T, C) after the final norm."""
        return run_layers(self.layers, self.norm, embeddings, angles, attend)


def run_layers(
    layers: Iterable[nn.Module],
    norm: nn.Module,
    embeddings: torch.Tensor,
    angles: Rotary,
    attend: Attend,
    *,
    observe: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The forward pass of the trunk, for those who hold its parts themselves (the transformers integration).

    observe: told the input of every layer, (B, T, C). Returns the states (B, T, C) after the final norm.
    """
    hidden = embeddings
    for layer in layers:
        if observe is not None:
            observe(hidden)
        hidden = layer(hidden, angles, attend)
    return norm(hidden)


@torch.no_grad()
def init_weights(module: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Normal(0, std) for linears and embeddings, zero biases, unit norms; for `module` and all below it."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            child.weight.normal_(0.0, std, generator=generator)
            if isinstance(child, nn.Linear) and child.bias is not None:
                child.bias.zero_()
        elif isinstance(child, RMSNorm):
            child.weight.fill_(1.0)
