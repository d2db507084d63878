"""The network as a module: shapes, dtypes, devices, compilation, and lengths beyond the trained one."""

import json
import math

import numpy as np
import pytest
import torch

from goldens import LANGUAGE_GOLDENS, golden_folder
from internlm2 import load_model
from internlm2.errors import ConfigError, RequestError
from internlm2.model import CausalLM, ModelConfig, RopeScaling, build_model, preset
from internlm2.model.config import PRESETS
from internlm2.model.rope import inverse_frequencies
from reference import naive
from reference.dense_cache import DenseCache
from reference.plain_loop import decode, prefill

PUBLISHED_PARAMETERS = {"1.8b": 1_889_110_016, "7b": 7_737_708_544, "20b": 19_861_149_696}


def random_ids(*shape: int, seed: int = 0, vocab: int = 512) -> torch.Tensor:
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "expected"), PUBLISHED_PARAMETERS.items())
def test_published_sizes_have_the_published_parameter_count(name, expected):
    with torch.device("meta"):
        model = build_model(preset(name))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("name", LANGUAGE_GOLDENS)
@pytest.mark.parametrize("length", [5, 90])
def test_logits_equal_a_naive_float64_network(name, length):
    model = load_model(golden_folder(name))
    config = json.loads((golden_folder(name) / "config.json").read_text())
    weights = {n: p.detach().double().numpy() for n, p in model.parameters_by_checkpoint_name().items()}
    ids = random_ids(length)
    expected = naive.logits(weights, config, ids.tolist(), length_limit=length)
    with torch.no_grad():
        found = model(ids[None])[0].double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gqa", "dynamic-ntk"])
def test_a_long_request_never_changes_a_later_short_one(name):
    model = load_model(golden_folder(name))
    short, long = random_ids(1, 32), random_ids(1, 200, seed=1)
    with torch.no_grad():
        before = model(short)
        model(long)
        after = model(short)
    assert torch.equal(before, after)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 512])
@pytest.mark.parametrize("name", ["gqa", "mqa-bias", "linear", "dynamic-ntk", "dynamic-ntk-factor3"])
def test_prefill_equals_chunks_and_decode(name, chunk_tokens):
    """Also beyond the trained length: dynamic-ntk was trained to 64 and this is 150 tokens."""
    model = load_model(golden_folder(name))
    ids = random_ids(150)
    limit = torch.tensor(150)
    with torch.no_grad():
        expected = model(ids[None])[0]
        cache = DenseCache(model.config, num_rows=1, capacity=150, dtype=torch.float32, device=ids.device)
        found = prefill(model, cache, ids[:140].tolist(), limit, chunk_tokens=chunk_tokens)
        rows = [found]
        for position in range(140, 150):
            token, length = ids[position : position + 1], torch.tensor([position])
            rows.append(decode(model, cache, token, length, limit[None]))
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.cat(rows), expected[139:], rtol=1e-5, atol=1e-5 * scale)


def test_a_length_limit_fixes_the_base_of_a_whole_sequence():
    """The same first tokens, asked for with the same limit, have the same logits however much follows."""
    model = load_model(golden_folder("dynamic-ntk"))
    ids = random_ids(1, 100)
    with torch.no_grad():
        whole = model(ids, length_limits=torch.tensor([200]))
        part = model(ids[:, :40], length_limits=torch.tensor([200]))
        unlimited = model(ids[:, :40])
    torch.testing.assert_close(whole[:, :40], part, rtol=1e-5, atol=1e-5)
    assert (part - unlimited).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("factor", "length", "expected"),
    [(2.0, 65536, 3.053e6), (2.0, 131072, 7.220e6), (2.0, 200000, 1.1645e7), (3.0, 200000, 1.705e7),
     (1.0, 200000, 6.281e6), (2.0, 32768, 1e6), (2.0, 10, 1e6)],
)  # fmt: skip
def test_dynamic_base_has_the_published_values(factor, length, expected):
    config = ModelConfig(rope_scaling=RopeScaling("dynamic", factor))
    frequency = inverse_frequencies(config, torch.tensor([length]))[0, 1].item()
    base = frequency ** (-config.head_dim / 2)
    assert math.isclose(base, expected, rel_tol=1e-3)


