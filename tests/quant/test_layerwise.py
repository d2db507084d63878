"""A layer is calibrated in steps: what each weight is rounded for, and that scaling columns changes nothing by itself."""

import copy

import pytest
import torch
import torch.nn.functional as F

from internlm2.errors import RequestError
from internlm2.model.attention import causal_attend
from internlm2.model.config import ModelConfig
from internlm2.model.heads import build_model
from internlm2.quant import channel_scales
from internlm2.quant.calibrate import round_calibrated, round_nearest
from internlm2.quant.layerwise import Calibration, Stream, calibrate_layer, sequences, statistics_of
from internlm2.quant.weight import WeightFormat

INT4 = WeightFormat("int4", 32, has_zeros=True, whole_zeros=True)
INT8 = WeightFormat("int8", 32)
IDS = sequences(torch.randint(0, 90, (240,), generator=torch.Generator().manual_seed(2)).tolist(), length=40)
LINEARS = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"]


@torch.no_grad()
def a_model(*, bias: bool = False, layers: int = 1):
    """Some channels of its stream and its hidden units are large, as in real models."""
    config = ModelConfig(
        vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bias=bias,
    )  # fmt: skip
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.2, generator=generator)
        if "norm" in name:
            parameter.abs_().add_(0.3)
            parameter[::16] *= 20
        if name.endswith("w3.weight"):
            parameter[::24] *= 15
    return model.eval()


def stream_of(model) -> Stream:
    return Stream(model.config, model.model.tok_embeddings(IDS).clone())


def calibration(fmt=INT4, *, awq: bool, gptq: bool, stored_dtype=torch.float32) -> Calibration:
    return Calibration(fmt, 32, scales_columns=awq, compensates=gptq, stored_dtype=stored_dtype)


METHODS = [(False, True), (True, False), (True, True)]


@pytest.mark.parametrize(("awq", "gptq"), METHODS)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_stream_goes_on_as_the_rounded_layer_computes(awq, gptq, bias):
    model = a_model(bias=bias)
    stream, layer = stream_of(model), model.model.layers[0]
    done = calibrate_layer(layer, stream, calibration(awq=awq, gptq=gptq))
    assert set(done.rounded) == {f"{name}.weight" for name in LINEARS}
    assert set(done.kept) | set(done.rounded) == {name for name, _ in layer.named_parameters()}
    for name, rounded in done.rounded.items():
        assert torch.equal(layer.get_parameter(name), rounded.values())
    torch.testing.assert_close(
        model.model.norm(stream.hidden), model.hidden_states(IDS), atol=1e-3, rtol=1e-3
    )


@torch.no_grad()
def test_each_weight_is_rounded_for_inputs_from_rounded_weights():
    model = a_model()
    before = copy.deepcopy(model.model.layers[0])
    stream, layer = stream_of(model), model.model.layers[0]
    angles = stream._angles
    done = calibrate_layer(layer, stream, calibration(awq=False, gptq=True)).rounded

    x = before.attention_norm(model.model.tok_embeddings(IDS))
    expected = {
        "attention.wqkv.weight": round_calibrated(before.attention.wqkv.weight, INT4, 32, statistics_of(x))
    }
    given: list[torch.Tensor] = []
    hook = layer.attention.wo.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    hidden = model.model.tok_embeddings(IDS) + layer.attention(x, angles, causal_attend)
    hook.remove()
    expected["attention.wo.weight"] = round_calibrated(
        before.attention.wo.weight, INT4, 32, statistics_of(given[0])
    )
    x = before.ffn_norm(hidden)
    for name in ("w1", "w3"):
        weight = before.feed_forward.get_submodule(name).weight
        expected[f"feed_forward.{name}.weight"] = round_calibrated(weight, INT4, 32, statistics_of(x))
    x = F.silu(layer.feed_forward.w1(x)) * layer.feed_forward.w3(x)
    expected["feed_forward.w2.weight"] = round_calibrated(
        before.feed_forward.w2.weight, INT4, 32, statistics_of(x)
    )
    for name, rounded in expected.items():
        assert (done[name].q == rounded.q).float().mean() > 0.99, name
        assert torch.equal(done[name].scales, rounded.scales), name


