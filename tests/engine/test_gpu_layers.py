"""The layers for GPUs, and graphs of decoding steps, on the CPU: the kernels' twins compute, a recorder replays.

What only a GPU can show is in `tests/kernels/gpu/triton_cases.py` and `benchmarks/gpu.py`.
"""

import random

import pytest
import torch
from lone import answers, make_engine

from internlm2 import SamplingParams
from internlm2.engine import workers
from internlm2.engine.compute import gpu_layers
from internlm2.engine.compute.batch import Part, make_batch
from internlm2.engine.compute.gpu_layers import GpuSteps, gpu_steps, takes_layers
from internlm2.engine.compute.graphs import DecodeGraphs
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.errors import RequestError
from internlm2.model.config import ModelConfig, RopeScaling
from internlm2.model.heads import CausalLM
from internlm2.quant.gpu import quantize_for_gpu

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bias=True,
    rope_scaling=RopeScaling("dynamic", 2.0),
)
CPU = torch.device("cpu")


class Replay:
    """As a CUDA graph: computes what was recorded again, from the same tensors into the same result."""

    def __init__(self, compute, result):
        self._compute, self._result = compute, result
        self.num_replays = 0

    def replay(self):
        self.num_replays += 1
        self._result.copy_(self._compute())


class Recorder:
    """As CudaCapture: the result of recording holds no numbers yet."""

    def __init__(self):
        self.graphs = []

    def __call__(self, compute):
        compute()  # the warm-up, which writes keys that the replay writes again
        self.graphs.append(Replay(compute, torch.full_like(compute(), torch.nan)))
        return self.graphs[-1], self.graphs[-1]._result


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(CONFIG).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if name.endswith("norm.weight") else 0.0, 0.1)
    return model


def cache_of(model, kv_dtype=None, num_pages=60):
    dtype = model.model.tok_embeddings.weight.dtype
    cache = PageCache(
        CONFIG, num_pages=num_pages, page_size=4, dtype=dtype, device=CPU, kv_dtype=kv_dtype
    )  # fmt: skip
    for block in (cache.keys, cache.values):  # what was never written must never be read
        block.fill_(100 if kv_dtype else torch.nan)
    return cache


def with_gpu_steps(runner, capture=None):
    runner._gpu = GpuSteps(runner.model, runner.cache, capture=capture)
    return runner


def steps():
    """Two prompts, one in two chunks beside a decoding row, then decoding, with drafts, and one alone."""
    first, second = [9, 3, 30, 12, 40, 41, 42, 7, 8, 20, 21, 22, 23], [5, 1, 22, 19, 50, 51, 52, 53]
    ids = torch.randint(512, (80,), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        [Part(ids[:19], 0, first, 90), Part(ids[:21], 0, second, 60)],
        [Part(ids[19:41], 19, first, 90), Part(ids[21:22], 21, second, 60)],
        [Part(ids[41:42], 41, first, 90), Part(ids[22:23], 22, second, 60)],
        [Part(ids[42:47], 42, first, 90), Part(ids[23:24], 23, second, 60)],
        [Part(ids[24:25], 24, second, 60)],
        [Part(ids[25:26], 25, second, 60), Part(ids[47:48], 47, first, 90)],
    ]


def states(runner):
    return [runner.forward(make_batch(parts, page_size=4, device=CPU)) for parts in steps()]


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("has_graphs", [False, True])
def test_the_layers_are_the_networks(model, kv_dtype, has_graphs):
    expected = states(Runner(model, cache_of(model, kv_dtype)))
    recorder = Recorder()
    found = states(with_gpu_steps(Runner(model, cache_of(model, kv_dtype)), recorder if has_graphs else None))
    for ours, theirs in zip(found, expected, strict=True):
        tolerance = 1e-4 if kv_dtype is None else 2e-2  # a key may be rounded to the other side
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    # Steps of 2, 6, 1 and again 2 rows.
    assert [graph.num_replays for graph in recorder.graphs] == ([2, 1, 1] if has_graphs else [])


