"""The layers of a packed model in one call against the same layers module by module, and against plain torch."""

import dataclasses

import pytest
import torch
from torch import nn

from internlm2.engine.compute import attend, runner
from internlm2.engine.compute.batch import Batch, Part, make_batch
from internlm2.engine.compute.packed_layers import PackedLayers, packed_layers
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.kernels.library import LEVELS, library
from internlm2.model.config import ModelConfig, RopeScaling
from internlm2.model.heads import CausalLM
from internlm2.quant.linear import quantize_model
from internlm2.quant.weight import WeightFormat

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bias=True,
    rope_scaling=RopeScaling("dynamic", 2.0),
)
CPU = torch.device("cpu")


def packed_model(kind: str | WeightFormat, dtype: torch.dtype, config: ModelConfig = CONFIG) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config).eval()
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, 1.0 if name.endswith("norm.weight") else 0.0, 0.1)
    model = model.to(torch.bfloat16).to(dtype)  # the same weights in both
    quantize_model(model, kind)
    return model


def cache_of(dtype: torch.dtype, kv_dtype: str | None) -> PageCache:
    return PageCache(CONFIG, num_pages=40, page_size=16, dtype=dtype, device=CPU, kv_dtype=kv_dtype)


def batches() -> list[Batch]:
    """Two prompts, one of them in two chunks beside a decoding one, then both decode."""
    first, second = [7, 3, 30, 12], [5, 1, 22, 9]
    ids = torch.randint(97, (80,), generator=torch.Generator().manual_seed(1)).tolist()
    steps = [
        [Part(ids[:19], 0, first, 90), Part(ids[:33], 0, second, 60)],
        [Part(ids[19:50], 19, first, 90), Part(ids[33:34], 33, second, 60)],
        [Part(ids[50:51], 50, first, 90), Part(ids[34:35], 34, second, 60)],
    ]
    return [make_batch(parts, page_size=16, device=CPU) for parts in steps]


def states(run: Runner) -> torch.Tensor:
    return torch.cat([run.forward(batch) for batch in batches()])


@pytest.fixture(params=LEVELS)
def level(request):
    built = library()
    if built is None or LEVELS.index(request.param) > built.detected_level():
        pytest.skip("not built for this level")
    before = built.level()
    built.set_level(LEVELS.index(request.param))
    yield request.param
    built.set_level(before)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_one_call_is_the_same_layers_module_by_module(level, kind, kv_dtype, monkeypatch):
    model = packed_model(kind, torch.float32)
    fused = Runner(model, cache_of(torch.float32, kv_dtype))
    assert isinstance(fused._packed, PackedLayers)
    found = states(fused)
    monkeypatch.setattr(runner, "packed_layers", lambda model: None)
    monkeypatch.setattr(attend, "library", lambda: None)
    modules = Runner(model, cache_of(torch.float32, kv_dtype))
    assert modules._packed is None
    expected = states(modules)
    # What is rounded (activations, keys) can fall to the other side of a half. How much that makes, the modules say
    # themselves when their embeddings are moved by what float32 rounds anyway.
    noise = []
    embeddings = model.model.tok_embeddings.weight.detach()
    original = embeddings.clone()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        embeddings.copy_(original * (1 + 1e-6 * torch.randn(original.shape, generator=generator)))
        moved = states(Runner(model, cache_of(torch.float32, kv_dtype)))
        noise.append((moved - expected).norm().item())
    assert (found - expected).norm().item() < 1.5 * max(noise)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_bfloat16_models_differ_by_rounding_only(kv_dtype, monkeypatch):
    fmt = WeightFormat("int8", 32, activation_bits=15)  # whose rounding is too fine to be seen
    exact = states(Runner(packed_model(fmt, torch.float32), cache_of(torch.float32, None)))
    model = packed_model(fmt, torch.bfloat16)
    found = states(Runner(model, cache_of(torch.bfloat16, kv_dtype)))
    assert found.dtype == torch.bfloat16
    monkeypatch.setattr(runner, "packed_layers", lambda model: None)
    modules = states(Runner(model, cache_of(torch.bfloat16, kv_dtype)))
    ours, theirs = (((x.float() - exact).norm() / exact.norm()).item() for x in (found, modules))
    assert ours < 0.02
    assert ours < 0.9 * theirs  # fewer roundings on the way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_do_not_depend_on_their_company_by_a_bit(dtype, kind):
    model = packed_model(kind, dtype)
    together = Runner(model, cache_of(dtype, None))
    alone = Runner(model, cache_of(dtype, None))
    for batch in batches():
        out = together.forward(batch)
        for span in batch.spans:
            rows = slice(span.start, span.start + span.num_rows)
            single = Batch(
                batch.input_ids[rows],
                batch.positions[rows],
                batch.limits[rows],
                batch.slots[rows],
                (dataclasses.replace(span, start=0),),
            )
            assert torch.equal(alone.forward(single), out[rows])


def test_only_models_as_quantising_leaves_them_are_taken():
    model = packed_model("int8", torch.float32)
    assert (packed_layers(model) is not None) == (library() is not None)
    assert packed_layers(CausalLM(CONFIG)) is None
    model.model.layers[1].attention.add_module("wo", nn.Linear(96, 96))
    assert packed_layers(model) is None


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_attention_of_a_plain_model_is_that_of_torch(dtype, kv_dtype, monkeypatch):
    torch.manual_seed(0)
    model = CausalLM(CONFIG).eval().to(dtype)
    found = states(Runner(model, cache_of(dtype, kv_dtype)))
    monkeypatch.setattr(attend, "library", lambda: None)
    expected = states(Runner(model, cache_of(dtype, kv_dtype)))
    tolerance = 0.06 if dtype == torch.bfloat16 else 1e-5 if kv_dtype is None else 0.01
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_one_and_two_threads_give_the_same_bits():
    model = packed_model("int4", torch.float32)
    before = torch.get_num_threads()
    outs = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        outs.append(states(Runner(model, cache_of(torch.float32, None))))
    torch.set_num_threads(before)
    assert torch.equal(*outs)
