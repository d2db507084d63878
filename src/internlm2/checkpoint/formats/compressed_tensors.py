"""Quantised weights as compressed-tensors stores them, under any names, and folders that hold such weights.

A weight X is `X_packed` (int32 words, the lowest bits first), `X_scale` (a row for each row), `X_zero_point` (int4
packed along the rows, only with zeros) and `X_shape`; or X itself in int8. Stored numbers are without sign: q + 8 or
q + 128. Every size is checked against config.json before a byte is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from internlm2.checkpoint.config_json import CONFIG_FILE, is_llama, parse_config, read_json
from internlm2.checkpoint.formats import wqkv
from internlm2.checkpoint.formats.llama import LLAMA_NAMES, parse_llama_config
from internlm2.checkpoint.formats.names import map_official, part_shapes
from internlm2.checkpoint.formats.quantization_config import KEY, WeightScheme, parse_quantization
from internlm2.checkpoint.source import Store, TensorInfo, expected_shapes
from internlm2.checkpoint.stores import open_store
from internlm2.errors import CheckpointError
from internlm2.model.config import ModelConfig
from internlm2.quant.weight import Rounded

_PARTS = ("_packed", "_scale", "_zero_point", "_shape")
_WORD_BITS = 32


class QuantizedCheckpoint:
    """A folder in the official or the Llama layout whose linears are quantised by compressed-tensors.

    As a `Checkpoint` it gives the weights in the dtype of their scales, as the package itself does; `rounded` gives
    the whole numbers.
    """

    def __init__(self, folder: Path) -> None:
        """Read headers only. Raises CheckpointError or ConfigError when this is not what we can read."""
        self.path = folder
        where = str(folder / CONFIG_FILE)
        data = read_json(folder / CONFIG_FILE)
        self.schemes = parse_quantization(data.get(KEY), where=where)
        plain = {key: value for key, value in data.items() if key != KEY}
        self._is_llama = is_llama(data)
        parse = parse_llama_config if self._is_llama else parse_config
        self.config: ModelConfig = parse(plain, where=where)
        self._store = open_store(folder, allow_integers=True)
        self.tokenizer_folder: Path | None = folder
        self._weights: dict[str, StoredWeight] = {}  # by stored name
        seen = self._collect()
        if self._is_llama:
            self.tensors: Mapping[str, TensorInfo] = map_official(folder, self.config, seen, LLAMA_NAMES)
        else:
            self.tensors = seen

    def _collect(self) -> dict[str, TensorInfo]:
        """The store's tensors with every quantised weight as the one tensor that it stands for."""
        found = self._store.tensors
        seen: dict[str, TensorInfo] = {}
        wanted = self._wanted_shapes()
        taken: set[str] = set()
        for name, shape in wanted.items():
            is_plain = name in found and found[name].dtype.is_floating_point
            if is_plain or (name not in found and f"{name}_packed" not in found):
                continue  # not quantised, or missing, which is said later
            weight = find_weight(self.path, name, shape, found, self.schemes)
            self._weights[name] = weight
            seen[name] = TensorInfo(shape, found[weight.scale].dtype, found[weight.scale].file)
            taken.update({name, *(f"{name}{part}" for part in _PARTS)} & found.keys())
        for name, info in found.items():
            if name not in taken:
                if not info.dtype.is_floating_point:
                    raise CheckpointError(
                        f"{self.path / info.file}: tensor {name} is {info.dtype}, but config.json says nothing of a "
                        "quantised weight there. The files belong to different models; download the folder again."
                    )
                seen[name] = info
        return seen

    def _wanted_shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored name -> shape of every matrix of the layers and the head, which may be quantised."""
        wanted: dict[str, tuple[int, ...]] = {}
        for official, shape in expected_shapes(self.config).items():
            if len(shape) == 2 and not official.endswith("tok_embeddings.weight"):
                names = LLAMA_NAMES.of(official) if self._is_llama else (official,)
                parts = part_shapes(self.config, official, shape) if self._is_llama else (shape,)
                wanted |= dict(zip(names, parts, strict=True))
        return wanted

    def _stored_names(self, name: str) -> tuple[str, ...]:
        return LLAMA_NAMES.of(name) if self._is_llama else (name,)

    def rounded(self, name: str) -> Rounded | None:
        """The whole numbers of a weight by its official name; None where it, or a part of it, is not quantised.

        None too where queries, keys and values are stored in different ways. Raises CheckpointError.
        """
        names = self._stored_names(name)
        if not all(stored in self._weights for stored in names):
            return None
        parts = [read_weight(self._store, self._weights[stored]) for stored in names]
        if len(parts) == 1:
            return parts[0]
        same = all(p.is_like(parts[0]) and p.scales.dtype == parts[0].scales.dtype for p in parts)
        if not same:
            return None
        zeros = [p.zeros for p in parts if p.zeros is not None]
        return Rounded(
            wqkv.fuse(wqkv.Projections(*(p.q for p in parts)), self.config),
            wqkv.fuse(wqkv.Projections(*(p.scales for p in parts)), self.config),
            wqkv.fuse(wqkv.Projections(*zeros), self.config) if zeros else None,
            parts[0].group,
        )

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the official layout; quantised ones in the dtype of their scales."""
        parts = [self._read_stored(stored) for stored in self._stored_names(name)]
        return parts[0] if len(parts) == 1 else wqkv.fuse(wqkv.Projections(*parts), self.config)

    def _read_stored(self, name: str) -> torch.Tensor:
        if name not in self._weights:
            return self._store.read(name)
        weight = read_weight(self._store, self._weights[name])
        return weight.values(weight.scales.dtype)


