"""Write a checkpoint with its linears in int8 or int4, in the layout of compressed-tensors, one layer at a time.

Embedding, norms and output head stay floating, as is usual there. Every method but "rtn" takes a text through the
network layer by layer, and each layer is rounded against what reaches it through the rounded ones before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from internlm2 import files
from internlm2.checkpoint.config_json import CONFIG_FILE, config_to_json
from internlm2.checkpoint.formats import wqkv
from internlm2.checkpoint.formats.compressed_tensors import QuantizedCheckpoint, pack_words
from internlm2.checkpoint.formats.llama import (
    ARCHITECTURES,
    LLAMA_NAMES,
    llama_config,
    write_generation,
)
from internlm2.checkpoint.formats.names import part_shapes
from internlm2.checkpoint.formats.quantization_config import KEY, WeightScheme, quantization_to_json
from internlm2.checkpoint.save import copy_tokenizer_files, total_bytes, write_json, write_shards
from internlm2.checkpoint.source import (
    Checkpoint,
    TensorInfo,
    cast,
    check_complete,
    dtype_name,
    expected_shapes,
)
from internlm2.errors import CheckpointError, ExportError, RequestError, check
from internlm2.model.config import ModelConfig
from internlm2.model.layers import DecoderLayer
from internlm2.quant.layerwise import CalibratedLayer, Calibration, Stream, calibrate_layer
from internlm2.quant.weight import Rounded, WeightFormat, round_weight

Kind = Literal["int8", "int4"]
Method = Literal["rtn", "awq", "gptq", "awq+gptq"]
Layout = Literal["llama", "internlm2"]
GROUPS = (32, 64, 128)
_LAYERS = "model.layers."


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How to quantise.

    kind: "int8" or "int4". method: "rtn" rounds to the nearest. With the help of a text, "awq" scales columns by what
    they meet, "gptq" makes up for errors, "awq+gptq" does both. group: columns that share a scale: 32, 64 or 128.
    symmetric: int4 without zeros, which more programs read and which loses more. layout: names as Llama's, which vLLM
    and transformers load, or InternLM2's own. dtype: of embedding, norms and head; None: as they are, float32 becoming
    bfloat16.
    """

    kind: Kind
    method: Method = "gptq"
    group: int = 32
    symmetric: bool = False
    layout: Layout = "llama"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check(self.kind in ("int8", "int4"), "to", self.kind, "'int8' or 'int4'")
        check(self.method in get_args(Method), "method", self.method, "'rtn', 'awq', 'gptq' or 'awq+gptq'")
        check(self.group in GROUPS, "group", self.group, "32, 64 or 128")
        check(self.layout in ("llama", "internlm2"), "layout", self.layout, "'llama' or 'internlm2'")

    @property
    def weight_format(self) -> WeightFormat:
        """What the rounding needs to know."""
        has_zeros = self.kind == "int4" and not self.symmetric
        return WeightFormat(self.kind, self.group, has_zeros=has_zeros, whole_zeros=True)

    @property
    def needs_text(self) -> bool:
        """Whether the method looks at what the weights are multiplied with."""
        return self.method != "rtn"

    def calibration(self, stored_dtype: torch.dtype) -> Calibration:
        """How a layer is calibrated. stored_dtype: of the norms."""
        return Calibration(
            self.weight_format,
            self.group,
            scales_columns="awq" in self.method,
            compensates="gptq" in self.method,
            stored_dtype=stored_dtype,
        )

    @property
    def scheme(self) -> WeightScheme:
        """What config.json says."""
        return WeightScheme(8 if self.kind == "int8" else 4, self.group, self.weight_format.has_zeros, True)