def test_rows_of_a_batch_have_bases_of_their_own():
    config = ModelConfig(rope_scaling=RopeScaling("dynamic", 2.0))
    both = inverse_frequencies(config, torch.tensor([100, 200_000]))
    assert torch.equal(both[:1], inverse_frequencies(config, torch.tensor([100])))
    assert torch.equal(both[1:], inverse_frequencies(config, torch.tensor([200_000])))


def test_reference_mode_takes_the_base_from_the_padded_batch():
    ids = random_ids(2, 100)
    mask = torch.ones_like(ids)
    mask[0, :60] = 0  # the first row has 40 tokens, fewer than the trained 64
    stateless, reference = (
        load_model(golden_folder("dynamic-ntk"), rope_mode=mode) for mode in ("stateless", "reference")
    )
    with torch.no_grad():
        alone = stateless(ids[:1, 60:])
        torch.testing.assert_close(stateless(ids, attention_mask=mask)[:1, 60:], alone, rtol=1e-5, atol=1e-5)
        assert (reference(ids, attention_mask=mask)[:1, 60:] - alone).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["language", "reward", "value", "classification"])
def test_every_head_runs_in_every_dtype(head, dtype):
    config = ModelConfig(**{**vars(PRESETS["tiny"]), "head": head})
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(random_ids(2, 9))
        found = model.to(dtype)(random_ids(2, 9))
    assert found.dtype == torch.float32
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_a_meta_model_runs_without_memory():
    with torch.device("meta"):
        model = build_model(preset("20b"))
        logits = model(torch.zeros(1, 10, dtype=torch.int64))
    assert logits.shape == (1, 10, 92544)
    assert logits.is_meta


def test_tied_output_uses_the_embedding():
    config = ModelConfig(**{**vars(PRESETS["tiny"]), "tie_word_embeddings": True})
    model = build_model(config)
    assert isinstance(model, CausalLM)
    assert "output.weight" not in model.parameters_by_checkpoint_name()
    model.init_weights()
    ids = random_ids(1, 4)
    expected = model.hidden_states(ids) @ model.model.tok_embeddings.weight.T
    torch.testing.assert_close(model(ids), expected)


def test_the_end_of_sequence_row_is_trained():
    model = load_model(golden_folder("gqa"))
    model(torch.tensor([[2, 5, 2]])).sum().backward()
    assert model.model.tok_embeddings.weight.grad[2].abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", "dynamic-ntk"])
def test_compiled_equals_eager(name):
    model = load_model(golden_folder(name))
    compiled = torch.compile(model, dynamic=True)
    with torch.no_grad():
        for length in (7, 48, 90):
            ids = random_ids(2, length)
            torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"hidden_size": 66}, "is not a multiple of num_attention_heads"),
        ({"head_dim": 15}, "is odd"),
        ({"head_dim": -2}, "head_dim is -2"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": 2.5}, "must be a whole number"),
        ({"rms_norm_eps": float("nan")}, "must be a finite number above 0"),
        ({"rope_theta": float("inf")}, "must be a finite number above 0"),
        ({"bias": "yes"}, "must be true or false"),
    ],
)
def test_an_impossible_shape_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**vars(PRESETS["tiny"]), "head_dim": 0, **change})


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match=r"No preset called '3b'. Known: 1.8b"):
        preset("3b")


def test_an_unknown_rope_mode_is_refused():
    with pytest.raises(RequestError, match="rope_mode is 'magic'"):
        build_model(preset("tiny"), rope_mode="magic")


@pytest.mark.parametrize(
    ("kind", "factor", "message"), [("yarn", 2.0, "type is 'yarn'"), ("linear", 0.5, "factor is 0.5")]
)
def test_impossible_rope_scaling_is_refused(kind, factor, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(kind, factor)
