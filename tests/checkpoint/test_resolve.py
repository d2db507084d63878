"""Model arguments: paths, ids, `demo`; downloads that break off say what to do and lose nothing."""

import shutil

import pytest

from goldens import golden_folder
from internlm2.checkpoint import resolve
from internlm2.errors import CheckpointError, DownloadError


def test_a_path_is_itself(tmp_path):
    assert resolve.resolve_model(tmp_path) == tmp_path
    assert resolve.resolve_model(str(tmp_path)) == tmp_path


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve.resolve_model("~/m") == tmp_path / "m"


@pytest.mark.parametrize("text", ["nowhere", "./no/where", "a/b/c", "~/none", ".hidden/x"])
def test_what_is_neither_path_nor_id_is_refused(text):
    with pytest.raises(CheckpointError, match="there is no such folder or file"):
        resolve.resolve_model(text)


def test_an_id_is_downloaded_without_python_files(tmp_path, monkeypatch):
    asked: list[dict[str, object]] = []

    def fetch(name, **options):
        asked.append({"name": name, **options})
        shutil.copytree(golden_folder("gqa"), tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    path = resolve.download("internlm/internlm2-chat-7b@main", fetch=fetch)
    assert path == tmp_path / "snapshot"
    assert asked[0]["name"] == "internlm/internlm2-chat-7b"
    assert asked[0]["revision"] == "main"
    assert not any(pattern.endswith(".py") or pattern == "*" for pattern in asked[0]["allow_patterns"])


def test_bin_weights_are_fetched_only_when_there_are_no_safetensors(tmp_path):
    patterns: list[list[str]] = []

    def fetch(_, *, allow_patterns, **__):
        patterns.append(allow_patterns)
        if "*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    resolve.download("a/b", fetch=fetch)
    assert [("*.safetensors" in p, "*.bin" in p) for p in patterns] == [(True, False), (False, True)]


def test_a_repository_without_weights_is_refused(tmp_path):
    with pytest.raises(DownloadError, match="a/b holds no weights"):
        resolve.download("a/b", fetch=lambda *_, **__: str(tmp_path))


def test_a_download_cut_off_half_way_can_be_continued(tmp_path):
    def fetch(*_, **__):
        (tmp_path / "model.safetensors.incomplete").write_bytes(b"half")
        raise ConnectionError("connection reset after 50 %")

    with pytest.raises(
        DownloadError,
        match=r"connection reset after 50 %.*run the same command again: what has arrived is kept",
    ):
        resolve.download("a/b", fetch=fetch)
    assert (tmp_path / "model.safetensors.incomplete").exists()


def test_without_network_the_real_client_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="Could not download no-such-organisation/no-such-model"):
        resolve.download("no-such-organisation/no-such-model", local_folder=tmp_path)


def test_the_cache_follows_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resolve.cache_root() == tmp_path / "internlm2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve.cache_root() == tmp_path / ".cache/internlm2"