def quantize_checkpoint(
    checkpoint: Checkpoint, folder: Path, options: QuantizeOptions, *, text: torch.Tensor | None = None
) -> None:
    """Write a new `folder` with quantised weights, or nothing when it fails.

    text: (S, T) ids for every method but "rtn". Raises CheckpointError, ExportError, RequestError.
    """
    if isinstance(checkpoint, QuantizedCheckpoint):
        raise CheckpointError(
            f"{checkpoint.path} is quantised already. Give the folder that it was made from."
        )
    check_complete(checkpoint)
    if options.layout == "llama" and checkpoint.config.head not in ARCHITECTURES:
        raise ExportError(f"The Llama layout has no {checkpoint.config.head} head. Give --layout internlm2.")
    if options.needs_text and text is None:
        raise RequestError(
            f"Method {options.method!r} needs a text to calibrate with. Give one, or use method 'rtn'."
        )
    source = QuantizedTensors(checkpoint, options, text=text)
    tensors = list(source.tensors.items())
    with files.new_folder(folder, need_bytes=total_bytes(tensors, None)) as temporary:
        write_json(temporary / CONFIG_FILE, source.config_json())
        if options.layout == "llama":
            write_generation(checkpoint, temporary)
        elif checkpoint.tokenizer_folder is not None:
            copy_tokenizer_files(checkpoint.tokenizer_folder, temporary)
        write_shards(temporary, tensors, source.read, dtype=None)


@dataclass(frozen=True)
class _Origin:
    """Where a stored tensor comes from. part: of a quantised weight, such as "_scale"; "" for one that stays.

    index: which of queries, keys and values; None for a tensor that stays whole.
    """

    official: str
    part: str
    index: int | None


