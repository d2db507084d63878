"""Models for GPUs with weights in int8, int4 or e4m3: the roundings of `quant.weight`, in the layouts of `kernels.gpu`.

int8 and int4 are numbers of the weights alone; with fp8 (e4m3, one scale for each output) activations are rounded too.
"""

from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
from torch import nn

from internlm2.errors import RequestError
from internlm2.kernels.gpu import fp8, linear, weight
from internlm2.kernels.gpu.available import current
from internlm2.kernels.gpu.elementwise import swiglu
from internlm2.kernels.gpu.fp8 import Fp8Weight
from internlm2.kernels.gpu.weight import GpuWeight
from internlm2.log import progress
from internlm2.model.heads import CausalLM, Model
from internlm2.model.layers import DecoderLayer, FeedForward
from internlm2.quant.weight import FORMATS, Rounded, fitting_group, round_weight

GpuKind = Literal["int8", "int4", "fp8"]
GPU_KINDS: tuple[str, ...] = get_args(GpuKind)
FP8 = "fp8"  # what only GPUs have
AnyWeight = GpuWeight | Fp8Weight


class GpuLinear(nn.Module):
    """Takes the place of nn.Linear for inference on a GPU. Its weight is no parameter. bias: (N,)."""

    def __init__(self, packed: AnyWeight, *, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.packed = packed
        self.in_features, self.out_features = packed.columns, packed.rows
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        rows = x.reshape(-1, self.in_features)
        with current(x.device):
            if isinstance(self.packed, Fp8Weight):
                out = fp8.linear(rows, self.packed, bias=self._bias)
            else:
                out = linear.linear(rows, self.packed, bias=self._bias)
        return out.view(*x.shape[:-1], self.out_features)


class GpuFeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x), w1 and w3 being one weight."""

    def __init__(self, w13: AnyWeight, w2: AnyWeight) -> None:
        super().__init__()
        self.w13, self.w2 = GpuLinear(w13), GpuLinear(w2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., C) -> (..., C)."""
        both = self.w13(x.reshape(-1, x.shape[-1]))
        return self.w2(swiglu(both)).view(x.shape)


def parse_gpu_kind(name: str, *, dtype: torch.dtype, device: torch.device) -> GpuKind:
    """The kind called so. Raises RequestError where the GPU or the model's dtype has no such product."""
    if name not in GPU_KINDS:
        raise RequestError(
            f"quantization is {name!r}, but on a GPU must be one of {', '.join(GPU_KINDS)}, or left off."
        )
    if name == "fp8":
        _check_fp8(dtype, device)
    return cast(GpuKind, name)


def _check_fp8(dtype: torch.dtype, device: torch.device) -> None:
    if dtype not in (torch.bfloat16, torch.float16):
        raise RequestError(
            f"quantization='fp8' computes in bfloat16 or float16, but the model is in {dtype}. Give dtype='bfloat16'."
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < fp8.LEAST_CAPABILITY:
        own = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise RequestError(
            f"quantization='fp8' needs a GPU of compute capability 8.9 (Ada, Hopper or newer), but {device} has {own}. "
            "Use quantization='int8' or 'int4'."
        )


@torch.no_grad()
def gpu_weight(matrix: torch.Tensor, kind: GpuKind) -> AnyWeight:
    """matrix: (N, C) of any floating dtype, rounded on the device where it is. Raises RequestError when a weight is
    not finite, or has no shape that e4m3 takes.
    """
    if kind == "fp8":
        if matrix.shape[0] % fp8.COLUMN_MULTIPLE or matrix.shape[1] % fp8.COLUMN_MULTIPLE:
            raise RequestError(
                f"quantization='fp8' takes matrices whose sides are multiples of {fp8.COLUMN_MULTIPLE}, but this model "
                f"has one of {tuple(matrix.shape)}. Use quantization='int8' or 'int4'."
            )
        if not matrix.isfinite().all():
            raise RequestError(
                "A weight is NaN or infinite, so it cannot be rounded. Is the checkpoint damaged?"
            )
        return fp8.pack(matrix)
    group = fitting_group(matrix.shape[1], FORMATS[kind].group)
    return weight.pack(*round_weight(matrix, FORMATS[kind], group), group=group)


def gpu_weight_of(rounded: Rounded, device: torch.device) -> GpuWeight:
    """Pack what `Rounded.for_kernels` gave; nothing is rounded."""
    return weight.pack(rounded.q, rounded.scales, rounded.zeros, group=rounded.group).to(device)


def join(one: AnyWeight, other: AnyWeight) -> AnyWeight | None:
    """The rows of both as one weight; None when they are of two kinds."""
    if isinstance(one, Fp8Weight) and isinstance(other, Fp8Weight):
        # NOTE: torch joins bytes, not e4m3, on every device.
        data = torch.cat((one.data.view(torch.uint8), other.data.view(torch.uint8))).view(fp8.DTYPE)
        return Fp8Weight(data, torch.cat((one.scales, other.scales)))
    if isinstance(one, GpuWeight) and isinstance(other, GpuWeight) and weight.is_like(one, other):
        return weight.join(one, other)
    return None


def head_kind(kind: GpuKind) -> GpuKind | None:
    """How the output head is stored: it decides between all tokens. None: as it is."""
    return None if kind == "fp8" else "int8"


@torch.no_grad()
def quantize_for_gpu(model: Model, kind: GpuKind) -> None:
    """Replace, in place, the linears of all layers and the output head, on the model's device; the embedding stays.

    Raises RequestError for a model whose linears are not plain, and as `gpu_weight`.
    """
    for module in model.modules():
        if isinstance(module, GpuLinear) or (isinstance(module, nn.Linear) and type(module) is not nn.Linear):
            raise RequestError(
                "The model's linears are packed, split or adapted already. Quantise it first, and once."
            )
    with progress("Rounding weights", total=len(model.model.layers), unit="layers") as bar:
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            for name in ("wqkv", "wo"):
                plain = layer.attention.get_submodule(name)
                assert isinstance(plain, nn.Linear)
                bias = None if plain.bias is None else plain.bias.detach()
                layer.attention.add_module(name, GpuLinear(gpu_weight(plain.weight, kind), bias=bias))
            layer.add_module("feed_forward", _feed_forward(layer.feed_forward, lambda x: gpu_weight(x, kind)))
            bar.advance(1)
    of_head = head_kind(kind)
    if isinstance(model, CausalLM) and of_head is not None:
        source = model.model.tok_embeddings.weight
        if model.output is not None:
            assert isinstance(model.output, nn.Linear)
            source = model.output.weight
        model.output = GpuLinear(gpu_weight(source, of_head))


def _feed_forward(module: FeedForward, rounded: Callable[[torch.Tensor], AnyWeight]) -> GpuFeedForward:
    w13 = join(rounded(module.w1.weight), rounded(module.w3.weight))
    assert w13 is not None
    return GpuFeedForward(w13, rounded(module.w2.weight))