def test_in_bfloat16_they_differ_by_rounding_only(model):
    exact = torch.cat(states(Runner(model, cache_of(model))))
    model = model.to(torch.bfloat16)
    modules = torch.cat(states(Runner(model, cache_of(model))))
    ours = torch.cat(states(with_gpu_steps(Runner(model, cache_of(model)), Recorder())))
    assert ours.dtype == torch.bfloat16
    errors = [((x.float() - exact).norm() / exact.norm()).item() for x in (ours, modules)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantised_layers_are_their_modules(model, kind):
    quantize_for_gpu(model, kind)
    expected = states(Runner(model, cache_of(model)))
    found = states(with_gpu_steps(Runner(model, cache_of(model)), Recorder()))
    tolerance = 1e-4 if kind != "fp8" else 0.1  # activations fall to the other side of a rounding
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_the_engine_answers_the_same_through_graphs(model, kv_dtype):
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 500) for _ in range(length)] for length in [1, 2, 15, 16, 40, 33, 5]]
    params = [SamplingParams(max_tokens=18 + index, temperature=0.5, seed=index) for index in range(7)]
    namespaces = [
        len(prompt) + own.max_tokens if len(prompt) + own.max_tokens > 64 else None
        for prompt, own in zip(prompts, params, strict=True)
    ]
    engine = make_engine(model, kv_dtype=kv_dtype, max_num_seqs=7, num_pages=26)
    expected = answers(engine, prompts, params, namespaces=namespaces)
    recorder = Recorder()
    engine = make_engine(model, kv_dtype=kv_dtype, max_num_seqs=7, num_pages=26)
    with_gpu_steps(engine.runner, recorder)
    assert answers(engine, prompts, params, namespaces=namespaces) == expected
    assert engine.stats.num_preemptions > 0  # pages of a row change to others
    assert sum(graph.num_replays for graph in recorder.graphs) > 20


@torch.inference_mode()
def test_what_does_not_fit_a_graph_is_computed_without_one(model):
    recorder = Recorder()
    steps_of = GpuSteps(model, cache_of(model), capture=recorder)
    steps_of.graphs = graphs = DecodeGraphs(
        steps_of._layers.forward, recorder, page_size=4, most_pages=3, device=CPU, sizes=(1, 2)
    )
    first = make_batch([Part([5], 0, [2], 30), Part([6], 0, [3], 30)], page_size=4, device=CPU)
    assert graphs.fits(first)
    assert not graphs.fits(make_batch([Part([5] * 3, 0, [2], 30)], page_size=4, device=CPU))  # rows
    long = make_batch([Part([5], 12, [2, 3, 4, 5], 30)], page_size=4, device=CPU)
    assert not graphs.fits(long)  # keys
    assert graphs.fits(make_batch([Part([5], 11, [2, 3, 4], 30)], page_size=4, device=CPU))
    adapted = make_batch([Part([5], 0, [2], 30, "poet")], page_size=4, device=CPU)
    assert not graphs.fits(adapted)
    large = DecodeGraphs(steps_of._layers.forward, recorder, page_size=4, most_pages=9, device=CPU)
    assert not large.fits(make_batch([Part([5] * 9, 0, [2, 3, 4], 30)], page_size=4, device=CPU))  # a prompt
    steps_of.forward(make_batch([Part([5] * 3, 0, [2], 30)], page_size=4, device=CPU))
    assert graphs.num_graphs == 0
    steps_of.forward(first)
    assert graphs.num_graphs == 1


def test_padding_writes_nothing(model):
    cache = cache_of(model)
    runner = with_gpu_steps(Runner(model, cache), Recorder())
    parts = [Part([7], 0, [4], 30), Part([8], 0, [6], 30), Part([9], 0, [2], 30)]
    out = runner.forward(make_batch(parts, page_size=4, device=CPU))  # 3 rows in a graph of 4
    written = cache.keys[0].isfinite().flatten(1).all(1).nonzero()[:, 0].tolist()
    assert written == [8, 16, 24]
    kept = out.clone()
    runner.forward(make_batch(parts[::-1], page_size=4, device=CPU))
    assert torch.equal(out, kept)  # and no later step changes what was given out


def test_w1_and_w3_become_one_weight_and_keep_their_names(model):
    names = {name: weight.clone() for name, weight in model.named_parameters()}
    GpuSteps(model, cache_of(model), capture=None)
    assert {name: weight.shape for name, weight in model.named_parameters()} == {
        name: weight.shape for name, weight in names.items()
    }
    for name, weight in model.named_parameters():
        assert torch.equal(weight, names[name])
    w1, w3 = (getattr(model.model.layers[0].feed_forward, name).weight for name in ("w1", "w3"))
    assert w1.untyped_storage().data_ptr() == w3.untyped_storage().data_ptr()


def test_the_cpu_and_foreign_layers_keep_their_own_way(model, monkeypatch):
    monkeypatch.setattr(gpu_layers, "has_triton", lambda: True)
    assert gpu_steps(model, cache_of(model), is_adapted=False) is None
    assert Runner(model, cache_of(model))._gpu is None
    assert takes_layers(model)
    model.model.layers[1].feed_forward = torch.nn.Identity()
    assert not takes_layers(model)


def test_each_process_of_a_split_model_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert workers._devices("cuda", 2) == ["cuda:0", "cuda:1"]
    with pytest.raises(RequestError, match="this machine has 2 GPUs"):
        workers._devices("cuda", 4)