class QuantizedTensors:
    """The tensors of the new folder, made when they are read; reading them in order keeps one layer in memory."""

    def __init__(
        self, checkpoint: Checkpoint, options: QuantizeOptions, *, text: torch.Tensor | None
    ) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._config: ModelConfig = checkpoint.config
        own = checkpoint.tensors["model.tok_embeddings.weight"].dtype
        self._dtype = options.dtype or (torch.bfloat16 if own in (torch.float32, torch.float64) else own)
        self._origins: dict[str, _Origin] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for official, shape in expected_shapes(checkpoint.config).items():
            self._list(official, shape)
        self._calibration: _CalibratedLayers | None = None
        if options.needs_text and text is not None:
            self._calibration = _CalibratedLayers(checkpoint, options.calibration(self._dtype), text)
        self._current: tuple[str, Rounded] | None = None

    def _list(self, official: str, shape: tuple[int, ...]) -> None:
        is_llama = self._options.layout == "llama"
        names = LLAMA_NAMES.of(official) if is_llama else (official,)
        shapes = part_shapes(self._config, official, shape) if is_llama else (shape,)
        is_rounded = is_layer_matrix(official, shape)
        if is_rounded and shape[1] % self._options.group:
            fitting = [str(g) for g in GROUPS if shape[1] % g == 0]
            advice = f"Give --group {' or '.join(fitting)}." if fitting else "No group fits this model."
            raise RequestError(
                f"{official} has {shape[1]} columns, which groups of {self._options.group} do not divide. {advice}"
            )
        for index, (name, part_shape) in enumerate(zip(names, shapes, strict=True)):
            parts = self._parts(part_shape) if is_rounded else {"": (part_shape, self._dtype)}
            for part, (stored_shape, dtype) in parts.items():
                self._origins[name + part] = _Origin(official, part, index if len(names) > 1 else None)
                self.tensors[name + part] = TensorInfo(stored_shape, dtype, "new")

    def _parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        scheme = self._options.scheme
        groups = columns // scheme.group
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "_packed": ((rows, -(-columns * scheme.bits // 32)), torch.int32),
            "_scale": ((rows, groups), torch.bfloat16),
            "_shape": ((2,), torch.int64),
        }
        if scheme.has_zeros:
            parts["_zero_point"] = ((-(-rows * scheme.bits // 32), groups), torch.int32)
        return parts

    def config_json(self) -> dict[str, object]:
        """The new config.json."""
        make = llama_config if self._options.layout == "llama" else config_to_json
        is_llama = self._options.layout == "llama"
        kept = [
            name for name, shape in expected_shapes(self._config).items() if not is_layer_matrix(name, shape)
        ]
        heads = [name for name in kept if name in ("output.weight", "v_head.weight", "score.weight")]
        if self._config.tie_word_embeddings:
            heads.append("output.weight")
        ignore = [(LLAMA_NAMES.of(name)[0] if is_llama else name).removesuffix(".weight") for name in heads]
        data = make(self._config, dtype=dtype_name(self._dtype))
        return data | {KEY: quantization_to_json(self._options.scheme, targets=["Linear"], ignore=ignore)}

    def read(self, name: str) -> torch.Tensor:
        """One stored tensor."""
        origin = self._origins[name]
        if not origin.part:
            layers = self._calibration if origin.official.startswith(_LAYERS) else None
            read = self._checkpoint.read if layers is None else layers.kept
            whole = cast(read(origin.official), self._dtype, name=origin.official)
            return self._own_part(whole, origin)
        rounded = self._rounded(origin.official)
        if origin.part == "_packed":
            return pack_words(self._own_part(rounded.q, origin), self._options.scheme.bits)
        if origin.part == "_scale":
            return self._own_part(rounded.scales, origin)
        if origin.part == "_shape":
            return torch.tensor(self._own_part(rounded.q, origin).shape)
        assert rounded.zeros is not None
        zeros = self._own_part(rounded.zeros, origin) // 16
        return pack_words(zeros.T.contiguous(), self._options.scheme.bits).T

    def _rounded(self, official: str) -> Rounded:
        if self._current is None or self._current[0] != official:
            if self._calibration is not None:
                rounded = self._calibration.rounded(official)
            else:
                weight = self._checkpoint.read(official)
                fmt, group = self._options.weight_format, self._options.group
                rounded = Rounded(*round_weight(weight, fmt, group), group)
            self._current = official, rounded
        return self._current[1]

    def _own_part(self, values: torch.Tensor, origin: _Origin) -> torch.Tensor:
        if origin.index is None:
            return values
        parts = wqkv.split(values, self._config)
        return (parts.q, parts.k, parts.v)[origin.index].contiguous()


class _CalibratedLayers:
    """Rounds layer after layer; each is done when the first of its tensors is asked for."""

    def __init__(self, checkpoint: Checkpoint, how: Calibration, text: torch.Tensor) -> None:
        self._checkpoint, self._how, self._text = checkpoint, how, text
        self._stream: Stream | None = None
        self._next_layer = 0
        self._layer: CalibratedLayer | None = None

    def rounded(self, official: str) -> Rounded:
        """A rounded matrix. Layers must be asked for in order."""
        layer, name = self._find(official)
        return layer.rounded[name]

    def kept(self, official: str) -> torch.Tensor:
        """What stays floating of a layer: a norm or a bias, which may have taken up scales of columns."""
        layer, name = self._find(official)
        return layer.kept[name]

    def _find(self, official: str) -> tuple[CalibratedLayer, str]:
        _, _, number, name = official.split(".", 3)
        if int(number) == self._next_layer:
            if self._stream is None:
                embeddings = embed(self._checkpoint, self._text).to(self._how.stored_dtype).float()
                self._stream = Stream(self._checkpoint.config, embeddings)
            layer = plain_layer(self._checkpoint, self._next_layer)
            self._layer = calibrate_layer(layer, self._stream, self._how)
            self._next_layer += 1
        assert self._layer is not None
        assert int(number) == self._next_layer - 1, "layers are rounded in order"
        return self._layer, name


def is_layer_matrix(official: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is one of those that are quantised: the linears of the layers."""
    return len(shape) == 2 and official.startswith(_LAYERS)


def embed(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """ids: (S, T) -> their embeddings (S, T, C) float32."""
    return checkpoint.read("model.tok_embeddings.weight")[ids].float()


def plain_layer(checkpoint: Checkpoint, index: int) -> DecoderLayer:
    """One layer in float32, with weights of its own."""
    with torch.device("meta"):
        layer = DecoderLayer(checkpoint.config, index)
    for name, _ in list(layer.named_parameters()):
        module, _, leaf = name.rpartition(".")
        tensor = checkpoint.read(f"model.layers.{index}.{name}").to(torch.float32, copy=True)
        setattr(layer.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    return layer
