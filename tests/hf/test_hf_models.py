"""Saving, training, adapters, devices and the reward model's calls."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import internlm2
import internlm2.hf
from goldens import forwards, golden, golden_folder
from internlm2.errors import CheckpointError, ConfigError, RequestError
from internlm2.hf import InternLM2Config, InternLM2ForCausalLM
from internlm2.model import preset


def load(name: str, **options: object):
    return AutoModelForCausalLM.from_pretrained(golden_folder(name), **options)


def tiny(**options: object) -> InternLM2ForCausalLM:
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return InternLM2ForCausalLM(InternLM2Config(**shape | heads | options))


def test_the_configuration_has_the_official_fields_and_defaults():
    config = InternLM2Config()
    assert config.network() == preset("7b")
    assert (config.bias, config.rope_theta, config.rope_scaling) == (False, 1_000_000.0, None)
    config = AutoConfig.from_pretrained(golden_folder("dynamic-ntk"), trust_remote_code=True)
    assert config.rope_scaling == {"type": "dynamic", "factor": 2.0}
    assert "auto_map" not in config.to_dict()
    spelled = InternLM2Config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5})
    assert (spelled.rope_theta, spelled.rope_scaling) == (5e5, {"type": "dynamic", "factor": 2.0})


def test_a_configuration_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        InternLM2Config(num_key_value_heads=7)
    with pytest.raises(ConfigError, match="silu"):
        InternLM2Config(hidden_act="gelu")
    with pytest.raises(RequestError, match="rope_mode"):
        tiny(rope_mode="wrong")
    (tmp_path / "config.json").write_text(
        '{"model_type": "internlm", "architectures": ["InternLMForCausalLM"]}'
    )
    with pytest.raises(CheckpointError, match="not InternLM2"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_files_old_eager_is_no_preference_but_the_callers_is():
    assert load("gqa").config._attn_implementation == "sdpa"
    assert load("gqa", attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["mha", "six-groups", "mqa-bias", "dynamic-ntk"])
def test_saved_and_read_again_by_both_loaders(name, tmp_path):
    model, tensors = load(name), golden(name)
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["model_type"] == "internlm2"
    assert "auto_map" not in data
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == dict(model.named_parameters()).keys()
    ours = internlm2.load_model(tmp_path)
    assert saved.keys() == ours.parameters_by_checkpoint_name().keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for case in forwards(tensors):
        with torch.no_grad():
            ids = tensors[f"{case}.input_ids"]
            expected = model(ids).logits
            assert torch.equal(again(ids).logits, expected)
            torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "auto_class"),
    [("reward", AutoModel), ("sequence-classification", AutoModelForSequenceClassification)],
)
def test_other_heads_are_saved_and_read_again(name, auto_class, tmp_path):
    model = auto_class.from_pretrained(golden_folder(name))
    model.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    assert type(again) is type(model)
    ids = torch.tensor([[4, 5, 6, 510]])
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected)
        ours = internlm2.load_model(tmp_path)(ids)
    torch.testing.assert_close(ours.view_as(expected), expected, atol=1e-5, rtol=1e-5)


def test_tied_embeddings_are_saved_once(tmp_path):
    model = tiny(tie_word_embeddings=True)
    assert model.output.weight is model.model.tok_embeddings.weight
    model.save_pretrained(tmp_path)
    assert "output.weight" not in load_file(tmp_path / "model.safetensors")
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        torch.testing.assert_close(
            internlm2.load_model(tmp_path)(ids), model(ids).logits, atol=1e-5, rtol=1e-5
        )


def test_fresh_weights_are_drawn_as_the_official_code_does_but_for_the_pad_row():
    model = tiny()
    assert abs(model.model.layers[0].attention.wqkv.weight.std().item() - 0.02) < 1e-3
    assert (model.model.norm.weight == 1).all()
    assert model.model.tok_embeddings.padding_idx is None
    row = model.model.tok_embeddings.weight[2]
    assert row.abs().sum() > 0
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.model.tok_embeddings.weight.grad[2].abs().sum() > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_dtypes_and_device_maps(dtype, argument, device_map):
    model, tensors = load("gqa", device_map=device_map, **{argument: getattr(torch, dtype)}), golden("gqa")
    assert model.dtype == getattr(torch, dtype)
    ids = tensors["forward.33.input_ids"].to(model.device)
    with torch.no_grad():
        logits = model(ids).logits.cpu()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, tensors["forward.33.logits"], atol=0.25, rtol=0)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 36)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    tensors = golden("dynamic-ntk")

    def gradients(checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
        model = load("dynamic-ntk").train()
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        model.model.layers[0].attention.register_forward_hook(count)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(tensors["loss.input_ids"], labels=tensors["loss.labels"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}, calls

    plain, once = gradients(False)
    recomputed, twice = gradients(True)
    assert (once, twice) == (1, 2)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_and_a_cache_exclude_each_other():
    model = load("gqa").train()
    model.gradient_checkpointing_enable()
    cache = load("gqa")(torch.tensor([[3]]), use_cache=True).past_key_values
    with pytest.raises(RequestError, match="exclude each other"):
        model(torch.tensor([[4]]), past_key_values=cache)
    assert model(torch.tensor([[4]]), use_cache=True).past_key_values is None
    assert model.eval()(torch.tensor([[4]])).past_key_values is not None


def test_lora_on_wqkv_trains_merges_and_is_read_again(tmp_path):
    base, tensors = load("gqa"), golden("gqa")
    ids = tensors["loss.input_ids"]
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["wqkv"], task_type="CAUSAL_LM"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all("attention.wqkv.lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(load("gqa"), tmp_path)
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert isinstance(merged, InternLM2ForCausalLM)
    assert dict(merged.named_parameters()).keys() == dict(load("gqa").named_parameters()).keys()


def test_a_classifier_learns_from_labels(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(golden_folder("gqa"), num_labels=3)
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 10, 11]])
    found = model(ids, attention_mask=(ids != 2).long(), labels=torch.tensor([0, 2]))
    assert found.logits.shape == (2, 3)
    expected = torch.nn.functional.cross_entropy(found.logits, torch.tensor([0, 2]))
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_automodel_follows_the_architecture(tmp_path):
    assert isinstance(AutoModel.from_pretrained(golden_folder("gqa")), InternLM2ForCausalLM)
    trunk = load("gqa").model
    trunk.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is internlm2.hf.InternLM2Model
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, trunk(ids).last_hidden_state)
        assert isinstance(trunk(ids, return_dict=False), tuple)


@pytest.fixture(scope="module")
def reward(official_folder):
    data = json.loads((Path(official_folder) / "config.json").read_text())
    torch.manual_seed(0)
    config = InternLM2Config(**data | {"architectures": ["InternLM2ForRewardModel"], "dtype": "float32"})
    return internlm2.hf.InternLM2ForRewardModel(config).eval()


def test_reward_calls_have_the_official_results(reward, official_folder):
    tokenizer = AutoTokenizer.from_pretrained(official_folder)
    chats = [
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
        for answer in ("Hi", "I have no idea.", "你好,很高兴认识你。")
    ]
    scores = reward.get_scores(tokenizer, chats)
    for chat, score in zip(chats, scores, strict=True):
        assert reward.get_score(tokenizer, chat) == pytest.approx(score, abs=1e-5)
        ids = torch.tensor([[*tokenizer.internlm2.apply_chat(chat, add_generation_prompt=False), 92527]])
        with torch.no_grad():
            trunk = reward.model(ids).last_hidden_state[0, -1]
        assert (reward.v_head.weight[0] @ trunk).item() == pytest.approx(score, abs=1e-5)
    assert len(set(scores)) == 3
    assert reward.compare(tokenizer, chats[0], chats[1]) is (scores[0] > scores[1])
    assert reward.compare(tokenizer, chats[0], chats[1], return_logits=True)[1] == pytest.approx(
        scores[:2], abs=1e-5
    )
    order = reward.rank(tokenizer, chats)
    assert [scores[i] for i in order] == sorted(scores, reverse=True)
    assert reward.rank(tokenizer, chats, return_logits=True)[0] == order
