"""The measurements of `benchmarks/gpu.py`, on the CPU at a tiny shape: that they run, and what they count."""

import sys
from pathlib import Path

import pytest
import torch

from internlm2.model.config import preset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu():
    """The script as a module."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import gpu
    finally:
        sys.path.remove(folder)
    return gpu


def test_without_a_gpu_it_says_so_and_writes_nothing(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="finds no CUDA GPU here, so there is nothing to measure"):
        gpu.main()


@torch.inference_mode()
def test_the_measurements_run_and_give_one_line_each(gpu, monkeypatch):
    for name, value in {"BATCHES": (1, 3), "STEPS": 2, "CONTEXT": 20, "ROUNDS": 1, "CHUNK": 16}.items():
        monkeypatch.setattr(gpu, name, value)
    card = gpu.Card(1e9, 1e9)
    lines = gpu.decode_rows(preset("tiny"), "int4", card, CPU)
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| int4", kv_dtype, rows] for kv_dtype in ("bfloat16", "int8") for rows in ("1", "3")
    ]
    [line] = gpu.prefill_rows(preset("tiny"), "bfloat16", card, CPU, (40,))
    assert line.startswith("| bfloat16 | 40 | ")


def test_bytes_and_operations_are_those_of_the_shape(gpu):
    config = preset("7b")
    # Counted by hand: 2.8e15 in products and 10.5e15 in attention.
    assert gpu.prefill_flops(config, 200_000) == pytest.approx(13.3e15, rel=0.01)
    tiny = preset("tiny")
    model = gpu.random_model(tiny, "bfloat16", CPU)
    weights = sum(weight.nbytes for weight in model.parameters()) - model.model.tok_embeddings.weight.nbytes
    keys = 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, their width, bytes
    assert gpu.step_bytes(model, 3, 100, None) == weights + 3 * 100 * keys
    assert gpu.step_bytes(model, 1, 100, "int8") == weights + 100 * keys / 2 * (1 + 4 / 16)
