"""Folders in the official layout, old and new, and a model in memory seen as one."""

from collections.abc import Mapping
from pathlib import Path

import torch

from internlm2.checkpoint.config_json import CONFIG_FILE, parse_config, read_json
from internlm2.checkpoint.source import TensorInfo
from internlm2.checkpoint.stores import open_store
from internlm2.model.config import ModelConfig
from internlm2.model.heads import Model


class OfficialCheckpoint:
    """config.json plus safetensors or .bin files whose tensors carry the official names already."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config: ModelConfig = parse_config(
            read_json(folder / CONFIG_FILE), where=str(folder / CONFIG_FILE)
        )
        self._store = open_store(folder)
        self.tensors: Mapping[str, TensorInfo] = self._store.tensors
        self.tokenizer_folder: Path | None = folder

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it lies in its file; memory-mapped."""
        return self._store.read(name)


class ModelCheckpoint:
    """A model in memory, so that it is saved and exported by the same code as a folder.

    tokenizer_folder: where the tokenizer files to go with it lie; None for none.
    """

    def __init__(self, model: Model, *, tokenizer_folder: Path | None = None) -> None:
        self.path = Path("memory")
        self.config = model.config
        self._parameters = model.parameters_by_checkpoint_name()
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(p.shape), p.dtype, "model") for name, p in self._parameters.items()
        }
        self.tokenizer_folder = tokenizer_folder

    def read(self, name: str) -> torch.Tensor:
        """The live tensor, detached, on the CPU."""
        return self._parameters[name].detach().cpu()
