"""Llama layout: bit-exact both ways, and plain transformers computes the official logits from it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import assert_same_model, chat_tokenizer, random_checkpoint, small_config
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from goldens import DATA, LANGUAGE_GOLDENS, forwards, golden, golden_folder
from internlm2 import load_model
from internlm2.checkpoint.formats import wqkv
from internlm2.checkpoint.formats.llama import LlamaCheckpoint, write_llama
from internlm2.checkpoint.open import open_checkpoint
from internlm2.errors import CheckpointError, ConfigError, ExportError


def transformers_model(folder):
    model, report = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("name", [*LANGUAGE_GOLDENS, "sequence-classification"])
def test_there_and_back_is_bit_exact(name, tmp_path):
    original = open_checkpoint(golden_folder(name))
    write_llama(original, tmp_path / "llama")
    assert isinstance(open_checkpoint(tmp_path / "llama"), LlamaCheckpoint)
    assert_same_model(open_checkpoint(tmp_path / "llama"), original)


@pytest.mark.parametrize("name", LANGUAGE_GOLDENS)
def test_plain_transformers_gives_the_official_logits(name, tmp_path):
    write_llama(open_checkpoint(golden_folder(name)), tmp_path / "llama")
    tensors = golden(name)
    for case in forwards(tensors):
        model = transformers_model(tmp_path / "llama")  # a fresh one: its dynamic scaling remembers lengths
        with torch.no_grad():
            logits = model(tensors[f"{case}.input_ids"]).logits
        torch.testing.assert_close(logits, tensors[f"{case}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", LANGUAGE_GOLDENS)
def test_our_model_gives_the_official_logits_from_the_llama_folder(name, tmp_path):
    write_llama(open_checkpoint(golden_folder(name)), tmp_path / "llama")
    model, tensors = load_model(tmp_path / "llama", rope_mode="reference"), golden(name)
    for case in forwards(tensors):
        with torch.no_grad():
            logits = model(tensors[f"{case}.input_ids"])
        torch.testing.assert_close(logits, tensors[f"{case}.logits"], atol=1e-4, rtol=0)


def test_swapped_keys_and_values_would_be_seen(tmp_path):
    """Negative control: the comparison with the official logits fails when k and v change places."""
    write_llama(open_checkpoint(golden_folder("gqa")), tmp_path / "llama")
    state = load_file(tmp_path / "llama" / "model.safetensors")
    for layer in range(2):
        k, v = (f"model.layers.{layer}.self_attn.{p}_proj.weight" for p in "kv")
        state[k], state[v] = state[v], state[k]
    save_file(state, tmp_path / "llama" / "model.safetensors", metadata={"format": "pt"})
    tensors = golden("gqa")
    with torch.no_grad():
        theirs = transformers_model(tmp_path / "llama")(tensors["forward.33.input_ids"]).logits
        ours = load_model(tmp_path / "llama")(tensors["forward.33.input_ids"])
    assert (theirs - tensors["forward.33.logits"]).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # the same wrong model


def test_classification_head_matches_transformers(tmp_path):
    write_llama(open_checkpoint(golden_folder("sequence-classification")), tmp_path / "llama")
    theirs = LlamaForSequenceClassification.from_pretrained(tmp_path / "llama", dtype=torch.float32).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=torch.ones_like(ids)).logits
        found = load_model(tmp_path / "llama")(ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"head_dim": 10}, {"bias": True}, {"num_key_value_heads": 6}]
)
def test_other_shapes_agree_with_transformers(changes, tmp_path):
    original = random_checkpoint(small_config(**changes))
    write_llama(original, tmp_path / "llama", max_shard_bytes=20_000)
    assert (tmp_path / "llama" / "model.safetensors.index.json").exists()
    assert_same_model(LlamaCheckpoint(tmp_path / "llama"), original)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = transformers_model(tmp_path / "llama")(ids).logits
        found = load_model(tmp_path / "llama")(ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_dtype_can_be_changed(tmp_path):
    original = open_checkpoint(golden_folder("gqa"))
    write_llama(original, tmp_path / "llama", dtype=torch.bfloat16)
    found = LlamaCheckpoint(tmp_path / "llama")
    for name in original.tensors:
        assert torch.equal(found.read(name), original.read(name).bfloat16())
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_stop_ids_without_tokenizer_are_those_of_the_config(tmp_path):
    write_llama(open_checkpoint(golden_folder("gqa")), tmp_path / "llama")
    assert json.loads((tmp_path / "llama" / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_the_tokenizer_goes_along_and_generation_stops_at_both_ends(tmp_path):
    config = small_config(vocab_size=92544, hidden_size=12, num_hidden_layers=1)
    write_llama(random_checkpoint(config, tokenizer_folder=chat_tokenizer(tmp_path)), tmp_path / "llama")
    generation = json.loads((tmp_path / "llama" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 92542]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "llama")
    lines = [json.loads(line) for line in (DATA / "tokenizer" / "ids.jsonl").open(encoding="utf-8")]
    for line in lines[:60]:
        if "<" not in line["text"] and "[UNUSED" not in line["text"]:
            assert theirs.encode(line["text"], add_special_tokens=False) == line["ids"]


@pytest.mark.parametrize("name", ["reward"])
def test_a_reward_head_has_no_llama_form(name, tmp_path):
    with pytest.raises(ExportError, match="no reward head"):
        write_llama(open_checkpoint(golden_folder(name)), tmp_path / "llama")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'linear' or 'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, "'linear' or 'dynamic'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_internlm2_cannot_express_is_refused(changes, message, tmp_path):
    write_llama(open_checkpoint(golden_folder("gqa")), tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        LlamaCheckpoint(tmp_path / "llama")


def test_transformers_5_spelling_of_the_config_is_read(tmp_path):
    write_llama(open_checkpoint(golden_folder("dynamic-ntk")), tmp_path / "llama")
    transformers_model(tmp_path / "llama").save_pretrained(tmp_path / "saved")
    assert "rope_parameters" in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert_same_model(LlamaCheckpoint(tmp_path / "saved"), open_checkpoint(golden_folder("dynamic-ntk")))


def test_another_model_type_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must be 'llama'"):
        LlamaCheckpoint(golden_folder("gqa"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: s.pop("model.layers.1.self_attn.k_proj.weight"),
            "layers.1.self_attn.k_proj.weight is missing",
        ),
        (lambda s: s.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight has shape"),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(3)}),
            "q_norm.weight has no place",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(damage, message, tmp_path):
    write_llama(open_checkpoint(golden_folder("gqa")), tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    state = load_file(path)
    damage(state)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        LlamaCheckpoint(tmp_path / "llama")


def test_fused_rows_stand_where_the_report_says():
    """Naive oracle: walk over the rows one by one."""
    config = small_config()
    groups, per_group, width = 2, 3, 8
    fused = torch.randn(config.qkv_size, 5)
    parts = wqkv.split(fused, config)
    for group in range(groups):
        for slot in range(per_group + 2):
            for d in range(width):
                row = fused[(group * (per_group + 2) + slot) * width + d]
                if slot < per_group:
                    expected = parts.q[(group * per_group + slot) * width + d]
                else:
                    expected = (parts.k, parts.v)[slot - per_group][group * width + d]
                assert torch.equal(row, expected)
    assert torch.equal(wqkv.fuse(parts, config), fused)


def test_paired_rows_and_halves_are_inverse():
    rows = torch.arange(24.0)
    paired = wqkv.paired_rows(rows, 3)
    assert paired[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(wqkv.half_split_rows(paired, 3), rows)
