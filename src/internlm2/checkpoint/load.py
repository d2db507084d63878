"""Load any checkpoint as a torch module: build on the meta device, then take the tensors in one by one.

Peak memory is the weights plus one tensor. Where dtype and device allow, a weight stays a private view of the
mapped file, so loading costs no copy at all.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from internlm2.checkpoint import memory
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import resolve_model
from internlm2.checkpoint.source import (
    Checkpoint,
    TensorInfo,
    cast,
    check_complete,
    parameters,
    parse_dtype,
)
from internlm2.errors import CheckpointError, RequestError
from internlm2.log import progress
from internlm2.model.heads import Model, RopeMode, build_model
from internlm2.parallel.group import TensorGroup
from internlm2.parallel.tensor import apply, shard_plan

M = TypeVar("M", bound=Model)


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    rope_mode: RopeMode = "stateless",
) -> Model:
    """Load the model at `path` with the head that its config.json names.

    path: a local folder or GGUF file, a Hugging Face id, or "demo". dtype: "float32", "bfloat16", "float16" or
    "auto" (as the files). rope_mode: see `internlm2.model.heads.Model`. Returns a torch.nn.Module in eval mode:
    `model(input_ids)` gives logits (B, T, V) float32.
    Raises CheckpointError, ConfigError, DownloadError, MemoryBudgetError.
    """
    return load_checkpoint(
        open_checkpoint(resolve_model(path)), dtype=dtype, device=device, rope_mode=rope_mode
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    rope_mode: RopeMode = "stateless",
    group: TensorGroup | None = None,
) -> Model:
    """As `load_model`, from a checkpoint that is open already.

    group: the processes that hold the model together, each of which calls this with its own device. Each reads and
    keeps only its part (see `parallel.tensor.apply`), for inference: the part takes no gradients.
    """
    check_complete(checkpoint)
    target_device = parse_device(device)
    target = file_dtype(checkpoint) if dtype == "auto" else parse_dtype(dtype)
    source = checkpoint if group is None else _Part(checkpoint, group, device=target_device)
    shapes = {name: info.shape for name, info in parameters(source)}
    needed_bytes = memory.count_parameters(shapes).total * target.itemsize
    memory.check_fits(needed_bytes, device=target_device, what=f"{checkpoint.path} in {dtype}")
    with torch.device("meta"):
        model = build_model(checkpoint.config, rope_mode=rope_mode)
    if group is not None:
        apply(model, group)
    with progress("Loading weights", total=needed_bytes / 1e6) as bar:
        for name in shapes:
            tensor = cast(source.read(name), target, name=name).to(target_device)
            module_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=group is None))
            bar.advance(tensor.numel() * target.itemsize / 1e6)
    return model.eval()


class _Part:
    """One process's part of a checkpoint: the official names, and of each split tensor the process's own rows."""

    def __init__(self, checkpoint: Checkpoint, group: TensorGroup, *, device: torch.device) -> None:
        if device.type != group.device.type or device.index not in (None, group.device.index):
            raise RequestError(
                f"device is {str(device)!r}, but this process's group computes on {str(group.device)!r}. "
                "Give both the same."
            )
        self.path = checkpoint.path
        self.config = checkpoint.config
        self.tokenizer_folder = checkpoint.tokenizer_folder
        self._checkpoint = checkpoint
        self._rank = group.rank
        self._plan = shard_plan(checkpoint.config, group.size)
        self.tensors: Mapping[str, TensorInfo] = {
            name: replace(info, shape=self._plan.local_shape(name, info.shape, rank=group.rank))
            for name, info in checkpoint.tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """A copy of the part; of a mapped file only the part is read into memory."""
        return self._plan.take(name, self._checkpoint.read(name), rank=self._rank)


def file_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype in which the files hold the embedding."""
    return checkpoint.tensors["model.tok_embeddings.weight"].dtype


def parse_device(name: str) -> torch.device:
    """A torch device that exists here. Raises RequestError otherwise."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"device is {name!r}, but must be 'cpu', 'cuda' or 'cuda:N'.") from error
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device is {name!r}, but must be 'cpu', 'cuda' or 'cuda:N'.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device is {name!r}, but torch finds no NVIDIA GPU here. Use 'cpu'.")
    return device


def require_head(model: Model, expected: type[M], *, use: str) -> M:
    """The model itself, known to have the head that `use` needs. Raises CheckpointError when it has another."""
    if not isinstance(model, expected):
        raise CheckpointError(
            f"This checkpoint has a {model.config.head} head, but {use} needs {expected.__name__}. "
            "Give a folder of that kind."
        )
    return model
