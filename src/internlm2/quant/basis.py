"""The same network in another basis: every output stays, every weight of a layer changes.

The directions of the residual stream are the network's own business: turning what writes to it and turning back what
reads from it changes nothing, for RMSNorm looks at the length only. So does turning the values of a head against wo,
and renumbering the hidden units of the feed-forward. Here directions are turned in random pairs, which mixes just
enough that weights which were stored on a 4-bit grid lie on none afterwards, while large and small channels stay so.
Rounding such weights again is a fair test of a method, and what it is compared with computes what the original does.
Full rotations, which also even out the channels, are the subject of arXiv 2404.00456.
"""

import dataclasses
import math

import torch
from torch import nn

from internlm2.model.heads import CausalLM, build_model
from internlm2.model.layers import DecoderLayer, RMSNorm

_LEAST_ANGLE = math.pi / 8  # so that both of a pair count in both


@torch.no_grad()
def in_another_basis(model: CausalLM, generator: torch.Generator) -> CausalLM:
    """A new float32 model that computes what `model` computes, with other weights. Its head is never tied."""
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    turned = build_model(config)
    assert isinstance(turned, CausalLM)
    head = model.model.tok_embeddings if model.output is None else model.output
    turn = _turn_of_pairs(config.hidden_size, generator)
    turned.model.tok_embeddings.weight.copy_(model.model.tok_embeddings.weight.double() @ turn.T)
    for old, new in zip(model.model.layers, turned.model.layers, strict=True):
        assert isinstance(old, DecoderLayer)
        assert isinstance(new, DecoderLayer)
        _turn_layer(old, new, turn, generator)
    assert isinstance(head.weight, torch.Tensor)
    assert isinstance(turned.output, nn.Linear)
    _turn_readers(model.model.norm, [head.weight], turned.model.norm, [turned.output.weight], turn)
    return turned.eval()


def _turn_of_pairs(size: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal (size, size) float64 that turns random pairs of directions by random angles; an odd one stays."""
    turn = torch.eye(size, dtype=torch.float64)
    first, second = torch.randperm(size, generator=generator)[: size // 2 * 2].view(2, -1)
    span = math.pi / 2 - 2 * _LEAST_ANGLE
    angle = _LEAST_ANGLE + span * torch.rand(size // 2, generator=generator, dtype=torch.float64)
    turn[first, first] = turn[second, second] = angle.cos()
    turn[first, second], turn[second, first] = -angle.sin(), angle.sin()
    return turn


def _turn_readers(
    old_norm: RMSNorm, old: list[torch.Tensor], new_norm: RMSNorm, new: list[torch.Tensor], turn: torch.Tensor
) -> None:
    """What reads the normalised stream. The norm's weights turn as sizes do, so columns keep theirs."""
    before = old_norm.weight.double()
    after = (turn.square() @ before.square()).sqrt()
    after = after.where(after > 0, 1).float()
    new_norm.weight.copy_(after)
    for source, target in zip(old, new, strict=True):
        target.copy_((source.double() * before) @ turn.T / after.double())


def _turn_layer(old: DecoderLayer, new: DecoderLayer, turn: torch.Tensor, generator: torch.Generator) -> None:
    attention, heads = new.attention, (old.attention.num_key_value_heads, old.attention.queries_per_group)
    width = attention.head_dim
    wqkv = torch.empty_like(old.attention.wqkv.weight, dtype=torch.float64)
    _turn_readers(old.attention_norm, [old.attention.wqkv.weight], new.attention_norm, [wqkv], turn)
    wo = old.attention.wo.weight.double().view(-1, *heads, width)
    bias = old.attention.wqkv.bias
    bias = None if bias is None else bias.double().view(heads[0], -1, width).clone()
    rows = wqkv.view(heads[0], heads[1] + 2, width, -1)
    wo = wo.clone()
    for head in range(heads[0]):
        of_values = _turn_of_pairs(width, generator)
        rows[head, -1] = of_values @ rows[head, -1]
        wo[:, head] = wo[:, head] @ of_values.T
        if bias is not None:
            bias[head, -1] = of_values @ bias[head, -1]
    attention.wqkv.weight.copy_(wqkv)
    attention.wo.weight.copy_(turn @ wo.flatten(1))
    if bias is not None:
        attention.wqkv.bias.copy_(bias.flatten())
        attention.wo.bias.copy_(turn @ old.attention.wo.bias.double())
    units = torch.randperm(len(old.feed_forward.w1.weight), generator=generator)
    before, after = old.feed_forward, new.feed_forward
    sources, targets = [before.w1.weight[units], before.w3.weight[units]], [after.w1.weight, after.w3.weight]
    _turn_readers(old.ffn_norm, sources, new.ffn_norm, targets, turn)
    after.w2.weight.copy_(turn @ before.w2.weight.double()[:, units])
