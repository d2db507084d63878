"""Saving: exact, sharded, atomic, and nothing half-written when the disk says no."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from goldens import golden_folder
from internlm2 import files, load_model
from internlm2.checkpoint.formats.official import ModelCheckpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.save import save_checkpoint
from internlm2.errors import CheckpointError, ExportError

ALL = ["gqa", "mha", "mqa-bias", "six-groups", "linear", "dynamic-ntk", "reward", "sequence-classification"]


def state(model) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.parameters_by_checkpoint_name().items()}


@pytest.mark.parametrize("max_shard_bytes", [10_000_000, 100_000, 1])
@pytest.mark.parametrize("name", ALL)
def test_a_saved_folder_is_the_same_model(name, max_shard_bytes, tmp_path):
    original = open_checkpoint(golden_folder(name))
    save_checkpoint(original, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    again = open_checkpoint(tmp_path / "out")
    assert again.config == original.config
    assert set(again.tensors) == set(original.tensors)
    for tensor in original.tensors:
        assert torch.equal(again.read(tensor), original.read(tensor))


def test_shards_and_index_agree(tmp_path):
    save_checkpoint(open_checkpoint(golden_folder("gqa")), tmp_path / "out", max_shard_bytes=200_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    sizes = 0
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "out" / file)
        assert set(tensors) == {n for n, f in index["weight_map"].items() if f == file}
        sizes += sum(t.nbytes for t in tensors.values())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sizes


def test_a_model_in_memory_is_saved_in_another_dtype(tmp_path):
    model = load_model(golden_folder("mqa-bias"))
    save_checkpoint(ModelCheckpoint(model), tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_model(tmp_path / "out", dtype="bfloat16")
    for name, tensor in state(model).items():
        assert torch.equal(state(again)[name], tensor.bfloat16())


def test_tokenizer_files_travel_without_pointers_to_old_code(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden_folder("gqa"), source)
    (source / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["x.Y", null]}, "bos_token": "<s>"}'
    )
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 92542]}')
    (source / "modeling_internlm2.py").write_text("raise SystemExit")
    save_checkpoint(open_checkpoint(source), tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"bos_token": "<s>"}
    assert (tmp_path / "out/generation_config.json").exists()
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(ExportError, match="exists already"):
        save_checkpoint(open_checkpoint(golden_folder("gqa")), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_incomplete_checkpoint_is_not_saved(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden_folder("gqa"), source)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 3}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model.layers.2.* is missing"):
        save_checkpoint(open_checkpoint(source), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ExportError, match=r"the disk has 0\.0 MB free"):
        save_checkpoint(open_checkpoint(golden_folder("gqa")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def no_space(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("internlm2.checkpoint.save._write_safetensors", no_space)
    with pytest.raises(ExportError, match="the disk is full"):
        save_checkpoint(open_checkpoint(golden_folder("gqa")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_place_without_permission_is_told(tmp_path, monkeypatch, code):
    # root may write anywhere, so the refusal is the system call's own, injected
    def denied(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("internlm2.files.tempfile.mkdtemp", denied)
    with pytest.raises(ExportError, match="no permission to write there"):
        save_checkpoint(open_checkpoint(golden_folder("gqa")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is a file where a folder is needed"):
        save_checkpoint(open_checkpoint(golden_folder("gqa")), tmp_path / "file" / "out")


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("internlm2.checkpoint.save.write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(open_checkpoint(golden_folder("gqa")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_written_files_are_readable_by_others(tmp_path):
    save_checkpoint(open_checkpoint(golden_folder("gqa")), tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


class TestFiles:
    def test_a_failed_write_keeps_the_old_content(self, tmp_path, monkeypatch):
        path = tmp_path / "a.txt"
        files.write_text(path, "old")

        def failing(_):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(ExportError, match="the disk is full"):
            files.write_text(path, "new")
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]

    def test_a_new_file_appears_only_when_it_is_whole(self, tmp_path):
        target = tmp_path / "a.gguf"
        with pytest.raises(ZeroDivisionError):  # noqa: PT012, SIM117 - the block is the thing under test
            with files.new_file(target) as temporary:
                temporary.write_bytes(b"half")
                raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []
        with files.new_file(target) as temporary:
            temporary.write_bytes(b"whole")
            assert not target.exists()
        assert target.read_bytes() == b"whole"

    def test_every_other_refusal_is_told_in_the_words_of_the_system(self, tmp_path):
        with pytest.raises(ExportError, match=r"File name too long\. Choose another name"):
            files.write_text(tmp_path / ("x" * 300), "")

    def test_the_current_folder_is_refused_before_writing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ExportError, match="is the current folder"):
            save_checkpoint(open_checkpoint(golden_folder("gqa").absolute()), Path())
        assert list(tmp_path.iterdir()) == []
