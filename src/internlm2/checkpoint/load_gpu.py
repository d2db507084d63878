"""Load a model straight onto a GPU with rounded weights: each matrix is read, moved, rounded there and let go.

So the GPU never holds more than the rounded model and a few matrices. What a file holds in whole numbers is taken as
it is where the kind asked for is the file's.
"""

import torch
from torch import nn

from internlm2.checkpoint import memory
from internlm2.checkpoint.formats.compressed_tensors import QuantizedCheckpoint
from internlm2.checkpoint.load import parse_device
from internlm2.checkpoint.source import Checkpoint, cast, check_complete, expected_shapes, parse_dtype
from internlm2.log import progress
from internlm2.model.heads import CausalLM, Model, RopeMode, build_model
from internlm2.model.layers import DecoderLayer
from internlm2.quant.gpu import (
    AnyWeight,
    GpuFeedForward,
    GpuKind,
    GpuLinear,
    gpu_weight,
    gpu_weight_of,
    head_kind,
    join,
    parse_gpu_kind,
)
from internlm2.quant.weight import FORMATS

_BITS = {"int8": FORMATS["int8"].bits, "int4": FORMATS["int4"].bits, "fp8": 8.0}


def load_gpu_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    device: str,
    quantization: str,
    rope_mode: RopeMode = "stateless",
) -> Model:
    """A model in eval mode whose linears are those of `quant.gpu`.

    dtype: of activations and of what stays as it is. quantization: "int8", "int4" or "fp8". device: where it computes;
    on a CPU the kernels' twins do, which is for tests. Raises CheckpointError, MemoryBudgetError, RequestError.
    """
    check_complete(checkpoint)
    target, place = parse_dtype(dtype), parse_device(device)
    kind = parse_gpu_kind(quantization, dtype=target, device=place)
    of_head = head_kind(kind)
    needed = memory.rounded_bytes(
        checkpoint.config,
        expected_shapes(checkpoint.config),
        dtype=target,
        bits=_BITS[kind],
        head_bits=None if of_head is None else _BITS[of_head],
    )
    memory.check_fits(needed, device=place, what=f"{checkpoint.path} in {kind}")
    with torch.device("meta"):
        model = build_model(checkpoint.config, rope_mode=rope_mode)
    reader = _Reader(checkpoint, kind, target, place)
    with progress("Rounding weights", total=len(model.model.layers) + 1, unit="layers") as bar:
        for index, layer in enumerate(model.model.layers):
            assert isinstance(layer, DecoderLayer)
            reader.fill_layer(layer, f"model.layers.{index}")
            bar.advance(1)
        if isinstance(model, CausalLM) and of_head is not None:
            model.output = GpuLinear(reader.head(of_head))
        reader.fill_rest(model)
        bar.advance(1)
    return model.eval()


class _Reader:
    """Makes the modules of a checkpoint on the GPU."""

    def __init__(
        self, checkpoint: Checkpoint, kind: GpuKind, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint, self._kind, self._dtype, self._device = checkpoint, kind, dtype, device
        self._files = checkpoint if isinstance(checkpoint, QuantizedCheckpoint) else None

    def fill_layer(self, layer: DecoderLayer, prefix: str) -> None:
        """Give a layer on the meta device its norms and its linears."""
        for norm in ("attention_norm", "ffn_norm"):
            self._fill(layer.get_submodule(norm), f"{prefix}.{norm}")
        for name in ("wqkv", "wo"):
            full = f"{prefix}.attention.{name}"
            has_bias = f"{full}.bias" in self._checkpoint.tensors
            bias = self._read(f"{full}.bias") if has_bias else None
            layer.attention.add_module(name, GpuLinear(self._weight(full, self._kind), bias=bias))
        w1, w3, w2 = (f"{prefix}.feed_forward.{name}" for name in ("w1", "w3", "w2"))
        w13 = join(self._weight(w1, self._kind), self._weight(w3, self._kind))
        if w13 is None:  # the file holds them in two ways
            w13 = join(*(gpu_weight(self._read(f"{name}.weight"), self._kind) for name in (w1, w3)))
        assert w13 is not None
        layer.add_module("feed_forward", GpuFeedForward(w13, self._weight(w2, self._kind)))

    def head(self, kind: GpuKind) -> AnyWeight:
        """The output matrix; a tied one is the embedding, rounded as a weight of its own."""
        if self._checkpoint.config.tie_word_embeddings:
            return gpu_weight(self._read("model.tok_embeddings.weight"), kind)
        return self._weight("output", kind)

    def fill_rest(self, model: Model) -> None:
        """Everything that is still on the meta device, as it is."""
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                module, _, _ = name.rpartition(".")
                self._fill(model.get_submodule(module), module)

    def _weight(self, name: str, kind: GpuKind) -> AnyWeight:
        rounded = None if self._files is None else self._files.rounded(f"{name}.weight")
        as_is = None if rounded is None else rounded.for_kernels()
        if as_is is not None and as_is.kind == kind:
            return gpu_weight_of(as_is, self._device)
        return gpu_weight(self._read(f"{name}.weight"), kind)

    def _fill(self, module: nn.Module, name: str) -> None:
        for leaf, _ in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, nn.Parameter(self._read(f"{name}.{leaf}"), requires_grad=False))

    def _read(self, name: str) -> torch.Tensor:
        return cast(self._checkpoint.read(name), self._dtype, name=name).to(self._device)
