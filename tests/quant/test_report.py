"""The report of losses against the same figures from whole models, and `internlm2 model quantize` end to end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from folders import byte_tokenizer_json
from internlm2.checkpoint.formats.official import ModelCheckpoint
from internlm2.checkpoint.load import load_model
from internlm2.checkpoint.load_packed import load_packed
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.quantization_loss import CALIBRATION_TEXT, EVALUATION_TEXT, measure_loss, read_text
from internlm2.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from internlm2.checkpoint.save import save_checkpoint
from internlm2.cli.main import run
from internlm2.errors import RequestError
from internlm2.model.config import ModelConfig
from internlm2.model.heads import build_model

TEXT = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A random model over bytes whose sizes groups of 32 divide."""
    config = ModelConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=600,
    )  # fmt: skip
    model = build_model(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.12, generator=generator) if parameter.dim() == 2 else parameter.fill_(1.0)
    folder = tmp_path_factory.mktemp("plain") / "model"
    save_checkpoint(ModelCheckpoint(model), folder)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True})
    )
    return folder


def quantised(plain: Path, target: Path, **options) -> Path:
    quantize_checkpoint(open_checkpoint(plain), target, QuantizeOptions(method="rtn", **options))
    return target


@pytest.mark.parametrize("kind", ["int4", "int8"])
@torch.inference_mode()
def test_the_figures_are_those_of_the_whole_models(plain, tmp_path, kind):
    folder = quantised(plain, tmp_path / "q", kind=kind)
    found = measure_loss(open_checkpoint(plain), open_checkpoint(folder), TEXT)
    logits = [model(TEXT).double() for model in (load_model(plain), load_packed(folder, dtype="float32"))]
    for one, ours in zip(logits, found.perplexity, strict=True):
        loss = F.cross_entropy(one[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten())
        assert ours == pytest.approx(loss.exp().item(), rel=1e-4)
    before, after = (one.flatten(0, 1).log_softmax(-1) for one in logits)
    divergences = F.kl_div(after, before, log_target=True, reduction="none").sum(-1)
    assert found.kl_mean == pytest.approx(divergences.mean().item(), rel=1e-3, abs=1e-6)
    assert found.kl_p99 == pytest.approx(divergences.quantile(0.99).item(), rel=1e-3, abs=1e-6)
    assert found.top1_agreement == pytest.approx(
        (before.argmax(-1) == after.argmax(-1)).double().mean().item(), abs=0.01
    )
    assert found.num_tokens == TEXT.numel()
    assert found.perplexity_rise == pytest.approx(found.perplexity[1] / found.perplexity[0] - 1)
    sizes = [(path / "model.safetensors").stat().st_size for path in (plain, folder)]
    assert found.weight_bytes == tuple(sizes)


@torch.inference_mode()
def test_an_error_is_shown_at_the_linear_that_makes_it(plain, tmp_path):
    folder = quantised(plain, tmp_path / "q", kind="int8")
    healthy = measure_loss(open_checkpoint(plain), open_checkpoint(folder), TEXT).linear_errors
    assert len(healthy) == 3 * 4
    assert all(0.001 < error < 0.03 for error in healthy.values())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, folder / "model.safetensors")
    found = measure_loss(open_checkpoint(plain), open_checkpoint(folder), TEXT).linear_errors
    assert found.pop("1.feed_forward.w2") == pytest.approx(0.5, abs=0.01)
    assert found == {name: pytest.approx(error, rel=1e-3) for name, error in healthy.items() if name in found}


@torch.inference_mode()
def test_a_model_that_is_packed_in_memory_can_be_measured(plain):
    checkpoint = open_checkpoint(plain)
    losses = {
        kind: measure_loss(checkpoint, checkpoint, TEXT, quantization=kind)
        for kind in ("bfloat16", "int8", "int4")
    }
    assert 0 < losses["bfloat16"].kl_mean < losses["int4"].kl_mean
    assert losses["int8"].kl_mean < losses["int4"].kl_mean / 4


