"""Formats that differ from the official one in names, and in keeping queries, keys and values apart.

A `NameTable` says what each official tensor is called there; `map_official` checks a store against it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from internlm2.checkpoint.source import TensorInfo, expected_shapes
from internlm2.errors import CheckpointError
from internlm2.model.config import ModelConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class NameTable:
    """The names of another format.

    outer: official name -> its name. layer_prefix: with {} for the number of the layer. inner: name within an
    official layer, without .weight -> its name there, or the names of its queries, keys and values.
    """

    outer: Mapping[str, str]
    layer_prefix: str
    inner: Mapping[str, tuple[str, ...]]

    def of(self, official: str) -> tuple[str, ...]:
        """What an official tensor is called: one name, or three for wqkv."""
        match = _LAYER.fullmatch(official)
        if match is None:
            return (self.outer[official],)
        layer, inner, leaf = match.groups()
        return tuple(f"{self.layer_prefix.format(layer)}{name}.{leaf}" for name in self.inner[inner])


def part_shapes(config: ModelConfig, official: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of what `NameTable.of` names. shape: of the official tensor."""
    if ".wqkv." not in official:
        return (shape,)
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    return tuple((rows, *shape[1:]) for rows in (q_rows, kv_rows, kv_rows))


def map_official(
    path: Path, config: ModelConfig, found: Mapping[str, TensorInfo], table: NameTable
) -> dict[str, TensorInfo]:
    """Official name -> shape and dtype, for a file or folder `path` that holds the tensors `found`.

    Raises CheckpointError, in the words of that format, when one is missing, of a wrong shape, or not known.
    """
    known: set[str] = set()
    tensors: dict[str, TensorInfo] = {}
    for official, shape in expected_shapes(config).items():
        names = table.of(official)
        for name, part_shape in zip(names, part_shapes(config, official, shape), strict=True):
            _check_part(path, name, part_shape, found)
        known.update(names)
        first = found[names[0]]
        tensors[official] = TensorInfo(shape, first.dtype, first.file)
    for name in found:
        tied_copy = config.tie_word_embeddings and name == table.outer["output.weight"]
        if name not in known and not tied_copy and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(
                f"{path}: tensor {name} has no place in InternLM2, so this is another architecture. Give "
                "a model with the plain Llama block: RMSNorm, SwiGLU, grouped-query attention, nothing more."
            )
    return tensors


def _check_part(path: Path, name: str, shape: tuple[int, ...], found: Mapping[str, TensorInfo]) -> None:
    if name not in found:
        raise CheckpointError(
            f"{path}: tensor {name} is missing. Download the model again; a part may not have arrived."
        )
    if found[name].shape != shape:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(found[name].shape)}, but its configuration asks for "
            f"{list(shape)}. The weights and the configuration belong to different models."
        )
