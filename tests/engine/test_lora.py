"""Adapters: the same logits as peft on our transformers model; a mixed batch equals each row alone."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_folders import LAYER_MODULES, peft_adapter
from safetensors.torch import load_file, save_file

from goldens import golden_folder
from internlm2 import load_model
from internlm2.config import ConfigError
from internlm2.engine.compute.adapted_linear import AdaptedLinear
from internlm2.engine.compute.lora import Adapters, load_adapter
from internlm2.errors import CheckpointError, InternLM2Error, RequestError
from internlm2.model import ModelConfig, build_model
from internlm2.model.heads import Model

IDS = torch.arange(3, 3 + 4 * 7).view(4, 7)  # (B, T)
ALL_ROWS = (0, IDS.numel())
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CPU = {"dtype": torch.float32, "device": "cpu"}


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids) if isinstance(model, Model) else model(ids).logits


@pytest.fixture(scope="module")
def saved(chat_folder, tmp_path_factory):
    """Two adapter folders of the tiny chat model, and peft's logits with each. Not to be changed."""
    root = tmp_path_factory.mktemp("adapters")
    first = logits(peft_adapter(chat_folder, root / "first", seed=1))
    second = logits(peft_adapter(chat_folder, root / "second", seed=2, r=3, target_modules=["wqkv", "w2"]))
    return {"first": (root / "first", first), "second": (root / "second", second)}


@pytest.fixture
def model(chat_folder):
    return load_model(chat_folder, dtype="float32")


@pytest.fixture
def adapters(model, saved):
    adapters = Adapters.attach(model)
    for name, (folder, _) in saved.items():
        adapters.add(name, folder)
    return adapters


@pytest.mark.parametrize("options", [
    {"target_modules": ["wqkv"]},
    {"target_modules": ["wo", "w3"]},
    {"target_modules": ["w1", "w2"], "lora_alpha": 1, "r": 1},
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.1\..*(wqkv|w2)"},
    {"layers_to_transform": [1], "lora_dropout": 0.5},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian", "exclude_modules": ["wo"]},
    {"rank_pattern": {"w2": 7, "layers.1.attention.wqkv": 2}, "alpha_pattern": {r"layers\.\d.*w.": 3, "wqkv": 11}},
    {"rank_pattern": {"kv": 5, "w1": 5}, "alpha_pattern": {"1.attention.wqkv": 3}, "use_rslora": True},
], ids=str)  # fmt: skip
def test_logits_are_those_of_peft(model, chat_folder, tmp_path, options):
    expected = logits(peft_adapter(chat_folder, tmp_path, **options))
    base = logits(model)
    adapters = Adapters.attach(model)
    adapters.add("only", tmp_path)
    adapters.select([(*ALL_ROWS, "only")])
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert (expected - base).abs().max() > 0.05


def test_a_model_with_biases_keeps_them(tmp_path):
    base = golden_folder("mqa-bias")
    expected = logits(peft_adapter(base, tmp_path))
    model = load_model(base, dtype="float32")
    adapters = Adapters.attach(model)
    adapters.add("only", tmp_path)
    adapters.select([(*ALL_ROWS, "only")])
    torch.testing.assert_close(logits(model), expected, **CLOSE)