@dataclass(frozen=True)
class StoredWeight:
    """Where a quantised weight lies, its sizes checked. q, scale, zero: names of tensors; zero: None without."""

    q: str
    scale: str
    zero: str | None
    shape: str | None
    rows: int
    columns: int
    bits: int
    group: int
    path: Path


def find_weight(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    found: Mapping[str, TensorInfo],
    schemes: list[WeightScheme],
) -> StoredWeight:
    """The parts of the quantised weight `name`. Raises CheckpointError when one is missing or of a wrong size."""
    rows, columns = shape
    is_packed = f"{name}_packed" in found
    q = f"{name}_packed" if is_packed else name
    path = folder / found[q].file
    zero = f"{name}_zero_point" if f"{name}_zero_point" in found else None
    if f"{name}_g_idx" in found:
        raise CheckpointError(f"{path}: tensor {name}_g_idx reorders columns, which is not read.")
    scale = _need(found, f"{name}_scale", path)
    bits = _bits(q, found[q], rows, columns, is_packed=is_packed, path=path)
    num_groups = _num_groups(name, found[scale], rows, path)
    group = columns if num_groups == 1 else columns // num_groups
    if group * num_groups != columns:
        raise CheckpointError(
            f"{path}: tensor {scale} has {num_groups} scales a row, which do not divide {columns} columns. The "
            "weights and config.json belong to different models."
        )
    actual = WeightScheme(bits, 0 if num_groups == 1 else group, zero is not None, is_packed)
    agreeing = [
        s for s in schemes
        if (s.bits, s.has_zeros, s.is_packed) == (actual.bits, actual.has_zeros, is_packed)
        and (s.group or columns) == group
    ]  # fmt: skip
    if not agreeing:
        raise CheckpointError(
            f"{path}: weight {name} is stored as {actual}, but config.json says {' or '.join(map(str, schemes))}. "
            "A tensor is missing or the files belong to different models; download the folder again."
        )
    if zero is not None:
        packed_rows = -(-rows * bits // _WORD_BITS)
        expected = (packed_rows, num_groups) if is_packed else (rows, num_groups)
        _check_shape(zero, found[zero], expected, torch.int32 if is_packed else torch.int8, path)
    size = f"{name}_shape" if is_packed and f"{name}_shape" in found else None
    if size is not None and (found[size].shape != (2,) or found[size].dtype.is_floating_point):
        raise CheckpointError(f"{path}: tensor {size} is not two whole numbers. Download that file again.")
    return StoredWeight(q, scale, zero, size, rows, columns, bits, group, path)


def read_weight(store: Store, where: StoredWeight) -> Rounded:
    """The whole numbers of a weight. Raises CheckpointError for values that cannot be."""
    scales = store.read(where.scale).reshape(-1, where.columns // where.group)
    scales = scales.expand(where.rows, -1).contiguous()
    if not bool(scales.isfinite().all()):
        raise CheckpointError(
            f"{where.path}: tensor {where.scale} has scales that are NaN or infinite. Download that file again."
        )
    if where.shape is not None and store.read(where.shape).tolist() != [where.rows, where.columns]:
        raise CheckpointError(
            f"{where.path}: tensor {where.shape} says {store.read(where.shape).tolist()}, but config.json asks for "
            f"{[where.rows, where.columns]}. The weights and config.json belong to different models."
        )
    stored = store.read(where.q)
    if stored.dtype == torch.int8:
        q, zeros = stored, None if where.zero is None else store.read(where.zero).to(torch.int16)
    else:
        q = unpack_words(stored, where.bits, where.columns, what=f"{where.path}: tensor {where.q}")
        zeros = None
        if where.zero is not None:
            words = store.read(where.zero).T.contiguous()
            zeros = unpack_words(words, where.bits, where.rows, what=f"{where.path}: tensor {where.zero}").T
            zeros = zeros.to(torch.int16).contiguous()
    return Rounded(q, scales, None if zeros is None else zeros * 16, where.group)


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """values: (N, C), uint8 in [0, 15] for 4 bits or int8 for 8 -> (N, words) int32, the last padded with zeros."""
    per_word = _WORD_BITS // bits
    padded = F.pad(values.view(torch.uint8) ^ (128 if bits == 8 else 0), (0, -values.shape[1] % per_word))
    if bits == 8:
        return padded.contiguous().view(torch.int32)
    pairs = padded.view(len(values), -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, columns: int, *, what: str) -> torch.Tensor:
    """Undo `pack_words`. Raises CheckpointError when there is something in the padding."""
    stored = words.contiguous().view(torch.uint8)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)
    if bool(stored[:, columns:].any()):
        raise CheckpointError(
            f"{what} holds values beyond its last column, so it was packed in another way. Download that file again."
        )
    stored = stored[:, :columns]
    return (stored ^ 128).view(torch.int8) if bits == 8 else stored.contiguous()


def _need(found: Mapping[str, TensorInfo], name: str, path: Path) -> str:
    if name not in found:
        raise CheckpointError(
            f"{path}: tensor {name} is missing beside its weight. Download the folder again."
        )
    return name


def _bits(q: str, info: TensorInfo, rows: int, columns: int, *, is_packed: bool, path: Path) -> int:
    if not is_packed:
        _check_shape(q, info, (rows, columns), torch.int8, path)
        return 8
    for bits in (4, 8):
        if info.shape == (rows, -(-columns * bits // _WORD_BITS)) and info.dtype == torch.int32:
            return bits
    raise CheckpointError(
        f"{path}: tensor {q} is {info.dtype} of shape {list(info.shape)}, but config.json asks for {rows} rows of "
        f"{columns} columns, 4 or 8 bits each, in int32. The weights and config.json belong to different models."
    )


def _num_groups(name: str, info: TensorInfo, rows: int, path: Path) -> int:
    is_good = info.dtype.is_floating_point and (
        info.shape in ((1,), (1, 1), (rows,)) or (len(info.shape) == 2 and info.shape[0] == rows)
    )
    if not is_good or 0 in info.shape:
        raise CheckpointError(
            f"{path}: tensor {name}_scale is {info.dtype} of shape {list(info.shape)}, but must be floating with a row "
            f"for each of {rows} rows. The weights and config.json belong to different models."
        )
    return info.shape[1] if len(info.shape) == 2 else 1


def _check_shape(name: str, info: TensorInfo, shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> None:
    if info.shape != shape or info.dtype != dtype:
        raise CheckpointError(
            f"{path}: tensor {name} is {info.dtype} of shape {list(info.shape)}, but must be {dtype} of {list(shape)}. "
            "The weights and config.json belong to different models."
        )
