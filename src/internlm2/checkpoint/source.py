"""What every weight format looks like from here: official names, shapes and a way to read one tensor.

`Store` is raw files with whatever names they have; `Checkpoint` is a model in InternLM2's names. A format
is a `Checkpoint` that knows how to make each official tensor, so loading and converting need no special case.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from internlm2.errors import CheckpointError
from internlm2.model.config import ModelConfig
from internlm2.model.heads import build_model

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read. file: name of the file that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def num_bytes(self) -> int:
        """Size in its own dtype."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Store(Protocol):
    """Tensors in files, under the files' own names."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Everything the files hold."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in its own dtype; memory-mapped where the format allows."""
        ...


class Checkpoint(Protocol):
    """A model in the official names."""

    @property
    def path(self) -> Path:
        """Where it lies, for messages."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The network that it holds."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Official name -> what is known before reading."""
        ...

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where its tokenizer files lie; None when there are none."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, under its official name and in its official layout, on the CPU."""
        ...


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every tensor that a model of this shape has; built on the meta device."""
    return dict(_expected_shapes(config))


@functools.lru_cache(maxsize=4)  # a start asks several times, and a large network takes a while to build
def _expected_shapes(config: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    with torch.device("meta"):
        model = build_model(config)
    return tuple((name, tuple(p.shape)) for name, p in model.parameters_by_checkpoint_name().items())


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a tensor is missing, unknown, or of another shape than config.json says."""
    expected = expected_shapes(checkpoint.config)
    present = checkpoint.tensors
    for name, shape in expected.items():
        if name not in present:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} is missing ({_how_many(expected, present)}). "
                "Download the folder again; a shard may not have arrived."
            )
        found = present[name].shape
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.path / present[name].file}: tensor {name} has shape {list(found)}, but config.json "
                f"asks for {list(shape)}. The weights and config.json belong to different models."
            )
    for name in present:
        if name not in expected and not _is_harmless(name, checkpoint.config):
            raise CheckpointError(
                f"{checkpoint.path / present[name].file}: tensor {name} is not part of this architecture "
                f"({checkpoint.config.head} head). Check `architectures`, `bias` and `num_hidden_layers` in "
                "config.json."
            )


def _how_many(expected: Mapping[str, object], present: Mapping[str, object]) -> str:
    return f"{sum(name not in present for name in expected)} of {len(expected)} tensors"


def _is_harmless(name: str, config: ModelConfig) -> bool:
    # Rotary tables that very old .bin files carry, and the copy of a tied embedding.
    return name.endswith(".rotary_emb.inv_freq") or (name == "output.weight" and config.tie_word_embeddings)


def parameters(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors that make up the model, in the order in which the files hold them best."""
    expected = expected_shapes(checkpoint.config)
    for name, info in checkpoint.tensors.items():
        if name in expected:
            yield name, info


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype called "float32", "bfloat16" or "float16". Raises CheckpointError otherwise."""
    if name not in DTYPES:
        raise CheckpointError(f"dtype is {name!r}, but must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def cast(tensor: torch.Tensor, dtype: torch.dtype, *, name: str) -> torch.Tensor:
    """`tensor` in `dtype`. Raises CheckpointError when a finite value would become infinite."""
    result = tensor.to(dtype)
    narrows = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrows and not bool(result.isfinite().all()) and bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"Tensor {name} holds values up to {tensor.abs().max():.3g}, beyond {dtype_name(dtype)}'s "
            f"{torch.finfo(dtype).max:.4g}. Choose bfloat16 or float32."
        )
    return result


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32, and so on."""
    return str(dtype).removeprefix("torch.")