@pytest.mark.parametrize("key", ["{}.weight", "{}.default.weight"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_older_files_and_names_are_read(model, saved, tmp_path, key, file):
    folder, expected = saved["first"]
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key.format(name.removesuffix(".weight")): t for name, t in tensors.items()}
    (save_file if file.endswith("safetensors") else torch.save)(tensors, tmp_path / file)
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    adapters = Adapters.attach(model)
    adapters.add("old", str(tmp_path))
    adapters.select([(*ALL_ROWS, "old")])
    torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_merging_by_hand_gives_the_same(model, adapters, saved, chat_folder):
    folder, _ = saved["first"]
    adapters.select([(*ALL_ROWS, "first")])
    found = logits(model)
    merged = load_model(chat_folder, dtype="float32")
    weights = merged.parameters_by_checkpoint_name()
    factors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name in [n for n in factors if ".lora_A." in n]:
            weight = weights[name.removeprefix("base_model.model.").replace("lora_A.", "")]
            weight += 6 / 4 * factors[name.replace("lora_A", "lora_B")] @ factors[name]
    torch.testing.assert_close(found, logits(merged), **CLOSE)


def test_a_mixed_batch_gives_what_each_row_gives_alone(model, adapters, saved):
    base = logits(model)
    adapters.select([(14, 21, "second"), (0, 7, "first"), (21, 28, "first")])
    found = logits(model)
    expected = torch.stack([saved["first"][1][0], base[1], saved["second"][1][2], saved["first"][1][3]])
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(found[1], base[1])
    adapters.select(())
    assert torch.equal(logits(model), base)


def test_without_a_selection_nothing_is_changed_by_a_bit(model, saved):
    before, names, parameters = logits(model), list(model.state_dict()), list(model.parameters())
    adapters = Adapters.attach(model)
    for name, (folder, _) in saved.items():
        adapters.add(name, folder)
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == names == list(model.parameters_by_checkpoint_name())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert sum(isinstance(module, AdaptedLinear) for module in model.modules()) == 2 * len(LAYER_MODULES)


def test_a_removed_adapter_is_gone_and_its_name_free(model, adapters, saved, chat_folder):
    adapters.select([(*ALL_ROWS, "first")])
    adapters.remove("first")
    assert adapters.names == ("second",)
    with pytest.raises(RequestError, match=r"no adapter called 'first'"):
        adapters.select([(*ALL_ROWS, "first")])
    adapters.add("first", saved["second"][0])
    assert torch.equal(logits(model), logits(load_model(chat_folder, dtype="float32")))  # nothing is selected
    adapters.select([(*ALL_ROWS, "first")])
    torch.testing.assert_close(logits(model), saved["second"][1], **CLOSE)
    assert adapters.names == ("second", "first")


def test_a_file_written_again_leaves_the_loaded_adapter_alone(model, saved, tmp_path):
    folder, expected = saved["first"]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    adapters = Adapters.attach(model)
    adapters.add("first", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\0" * (weights.stat().st_size // 2))
    adapters.select([(*ALL_ROWS, "first")])
    torch.testing.assert_close(logits(model), expected, **CLOSE)


# Segments of packed rows: how many, and whose.
segments = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([None, "a", "b", "c"])), max_size=9)


@settings(max_examples=60, deadline=None)
@given(segments=segments, is_batch=st.booleans(), seed=st.integers(0, 99))
def test_every_row_gets_its_own_adapter(lora_layer, segments, is_batch, seed):
    adapters, linear, reference = lora_layer
    owners = [name for size, name in segments for _ in range(size)] + [None]
    ends = [sum(size for size, _ in segments[: i + 1]) for i in range(len(segments))]
    spans = [(end - s, end, n) for (s, n), end in zip(segments, ends, strict=True) if n is not None]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(owners), 1, 64, generator=generator)  # (N, 1, C)
    order = torch.randperm(len(spans), generator=generator).tolist()
    adapters.select([spans[i] for i in order])
    with torch.no_grad():
        out = linear(x.view(1, -1, 64)).view(len(owners), 1, -1) if is_batch else linear(x)
    expected = torch.stack([reference(row, owner) for row, owner in zip(x, owners, strict=True)])
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.fixture(scope="module")
def lora_layer(chat_folder, tmp_path_factory):
    """Adapters a and b change the linear that is returned, c changes another; and what a row should become."""
    root, model = tmp_path_factory.mktemp("layer"), load_model(chat_folder, dtype="float32")
    adapters, name = Adapters.attach(model), "model.layers.1.feed_forward.w1"
    for seed, (adapter, module) in enumerate({"a": "w1", "b": "w1", "c": "w2"}.items()):
        peft_adapter(chat_folder, root / adapter, seed=seed, r=2 + seed, target_modules=[module])
        adapters.add(adapter, root / adapter)
    loaded = {a: load_adapter(root / a, model.config, **CPU).weights.get(name) for a in "abc"}

    def reference(row, owner):
        factors = loaded.get(owner)
        weight = model.get_parameter(f"{name}.weight").detach()
        return row @ (weight if factors is None else weight + factors.b @ factors.a).T

    return adapters, model.get_submodule(name), reference


