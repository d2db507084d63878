"""Packed weights kept on disk: the same bits, never stale, never half, never more than allowed."""

import os
import time
from pathlib import Path

import pytest
import torch

from folders import write_chat_folder
from internlm2.checkpoint import load_packed as module
from internlm2.checkpoint import packed_cache
from internlm2.checkpoint.load import load_model
from internlm2.checkpoint.load_packed import load_packed_checkpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.packed_cache import PackedCache
from internlm2.quant.linear import quantize_model

IDS = torch.tensor([[1, 5, 9, 200, 3, 77, 42, 8]])


@pytest.fixture(autouse=True)
def _tiny_models_count(monkeypatch):
    monkeypatch.setattr(packed_cache, "MIN_WEIGHT_BYTES", 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_chat_folder(tmp_path / "model")


@pytest.fixture
def cache(tmp_path) -> PackedCache:
    return PackedCache(tmp_path / "cache")


def load(folder: Path, cache: PackedCache | None, kind: str = "int4", dtype: str = "float32"):
    return load_packed_checkpoint(open_checkpoint(folder), dtype=dtype, quantization=kind, cache=cache)


@pytest.fixture
def roundings(monkeypatch) -> list[int]:
    """Grows by one for every matrix that is rounded."""
    calls: list[int] = []
    real = module.quantize_weight

    def counting(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "quantize_weight", counting)
    return calls


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_from_the_cache_from_the_files_and_in_place_give_the_same_bits(folder, cache, kind, dtype, roundings):
    first, num_rounded = load(folder, cache, kind, dtype)(IDS), len(roundings)
    assert num_rounded == 2 * 4 + 1
    assert len(cache.entries()) == 1
    second = load(folder, cache, kind, dtype)(IDS)
    assert len(roundings) == num_rounded
    loaded = load_model(folder, dtype=dtype)
    quantize_model(loaded, kind)
    assert torch.equal(first, second)
    assert torch.equal(first, load(folder, None, kind, dtype)(IDS))
    assert torch.equal(first, loaded(IDS))
    assert torch.equal(load(folder, cache, kind, dtype).hidden_states(IDS), loaded.hidden_states(IDS))


@torch.inference_mode()
def test_a_changed_model_is_never_answered_from_the_cache(folder, cache, tmp_path):
    load(folder, cache)
    other = write_chat_folder(tmp_path / "other")
    weights = folder / "model.safetensors"
    before = weights.stat()
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-4000:] = bytes(4000)
    weights.write_bytes(bytes(content))  # in place, of the same size
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # with the same time of change
    assert weights.stat().st_size == before.st_size
    assert torch.equal(load(folder, cache)(IDS), load(folder, None)(IDS))
    assert len(cache.entries()) == 2


def test_formats_dtypes_and_code_have_files_of_their_own(folder, cache, monkeypatch):
    for kind, dtype in (("int4", "float32"), ("int8", "float32"), ("int4", "bfloat16")):
        load(folder, cache, kind, dtype)
    assert len(cache.entries()) == 3
    load(folder, cache)
    assert len(cache.entries()) == 3
    changed = folder.parent / "weight.py"
    changed.write_text("# rounds in another way")
    monkeypatch.setattr(packed_cache.weight_code, "__file__", str(changed))
    load(folder, cache)
    assert len(cache.entries()) == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty", "grown"])
@torch.inference_mode()
def test_a_damaged_file_is_made_again(folder, cache, damage, roundings, caplog):
    expected = load(folder, cache)(IDS)
    path = cache.entries()[0].path
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[100] ^= 4
    elif damage == "header":
        content[-40] ^= 1
    elif damage == "grown":
        content += b"more"
    else:
        content = bytearray()
    path.write_bytes(content)
    roundings.clear()
    assert torch.equal(load(folder, cache)(IDS), expected)
    assert roundings
    roundings.clear()
    assert torch.equal(load(folder, cache)(IDS), expected)
    assert not roundings


def test_nothing_is_left_when_loading_fails(folder, cache, monkeypatch):
    real = module.quantize_weight
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "quantize_weight", failing)
    with pytest.raises(KeyboardInterrupt):
        load(folder, cache)
    assert list(cache.root.iterdir()) == []


@torch.inference_mode()
def test_a_cache_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    load(folder, PackedCache(tmp_path / "file" / "cache"))
    monkeypatch.setattr(
        packed_cache.shutil, "disk_usage", lambda _: os.terminal_size((0, 0)) and type("U", (), {"free": 10})
    )
    cache = PackedCache(tmp_path / "full")
    load(folder, cache)
    assert cache.entries() == []

    def full(self, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(packed_cache, "MIN_WEIGHT_BYTES", 0)
    monkeypatch.setattr(packed_cache.CacheWriter, "_put", full)
    assert torch.equal(load(folder, cache)(IDS), load(folder, None)(IDS))
    assert list(cache.root.iterdir()) == []


def test_the_least_recently_used_go_when_there_are_too_many(folder, cache):
    load(folder, cache, "int4")
    load(folder, cache, "int8")
    four, eight = cache.entries()
    os.utime(eight.path, (time.time() - 100, time.time() - 100))
    os.utime(four.path, (time.time() - 200, time.time() - 200))
    load(folder, cache, "int4")  # used again
    elsewhere = PackedCache(cache.root / "elsewhere")
    load(folder, elsewhere, "int4", "bfloat16")
    third_bytes = elsewhere.entries()[0].num_bytes
    small = PackedCache(cache.root, max_bytes=four.num_bytes + max(eight.num_bytes, third_bytes))
    load(folder, small, "int4", "bfloat16")
    left = {entry.path for entry in small.entries()}
    assert len(left) == 2
    assert four.path in left
    assert eight.path not in left
    load(
        folder, PackedCache(cache.root, max_bytes=10), "bfloat16"
    )  # larger than all that is allowed: not kept
    assert len(cache.entries()) == 2


def test_what_a_killed_process_left_goes_after_a_day(folder, cache):
    cache.root.mkdir()
    old, new = cache.root / ".old.part", cache.root / ".new.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    load(folder, cache)
    assert not old.exists()
    assert new.exists()


def test_clearing(folder, cache):
    load(folder, cache)
    size = cache.entries()[0].num_bytes
    assert cache.clear() == size
    assert cache.entries() == []
    assert PackedCache(cache.root / "nowhere").clear() == 0


def test_small_models_are_not_kept(folder, cache, monkeypatch):
    monkeypatch.setattr(packed_cache, "MIN_WEIGHT_BYTES", 8_000_000)
    load(folder, cache)
    assert cache.entries() == []


def test_a_large_copy_in_bfloat16_is_not_kept(folder, cache, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BFLOAT16_BYTES", 1000)
    load(folder, cache, "bfloat16")
    assert cache.entries() == []
    load(folder, cache, "int8")
    assert len(cache.entries()) == 1
