"""The golden checkpoints: where they lie and what they hold. Their origin: data/model/ORIGIN.md."""

from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"
LANGUAGE_GOLDENS = ["gqa", "mha", "mqa-bias", "six-groups", "linear", "dynamic-ntk", "dynamic-ntk-factor3"]
GENERATE_GOLDENS = ["gqa", "mha", "mqa-bias", "six-groups"]


def golden_folder(name: str) -> Path:
    return DATA / "model" / name


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(golden_folder(name) / "golden.safetensors")


def forwards(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The `forward.N` cases of a golden file."""
    return [
        n.removesuffix(".input_ids") for n in tensors if n.startswith("forward.") and n.endswith(".input_ids")
    ]