def test_bfloat16_rows_do_not_depend_on_how_they_lie(chat_folder, saved):
    model = load_model(chat_folder, dtype="bfloat16")
    adapters = Adapters.attach(model)
    adapters.add("first", saved["first"][0])
    adapters.select([(0, 7, "first"), (14, 21, "first")])
    apart = logits(model)
    adapters.select([(0, 14, "first")])
    order = [0, 2, 1, 3]
    assert torch.equal(logits(model, IDS[order]), apart[order])
    torch.testing.assert_close(apart[0], saved["first"][1][0], atol=0.05, rtol=0.05)
    assert all(f.a.dtype == f.b.dtype == torch.bfloat16 for f in linear_factors(model))


def linear_factors(model):
    return [f for m in model.modules() if isinstance(m, AdaptedLinear) for f in m.factors.values()]


def test_a_merged_model_loads_as_the_messages_say(chat_folder, tmp_path):
    model = peft_adapter(chat_folder, tmp_path / "dora", use_dora=True)
    expected = logits(model)
    with pytest.raises(CheckpointError, match=r"use_dora is True, .* Merge the adapter into its model"):
        load_adapter(tmp_path / "dora", load_model(chat_folder).config, **CPU)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(load_model(tmp_path / "merged", dtype="float32")), expected, atol=1e-4, rtol=1e-4
    )


