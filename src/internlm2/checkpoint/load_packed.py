"""Load a model straight onto packed weights: one matrix at a time is read, rounded if need be, packed and let go.

So the peak is the packed model and one matrix, not the model in floats. What was rounded here is kept in a cache; what
a file holds in whole numbers is packed as it is. `quantize_model` on a loaded model gives the same bits.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from internlm2.checkpoint import memory
from internlm2.checkpoint.arena import Arena
from internlm2.checkpoint.formats.compressed_tensors import QuantizedCheckpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.packed_cache import CachedWeights, CacheWriter, PackedCache, cache_key
from internlm2.checkpoint.resolve import cache_root, resolve_model
from internlm2.checkpoint.source import (
    Checkpoint,
    cast,
    check_complete,
    expected_shapes,
    parse_dtype,
)
from internlm2.errors import RequestError
from internlm2.kernels import PackedWeight
from internlm2.log import progress
from internlm2.model.heads import CausalLM, Model, RopeMode, build_model
from internlm2.model.layers import DecoderLayer
from internlm2.quant.linear import PackedFeedForward, PackedLinear, format_of_head
from internlm2.quant.weight import (
    FORMATS,
    Rounded,
    pack_rounded,
    parse_format,
    quantize_weight,
)

# bfloat16 is packed in one pass over the files, and its copy would be as large as they are: only a small one is kept.
_MOST_BFLOAT16_BYTES = 2 << 30
_ROOM = 1.1  # for columns that are padded; what is not needed is never touched


def default_cache() -> PackedCache:
    """The cache of packed weights in the user's cache folder."""
    return PackedCache(cache_root() / "packed")


def load_packed(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    rope_mode: RopeMode = "stateless",
) -> Model:
    """Load the model at `path` for inference on the CPU with packed weights; see `load_packed_checkpoint`."""
    return load_packed_checkpoint(
        open_checkpoint(resolve_model(path)),
        dtype=dtype,
        quantization=quantization,
        rope_mode=rope_mode,
        cache=default_cache(),
    )


def load_packed_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    rope_mode: RopeMode = "stateless",
    cache: PackedCache | None = None,
) -> Model:
    """A model in eval mode whose linears are packed.

    dtype: of activations and of what stays as it is: "bfloat16" or "float32". quantization: "int8", "int4" or
    "bfloat16"; None: as the files are quantised. cache: where rounded weights are kept; None: nowhere.
    Raises CheckpointError, MemoryBudgetError, RequestError.
    """
    check_complete(checkpoint)
    packer = Packer(checkpoint, dtype=dtype, quantization=quantization)
    memory.check_fits(packer.expected_bytes(), device=torch.device("cpu"), what=f"{checkpoint.path}, packed")
    with torch.device("meta"):
        model = build_model(checkpoint.config, rope_mode=rope_mode)
    packer.use(cache)
    try:
        with progress("Packing weights", total=len(model.model.layers) + 1, unit="layers") as bar:
            for index, layer in enumerate(model.model.layers):
                assert isinstance(layer, DecoderLayer)
                packer.fill_layer(layer, index)
                bar.advance(1)
            if isinstance(model, CausalLM):
                model.output = packer.head()
            packer.fill_rest(model)
            bar.advance(1)
        packer.finish()
    except (ValueError, OSError):  # of the cache, whose file must go
        if not packer.forget_cache():
            raise
        return load_packed_checkpoint(
            checkpoint, dtype=dtype, quantization=quantization, rope_mode=rope_mode, cache=cache
        )
    finally:
        packer.drop()
    return model.eval()


