"""Models with rounded weights for GPUs, loaded on the CPU, where the kernels' twins compute."""

import math

import pytest
import torch
from quantized_folders import write

from folders import write_chat_folder
from internlm2.checkpoint import inference
from internlm2.checkpoint.inference import WeightChoice, choose_weights, weight_bytes
from internlm2.checkpoint.load import load_model
from internlm2.checkpoint.load_gpu import load_gpu_checkpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.errors import RequestError
from internlm2.kernels.gpu.weight import unpack
from internlm2.quant.gpu import GpuFeedForward, GpuLinear, gpu_weight, quantize_for_gpu

IDS = torch.tensor([[1, 17, 300, 42, 5, 5, 80]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_folder(tmp_path_factory.mktemp("weights") / "model")


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_loading_rounds_as_a_loaded_model_is_rounded(folder, kind):
    plain = load_model(folder, dtype="bfloat16")
    exact = load_model(folder)(IDS)
    before = weight_bytes(plain)
    loaded = load_gpu_checkpoint(open_checkpoint(folder), dtype="bfloat16", device="cpu", quantization=kind)
    quantize_for_gpu(plain, kind)
    assert not any(weight.is_meta for weight in loaded.parameters())
    found = loaded(IDS)
    assert torch.equal(found, plain(IDS))
    error = (found - exact).norm() / exact.norm()
    assert error < {"int8": 0.02, "int4": 0.2, "fp8": 0.08}[kind]
    assert weight_bytes(loaded) < 0.8 * before


@pytest.mark.parametrize("options", [{"kind": "int4"}, {"kind": "int8", "method": "rtn"}], ids=str)
def test_whole_numbers_of_files_are_taken_as_they_are(tmp_path, options):
    folder = write(tmp_path / "m", **options)
    checkpoint, plain = open_checkpoint(folder), load_model(folder)
    model = load_gpu_checkpoint(checkpoint, dtype="float32", device="cpu", quantization=options["kind"])
    for index, layer in enumerate(model.model.layers):
        w1, w3, wo = (
            checkpoint.rounded(f"model.layers.{index}.{name}.weight").values()
            for name in ("feed_forward.w1", "feed_forward.w3", "attention.wo")
        )
        assert isinstance(layer.feed_forward, GpuFeedForward)
        assert torch.equal(unpack(layer.feed_forward.w13.packed), torch.cat((w1, w3)))
        assert torch.equal(unpack(layer.attention.wo.packed), wo)
    torch.testing.assert_close(model(IDS % 90), plain(IDS % 90), rtol=0.05, atol=0.05)


def test_the_engine_loads_so_on_a_gpu(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(inference, "load_gpu_checkpoint", lambda checkpoint, **options: asked.update(options))
    inference.load_for_inference(None, WeightChoice("bfloat16", "int4", "as asked for"), device="cuda:1")
    assert asked == {
        "dtype": "bfloat16",
        "device": "cuda:1",
        "quantization": "int4",
        "rope_mode": "stateless",
    }


def test_fp8_is_refused_where_it_cannot_be(folder, monkeypatch):
    with pytest.raises(
        RequestError, match=r"computes in bfloat16 or float16, but the model is in torch.float32"
    ):
        load_gpu_checkpoint(open_checkpoint(folder), dtype="float32", device="cpu", quantization="fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        RequestError, match=r"compute capability 8.9 .* but cuda has 8.0. Use quantization='int8'"
    ):
        choose_weights(wanted="fp8", dtype="bfloat16", device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_weights(wanted="fp8", dtype="bfloat16", device="cuda").packed_as == "fp8"
    with pytest.raises(RequestError, match=r"multiples of 16, but this model has one of \(24, 20\)"):
        gpu_weight(torch.ones(24, 20), "fp8")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_that_are_not_finite_and_second_roundings_are_refused(folder, kind):
    with pytest.raises(RequestError, match="NaN or infinite"):
        gpu_weight(torch.full((16, 32), math.nan), kind)
    model = load_model(folder, dtype="bfloat16")
    quantize_for_gpu(model, kind)
    assert isinstance(model.model.layers[0].attention.wqkv, GpuLinear)
    with pytest.raises(RequestError, match="packed, split or adapted already"):
        quantize_for_gpu(model, kind)