REFUSED_OPTIONS = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA', but must be 'LORA'"),
    ({"use_dora": True}, "use_dora is True, but the engine adds plain LoRA only. Merge the adapter"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"modules_to_save": ["norm"]}, "modules_to_save is .'norm'."),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication is"),
    ({"alora_invocation_tokens": [7]}, "alora_invocation_tokens is"),
    ({"of_next_year": 0.5}, "of_next_year is 0.5.* or remove the key"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which also changed the model.*initial_model"),
    ({"r": 0}, "a rank is 0, but must be 1 or more"),
    ({"rank_pattern": {"w2": -1}}, "a rank is -1"),
    ({"alpha_pattern": {"w2[": 3}}, r"pattern 'w2\[' is no regular expression"),
    ({"r": 5}, r"has shape \[4, 64\], but rank 5 on this model asks for \[5, 64\]. .* another adapter"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED_OPTIONS, ids=lambda x: str(x)[:30])
def test_options_that_are_not_plain_lora_are_refused(saved, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_adapter(changed_config(saved, tmp_path, change), ModelConfig(**TINY), **CPU)


TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def changed_config(saved, folder, change):
    for file in saved["first"][0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(("change", "message"), [
    ({"r": "4"}, "key 'r' is '4', but must be a whole number"),
    ({"lora_alpha": None}, "key 'lora_alpha' is missing"),
    ({"use_rslora": 1}, "key 'use_rslora' is 1, but must be true or false"),
    ({"rank_pattern": {"w1": "x"}}, "is 'x', but must be a whole number"),
])  # fmt: skip
def test_values_of_a_wrong_type_are_refused(saved, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_adapter(changed_config(saved, tmp_path, change), ModelConfig(**TINY), **CPU)


W1 = "base_model.model.model.layers.0.feed_forward.w1.lora_{}.weight"
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
A, B = torch.zeros(4, 64), torch.zeros(112, 4)


@pytest.mark.parametrize(("tensors", "message"), [
    ({W1.format("A"): A}, "model.layers.0.feed_forward.w1 has no lora_B"),
    ({W1.format("B"): B}, "has no lora_A. Save or download"),
    ({W1.format("A"): A, W1.format("B"): torch.zeros(64, 4)}, r"shape \[64, 4\], but rank 4 .* \[112, 4\]"),
    ({W1.format("A"): A, W1.format("A.other"): A + 1}, "are two adapters in one file"),
    ({Q: A}, "belongs to the Llama layout. Merge the adapter"),
    ({W1.replace("layers.0", "layers.2").format("A"): A}, "may change wqkv, wo, w1, w2, w3 in its 2 layers"),
    ({"base_model.model.output.lora_A.weight": A}, "changes output, but adapters .*Merge the adapter"),
    ({W1.replace("feed_forward.w1", "mlp").format("A"): A}, r"changes model\.layers\.0\.mlp, but adapters"),
    ({"base_model.model.model.tok_embeddings.weight": A}, "tok_embeddings.weight is not lora_A or lora_B"),
    ({"base_model.model.model.tok_embeddings.lora_embedding_A": A}, "is not lora_A or lora_B of a linear"),
    ({}, "holds no adapter weights"),
], ids=range(11))  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(saved, tmp_path, tensors, message):
    folder = changed_config(saved, tmp_path, {})
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_adapter(folder, ModelConfig(**TINY), **CPU)


def test_folders_that_are_no_adapter_are_refused(saved, chat_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json, so it is not an adapter"):
        load_adapter(chat_folder, ModelConfig(**TINY), **CPU)
    with pytest.raises(CheckpointError, match=r"nowhere has no adapter_config.json"):
        load_adapter(tmp_path / "nowhere", ModelConfig(**TINY), **CPU)
    folder = changed_config(saved, tmp_path, {})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors or adapter_model.bin. Download"):
        load_adapter(folder, ModelConfig(**TINY), **CPU)


def test_a_failed_add_leaves_nothing_behind(model, adapters, saved, tmp_path):
    with pytest.raises(InternLM2Error):
        adapters.add("third", changed_config(saved, tmp_path, {"r": 5}))
    assert adapters.names == ("first", "second")
    assert len(linear_factors(model)) == 10 + 4


def test_names_are_checked(adapters, saved):
    with pytest.raises(
        RequestError, match=r"called 'first' is loaded already, from .*first. Remove it first"
    ):
        adapters.add("first", saved["first"][0])
    with pytest.raises(RequestError, match=r"no adapter called 'frist'. Did you mean 'first'"):
        adapters.select([(0, 1, "frist")])
    with pytest.raises(RequestError, match=r"no adapter called 'x'. Known: first, second"):
        adapters.remove("x")
    with pytest.raises(
        RequestError, match=r"None is loaded: load the model with adapters={name: folder}, or"
    ):
        Adapters(ModelConfig(**TINY)).remove("x")


def test_a_refused_selection_leaves_the_old_one(model, adapters, saved):
    adapters.select([(*ALL_ROWS, "first")])
    with pytest.raises(RequestError):
        adapters.select([(0, 7, "second"), (7, 9, "x")])
    torch.testing.assert_close(logits(model), saved["first"][1], **CLOSE)


def test_rows_that_cannot_be_are_our_bug(model, adapters):
    with pytest.raises(AssertionError, match=r"rows \[3, 6\) overlap others"):
        adapters.select([(0, 4, "first"), (3, 6, "second")])
    adapters.select([(0, 29, "first")])
    with pytest.raises(AssertionError, match=r"rows up to 29 of an input of 28"):
        logits(model)


def test_only_plain_linears_are_adapted(model):
    Adapters.attach(model)
    with pytest.raises(RequestError, match=r"has adapters attached already"):
        Adapters.attach(model)
    other = build_model(ModelConfig(**TINY))
    other.model.layers[1].feed_forward.w2 = torch.nn.Identity()
    with pytest.raises(RequestError, match=r"w2 is a Identity. Load it unquantised"):
        Adapters.attach(other)
    assert not any(isinstance(module, AdaptedLinear) for module in other.modules())