def test_models_that_do_not_belong_together_are_refused(plain, tmp_path):
    other = shutil.copytree(plain, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 2}
    tensors = {k: v for k, v in load_file(other / "model.safetensors").items() if ".layers.2." not in k}
    (other / "config.json").write_text(json.dumps(config))
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(RequestError, match="is not a quantised form of"):
        measure_loss(open_checkpoint(plain), open_checkpoint(other), TEXT, quantization="int8")


# The command


def test_the_command_writes_a_folder_with_its_loss(plain, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    target = tmp_path / "q"
    command = ["model", "quantize", str(plain), str(target), "--to", "int4", "--calibration", str(text)]
    assert run([*command, "--report", "--text", str(text), "--report-tokens", "600", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["folder"] == str(target)
    loss = json.loads((target / "loss.json").read_text())
    assert printed["loss"] == loss
    assert set(loss) == {
        "num_tokens", "perplexity", "perplexity_rise", "top1_agreement", "kl_mean", "kl_p99", "linear_errors", "weight_bytes",
    }  # fmt: skip
    assert loss["num_tokens"] == 512
    assert load_packed(target)(TEXT).shape == (3, 40, 300)
    assert run(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_command_prints_for_people_and_needs_no_text(plain, tmp_path, capsys):
    command = [
        "model",
        "quantize",
        str(plain),
        str(tmp_path / "q"),
        "--to",
        "int8",
        "--method",
        "rtn",
        "--report",
    ]
    assert run([*command, "--report-tokens", "100"]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "  layer 2 " in out
    assert out.endswith(f"{tmp_path / 'q'}\n")
    default = [
        "model",
        "quantize",
        str(plain),
        str(tmp_path / "g"),
        "--to",
        "int4",
        "--calibration-tokens",
        "400",
    ]
    assert run([*default, "--group", "64"]) == 2
    assert "columns, which groups of 64 do not divide. Give --group 32" in capsys.readouterr().err
    assert run(default) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'g'}\n"


def test_calibration_helps_on_the_text_it_has_seen(plain, tmp_path):
    checkpoint = open_checkpoint(plain)
    ids = read_text(checkpoint, CALIBRATION_TEXT, max_tokens=2048)
    assert ids.shape == (4, 512)
    losses = {}
    for method in ("rtn", "gptq"):
        folder = tmp_path / method
        quantize_checkpoint(checkpoint, folder, QuantizeOptions(kind="int4", method=method), text=ids)
        losses[method] = measure_loss(checkpoint, open_checkpoint(folder), ids[:2]).kl_mean
    assert losses["gptq"] < 0.8 * losses["rtn"]


def test_texts_that_cannot_be_read_are_told(plain, tmp_path, capsys):
    command = ["model", "quantize", str(plain), str(tmp_path / "q"), "--to", "int4", "--calibration"]
    assert run([*command, str(tmp_path / "none.txt")]) == 2
    assert "Cannot read" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert run([*command, str(tmp_path / "latin.txt")]) == 2
    assert "as UTF-8 text" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
    without = ModelCheckpoint(load_model(plain))
    with pytest.raises(RequestError, match="has no tokenizer to read a text with"):
        read_text(without, EVALUATION_TEXT)


def test_the_texts_that_come_along_hold_three_languages_and_differ():
    calibration, evaluation = (
        path.read_text(encoding="utf-8") for path in (CALIBRATION_TEXT, EVALUATION_TEXT)
    )
    for text in (calibration, evaluation):
        assert sum("\u4e00" <= c <= "\u9fff" for c in text) > 1000
        assert "CREATE TABLE" in text
        assert text.count(" the ") > 50
    lines = {line for line in calibration.splitlines() if len(line) > 60}
    shared = [line for line in evaluation.splitlines() if line in lines]
    assert len(shared) <= 2


def test_the_cache_command_shows_and_clears(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(["model", "cache"]) == 0
    assert "0 files, 0.0 MB of at most" in capsys.readouterr().out
    folder = tmp_path / "internlm2" / "packed"
    folder.mkdir(parents=True)
    (folder / "abc.packed").write_bytes(bytes(5_000_000))
    assert run(["model", "cache", "--clear"]) == 0
    assert "5.0 MB freed" in capsys.readouterr().out
    assert run(["model", "cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_files"] == 0