@torch.no_grad()
def test_scaled_columns_are_rounded_for_scaled_inputs_and_every_input_has_its_scales():
    model = a_model()
    before = copy.deepcopy(model.model.layers[0])
    stream, layer = stream_of(model), model.model.layers[0]
    angles = stream._angles
    done = calibrate_layer(layer, stream, calibration(awq=True, gptq=True)).rounded
    embeddings = model.model.tok_embeddings(IDS)
    hidden = embeddings + layer.attention(layer.attention_norm(embeddings), angles, causal_attend)
    scaled = before.feed_forward.w1.weight * (before.ffn_norm.weight / layer.ffn_norm.weight)
    expected = round_calibrated(scaled, INT4, 32, statistics_of(layer.ffn_norm(hidden)))
    found = done["feed_forward.w1.weight"]
    assert (found.q == expected.q).float().mean() > 0.98
    torch.testing.assert_close(found.scales, expected.scales)
    for name in LINEARS:
        ratios = done[f"{name}.weight"].values().norm(dim=0) / before.get_submodule(name).weight.norm(dim=0)
        assert ratios.max() > 1.3 * ratios.min(), name


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_scaling_alone_changes_nothing(bias, monkeypatch):
    """With rounding switched off, the layer computes what it did."""
    model = a_model(bias=bias)
    expected = model.hidden_states(IDS)
    before = copy.deepcopy(model)
    layer, stream = model.model.layers[0], stream_of(model)
    x = stream.normalised(layer.attention_norm)
    channel_scales.scale_values(layer.attention, statistics_of(stream.attended(layer.attention, x)), INT4, 32)
    for norm, readers in (
        (layer.attention_norm, [layer.attention.wqkv.weight]),
        (layer.ffn_norm, [layer.feed_forward.w1.weight, layer.feed_forward.w3.weight]),
    ):
        seen = statistics_of(norm(stream.hidden))
        scales = channel_scales.scales_after_norm(readers, seen, INT4, 32)
        assert scales.max() > 1.5 * scales.min()
        channel_scales.scale_after_norm(norm, readers, scales, torch.bfloat16)
        assert torch.equal(norm.weight, norm.weight.bfloat16().float())
    x = layer.ffn_norm(stream.hidden)
    hidden = F.silu(layer.feed_forward.w1(x)) * layer.feed_forward.w3(x)
    channel_scales.scale_hidden_units(layer.feed_forward, statistics_of(hidden), INT4, 32)
    torch.testing.assert_close(model.hidden_states(IDS), expected, atol=1e-4, rtol=1e-4)
    for name in LINEARS:
        weight = f"model.layers.0.{name}.weight"
        assert not torch.equal(model.get_parameter(weight), before.get_parameter(weight)), name


@torch.no_grad()
def test_the_scales_are_the_best_of_those_tried():
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    sizes = torch.ones(64)
    sizes[::16] = 30
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(2)) * sizes
    hessian = statistics_of(x[None]).mean()

    def loss(scales: torch.Tensor) -> float:
        rounded = (
            round_nearest(weight * scales, INT4, 32, statistics_of(x[None] / scales).mean()).values() / scales
        )
        return float((x @ (rounded - weight).T).square().mean())

    found = channel_scales.find_scales([weight], sizes, INT4, 32, hessian)
    tried = [loss(sizes ** (i / 10)) for i in range(11)]
    assert loss(found) == pytest.approx(min(tried), rel=0.02)
    assert loss(found) < 0.6 * loss(torch.ones(64))


def test_columns_that_meet_nothing_keep_finite_scales():
    sizes = torch.ones(64)
    sizes[5] = 0
    weight = torch.randn(8, 64)
    for given in (sizes, torch.zeros(64)):
        scales = channel_scales.find_scales([weight], given, INT4, 32, torch.diag(given.square()))
        assert scales.isfinite().all()
        assert (scales > 0).all()


@torch.no_grad()
def test_a_norm_weight_of_zero_stays_and_spoils_nothing():
    model = a_model()
    layer = model.model.layers[0]
    layer.ffn_norm.weight[3] = 0
    expected = model.hidden_states(IDS)
    seen = statistics_of(layer.ffn_norm(torch.randn(1, 50, 64)))
    readers = [layer.feed_forward.w1.weight, layer.feed_forward.w3.weight]
    scales = channel_scales.scales_after_norm(readers, seen, INT4, 32)
    channel_scales.scale_after_norm(layer.ffn_norm, readers, scales, torch.float32)
    assert layer.ffn_norm.weight[3] == 0
    torch.testing.assert_close(model.hidden_states(IDS), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_the_text_teaches_makes_the_layer_better():
    """Against rounding to the nearest, on the layer's output, with large channels in it."""
    model = a_model()
    layer = model.model.layers[0]
    expected, rounded = stream_of(model), {}
    expected.through(layer)
    for awq, gptq in [(False, False), *METHODS]:
        stream = stream_of(model)
        calibrate_layer(copy.deepcopy(layer), stream, calibration(awq=awq, gptq=gptq))
        rounded[awq, gptq] = float((stream.hidden - expected.hidden).norm())
    nearest = rounded.pop((False, False))
    assert all(loss < 0.8 * nearest for loss in rounded.values()), (nearest, rounded)


@pytest.mark.parametrize("awq", [False, True])
@torch.no_grad()
def test_readers_make_up_for_the_rounding_of_a_stored_norm(awq):
    """In eight bits, so that it shows: the norm's own rounding is 2.6 % of a column."""
    model = a_model()
    layer = model.model.layers[0]
    expected = layer.feed_forward.w1.weight * layer.ffn_norm.weight
    how = calibration(INT8, awq=awq, gptq=False, stored_dtype=torch.float8_e4m3fn)
    done = calibrate_layer(layer, stream_of(model), how)
    norm = done.kept["ffn_norm.weight"]
    assert torch.equal(norm, norm.to(torch.float8_e4m3fn).float())
    columns = (done.rounded["feed_forward.w1.weight"].values() * norm - expected).norm(dim=0) / expected.norm(
        dim=0
    )
    assert columns.max() < 0.02


@pytest.mark.parametrize(("awq", "gptq"), METHODS)
@torch.no_grad()
def test_a_layer_that_gives_nan_is_told(awq, gptq):
    model = a_model()
    layer = model.model.layers[0]
    layer.attention_norm.weight[3] = torch.inf
    with pytest.raises(RequestError, match="NaN or infinite values on the calibration text"):
        calibrate_layer(layer, stream_of(model), calibration(awq=awq, gptq=gptq))