class Packer:
    """Makes the packed modules of a checkpoint, from a cache, from whole numbers in its files, or by rounding."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: str, quantization: str | None) -> None:
        self._checkpoint = checkpoint
        self._dtype = parse_dtype(dtype)
        if self._dtype not in (torch.bfloat16, torch.float32):
            raise RequestError(
                f"Packed weights compute in bfloat16 or float32, but dtype is {dtype!r}. Give dtype='bfloat16'."
            )
        self._files = checkpoint if isinstance(checkpoint, QuantizedCheckpoint) else None
        if quantization is None and self._files is None:
            raise RequestError(f"{checkpoint.path} is not quantised. Say how: quantization='int8' or 'int4'.")
        self._format = None if quantization is None else parse_format(quantization)
        kind = "int4" if self._files is not None and all(s.bits == 4 for s in self._files.schemes) else "int8"
        self._head_format = format_of_head(self._format or FORMATS[kind])
        self._cached: CachedWeights | None = None
        self._writer: CacheWriter | None = None
        self._arena: Arena | None = None

    def expected_bytes(self) -> int:
        """About what the model will take."""
        config = self._checkpoint.config
        return memory.rounded_bytes(
            config,
            expected_shapes(config),
            dtype=self._dtype,
            bits=(self._format or FORMATS["int8"]).bits,
            head_bits=self._head_format.bits,
        )

    def use(self, cache: PackedCache | None) -> None:
        """Take weights from the cache, or put them there. Whole numbers in files are packed quickly: no cache.

        From here on all weights lie in one piece of memory.
        """
        self._find(cache)
        if self._cached is None:
            self._arena = Arena(int(self.expected_bytes() * _ROOM))

    def _find(self, cache: PackedCache | None) -> None:
        if cache is None or self._format is None:
            return
        if self._format.kind == "bfloat16" and self.expected_bytes() > _MOST_BFLOAT16_BYTES:
            return
        try:
            what = f"{self._format}|{self._head_format}|{self._dtype}|{self._checkpoint.config}"
            key = cache_key(self._source_files(), what=what)
        except OSError:
            return
        self._cached = cache.open(key)
        if self._cached is None:
            self._writer = cache.writer(key, expected_bytes=self.expected_bytes())

    def _source_files(self) -> list[Path]:
        path = self._checkpoint.path
        if path.is_file():
            return [path]
        names = {info.file for info in self._checkpoint.tensors.values()}
        return [path / "config.json", *(path / name for name in names)]

    def fill_layer(self, layer: DecoderLayer, index: int) -> None:
        """Give a layer on the meta device its norms and its packed linears."""
        prefix = f"model.layers.{index}"
        for norm in ("attention_norm", "ffn_norm"):
            self._fill(layer.get_submodule(norm), f"{prefix}.{norm}")
        for name in ("wqkv", "wo"):
            layer.attention.add_module(name, self._linear(f"{prefix}.attention.{name}"))
        layer.add_module("feed_forward", self._feed_forward(layer, f"{prefix}.feed_forward"))

    def head(self) -> nn.Module:
        """The output matrix; a tied one is the embedding, packed as a weight of its own."""
        packed = self._kept("output", self._pack_head)
        assert packed is not None
        return PackedLinear(packed, out_dtype=torch.float32)

    def fill_rest(self, model: Model) -> None:
        """Everything that is still on the meta device, as it is."""
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                module, _, _ = name.rpartition(".")
                self._fill(model.get_submodule(module), module)

    def finish(self) -> None:
        """Make the new file of the cache visible."""
        if self._writer is not None:
            self._writer.commit()
            self._writer = None

    def drop(self) -> None:
        """Let go of the cache's files; one that is not finished vanishes."""
        if self._writer is not None:
            self._writer.drop()
        if self._cached is not None:
            self._cached.close()

    def forget_cache(self) -> bool:
        """Remove the file that weights were taken from; whether there was one."""
        if self._cached is None:
            return False
        self._cached.forget()
        self._cached = None
        return True

    def _kept(self, name: str, make: Callable[[str], PackedWeight | None]) -> PackedWeight | None:
        if self._cached is not None:
            return self._cached.read(name)
        made = make(name)
        if self._writer is not None and made is not None:
            self._writer.add(name, made)
        return made if made is None or self._arena is None else self._arena.keep(made)

    def _linear(self, name: str) -> nn.Module:
        packed = self._kept(name, self._pack)
        return self._plain(name) if packed is None else PackedLinear(packed)

    def _feed_forward(self, layer: DecoderLayer, prefix: str) -> nn.Module:
        w13 = self._kept(f"{prefix}.w13", lambda _: self._pack_gated(prefix))
        w2 = None if w13 is None else self._kept(f"{prefix}.w2", self._pack)
        if w13 is not None and w2 is not None:
            return PackedFeedForward(w13, w2)
        for name in ("w1", "w3", "w2"):
            layer.feed_forward.add_module(name, self._linear(f"{prefix}.{name}"))
        return layer.feed_forward

    def _pack(self, name: str) -> PackedWeight | None:
        bias = self._bias(name)
        if self._format is not None:
            return quantize_weight(self._read(f"{name}.weight"), self._format, bias=bias)
        rounded = self._whole_numbers(name)
        return (
            None if rounded is None else pack_rounded(rounded, bias=bias, activation_bits=_bits_of(rounded))
        )

    def _pack_gated(self, prefix: str) -> PackedWeight | None:
        value, gate = f"{prefix}.w3", f"{prefix}.w1"
        if self._format is not None:
            return quantize_weight(
                self._read(f"{value}.weight"), self._format, gate=self._read(f"{gate}.weight")
            )
        parts = self._whole_numbers(value), self._whole_numbers(gate)
        if parts[0] is None or parts[1] is None or not parts[0].is_like(parts[1]):
            return None
        return pack_rounded(parts[0], gate=parts[1], activation_bits=_bits_of(parts[0]))

    def _pack_head(self, name: str) -> PackedWeight:
        packed = None if self._checkpoint.config.tie_word_embeddings else self._whole_numbers(name)
        if self._format is None and packed is not None:
            return pack_rounded(packed, activation_bits=_bits_of(packed))
        is_tied = self._checkpoint.config.tie_word_embeddings
        source = self._read("model.tok_embeddings.weight" if is_tied else f"{name}.weight")
        return quantize_weight(source, self._head_format)

    def _whole_numbers(self, name: str) -> Rounded | None:
        rounded = None if self._files is None else self._files.rounded(f"{name}.weight")
        return None if rounded is None else rounded.for_kernels()

    def _plain(self, name: str) -> nn.Linear:
        weight, bias = self._read(f"{name}.weight"), self._bias(name)
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear

    def _bias(self, name: str) -> torch.Tensor | None:
        return self._read(f"{name}.bias") if f"{name}.bias" in self._checkpoint.tensors else None

    def _fill(self, module: nn.Module, name: str) -> None:
        for leaf, _ in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, nn.Parameter(self._as_is(f"{name}.{leaf}"), requires_grad=False))

    def _as_is(self, name: str) -> torch.Tensor:
        """A tensor that is not packed. One that the files hold in another dtype is kept in the cache too."""
        if self._checkpoint.tensors[name].dtype == self._dtype:
            return self._read(name)
        if self._cached is not None:
            return self._cached.read_tensor(name)
        made = self._read(name)
        if self._writer is not None:
            self._writer.add(name, made)
        return made

    def _read(self, name: str) -> torch.Tensor:
        return cast(self._checkpoint.read(name), self._dtype, name=name)


def _bits_of(rounded: Rounded) -> int:
    return 15 if rounded.kind == "int8" else 8  # int8 of a file is not turned, so 8 bits would lose too much
