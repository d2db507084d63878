"""Linears on packed weights, and the model whose linears are replaced by them.

For every number of rows the kernel is the same: from about 16 rows on it computes at the rate of the matrix units, so
there is no second copy of the weights for prefill, and a prompt gives the same bits in one piece, in chunks or alone.
"""

from typing import Literal

import torch
from torch import nn

from internlm2.errors import RequestError
from internlm2.kernels import PackedWeight, linear
from internlm2.log import progress
from internlm2.model.heads import CausalLM, Model
from internlm2.model.layers import DecoderLayer, FeedForward
from internlm2.quant.weight import FORMATS, WeightFormat, parse_format, quantize_weight

WeightKind = Literal["bfloat16", "int8", "int4", "int4-symmetric"]


class PackedLinear(nn.Module):
    """Takes the place of nn.Linear for inference. Its weight is no parameter: no gradient, no state_dict, no `.to()`.

    out_dtype: of the result; None: as the input.
    """

    def __init__(self, weight: PackedWeight, *, out_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.packed = weight
        self.in_features, self.out_features = weight.columns, weight.rows
        self.out_dtype = out_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        return linear(x, self.packed, out_dtype=self.out_dtype)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.packed.kind}"


class PackedFeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x) in two calls: w1 and w3 are one weight, and the product is formed before it is stored."""

    def __init__(self, w13: PackedWeight, w2: PackedWeight) -> None:
        super().__init__()
        self.w13, self.w2 = PackedLinear(w13), PackedLinear(w2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., C) -> (..., C)."""
        return self.w2(self.w13(x))


def format_of_head(fmt: WeightFormat) -> WeightFormat:
    """How the output head is held beside linears in `fmt`: it decides between all tokens, its errors are the dearest.

    int8 beside int4, and with 15 bits of the activations beside int8, which is for those who want nothing lost.
    """
    return {"int4": FORMATS["int8"], "int8": WeightFormat("int8", 32, activation_bits=15)}.get(fmt.kind, fmt)


@torch.no_grad()
def quantize_model(
    model: Model, kind: WeightKind | WeightFormat, *, head: WeightKind | WeightFormat | None = None
) -> None:
    """Replace, in place, the linears of all layers and the output head by packed ones; the embedding stays.

    head: of the output head; default: as `format_of_head` says. A tied head becomes a weight of its own. The old
    weights are let go one by one, so the peak is the larger model plus one layer. Raises RequestError for a model that
    is not plain nn.Linear on the CPU.
    """
    fmt = parse_format(kind) if isinstance(kind, str) else kind
    head = format_of_head(fmt) if head is None else head
    head_format = parse_format(head) if isinstance(head, str) else head
    device = model.model.tok_embeddings.weight.device
    if device.type != "cpu":
        raise RequestError(
            f"Packed weights are for the CPU, but the model is on {device}. Load it with device='cpu'."
        )
    dtype = model.model.tok_embeddings.weight.dtype
    if dtype not in (torch.bfloat16, torch.float32):
        raise RequestError(
            f"Packed weights compute in bfloat16 or float32, but the model is in {dtype}. Load it with "
            "dtype='bfloat16'."
        )
    for module in model.modules():
        if isinstance(module, PackedLinear) or (
            isinstance(module, nn.Linear) and type(module) is not nn.Linear
        ):
            raise RequestError(
                "The model's linears are packed, split or adapted already. Quantise it first, and once."
            )
    with progress("Packing weights", total=len(model.model.layers) + 1, unit="layers") as bar:
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            _replace(layer.attention, "wqkv", fmt)
            _replace(layer.attention, "wo", fmt)
            packed = _pack_feed_forward(layer.feed_forward, fmt)
            layer.add_module("feed_forward", packed)
            bar.advance(1)
        if isinstance(model, CausalLM):
            # A tied head is the embedding, which stays as it is: tokens are looked up in it.
            source = model.model.tok_embeddings.weight
            if model.output is not None:
                assert isinstance(model.output, nn.Linear)
                source = model.output.weight
            model.output = PackedLinear(quantize_weight(source, head_format), out_dtype=torch.float32)
        bar.advance(1)


def _replace(parent: nn.Module, name: str, fmt: WeightFormat) -> None:
    module = parent.get_submodule(name)
    assert isinstance(module, nn.Linear)
    parent.add_module(name, PackedLinear(quantize_weight(module.weight, fmt, bias=module.bias)))


def _pack_feed_forward(module: FeedForward, fmt: WeightFormat) -> PackedFeedForward:
    return PackedFeedForward(
        quantize_weight(module.w3.weight, fmt, gate=module.w1.weight), quantize_weight(module.w2.weight, fmt)
    )
