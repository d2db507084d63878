"""Every number of the official code, reproduced; and proof that a wrong network would be noticed."""

import pytest
import torch
import torch.nn.functional as F

from goldens import GENERATE_GOLDENS, LANGUAGE_GOLDENS, forwards, golden, golden_folder
from internlm2 import load_model
from internlm2.engine.sampling.params import SamplingParams
from internlm2.model import rope
from internlm2.model.heads import CausalLM, Model
from reference.plain_loop import generate

ATOL = 2e-4


def max_error(model: Model, tensors: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return max(
            (model(tensors[f"{case}.input_ids"]) - tensors[f"{case}.logits"]).abs().max().item()
            for case in forwards(tensors)
        )


@pytest.mark.parametrize("rope_mode", ["stateless", "reference"])
@pytest.mark.parametrize("name", LANGUAGE_GOLDENS)
def test_logits_and_hidden_states_equal_the_official_code(name, rope_mode):
    model, tensors = load_model(golden_folder(name), rope_mode=rope_mode), golden(name)
    assert forwards(tensors)
    for case in forwards(tensors):
        with torch.no_grad():
            hidden = model.hidden_states(tensors[f"{case}.input_ids"])
            logits = model(tensors[f"{case}.input_ids"])
        torch.testing.assert_close(hidden, tensors[f"{case}.last_hidden_state"], atol=ATOL, rtol=0)
        torch.testing.assert_close(logits, tensors[f"{case}.logits"], atol=ATOL, rtol=0)
        assert logits.dtype == torch.float32


@pytest.mark.parametrize("name", LANGUAGE_GOLDENS)
def test_loss_and_gradients_equal_the_official_code(name):
    model, tensors = load_model(golden_folder(name)), golden(name)
    logits = model(tensors["loss.input_ids"])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tensors["loss.labels"][:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(loss[None], tensors["loss.value"], rtol=1e-4, atol=0)
    parameters = model.parameters_by_checkpoint_name()
    gradients = [n for n in tensors if n.startswith("loss.grad.")]
    assert len(gradients) == 4
    for name_of_gradient in gradients:
        expected = tensors[name_of_gradient]
        found = parameters[name_of_gradient.removeprefix("loss.grad.")].grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("key", "penalty"), [("greedy", 1.0), ("greedy_repetition_penalty_1.3", 1.3)])
@pytest.mark.parametrize("name", GENERATE_GOLDENS)
def test_generated_ids_equal_the_official_code(name, key, penalty):
    model, tensors = load_model(golden_folder(name)), golden(name)
    ids, mask = tensors["generate.input_ids"], tensors["generate.attention_mask"].bool()
    prompts = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    expected = tensors[f"generate.{key}"][:, ids.shape[1] :]
    params = SamplingParams(max_tokens=expected.shape[1], repetition_penalty=penalty)
    found = generate(model, prompts, params)
    assert [c.token_ids for c in found] == expected.tolist()
    assert {c.finish_reason for c in found} == {"length"}


@pytest.mark.parametrize("name", GENERATE_GOLDENS)
def test_a_left_padded_batch_gives_the_logits_of_each_row_alone(name):
    model, tensors = load_model(golden_folder(name)), golden(name)
    ids, mask = tensors["generate.input_ids"], tensors["generate.attention_mask"]
    with torch.no_grad():
        together = model(ids, attention_mask=mask)
        for row, kept in enumerate(mask.bool()):
            alone = model(ids[row, kept][None])[0]
            torch.testing.assert_close(together[row, kept], alone, rtol=1e-5, atol=1e-5)
    assert together.isfinite().all()


def test_reward_scores_equal_the_official_code():
    model, tensors = load_model(golden_folder("reward")), golden("reward")
    with torch.no_grad():
        scores = model(tensors["reward.input_ids"], attention_mask=tensors["reward.attention_mask"])
    torch.testing.assert_close(scores, tensors["reward.scores"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("with_mask", [True, False])
def test_class_logits_equal_the_official_code(with_mask):
    name = "sequence-classification"
    model, tensors = load_model(golden_folder(name)), golden(name)
    mask = tensors["classification.attention_mask"] if with_mask else None
    with torch.no_grad():
        logits = model(tensors["classification.input_ids"], attention_mask=mask)
    torch.testing.assert_close(logits, tensors["classification.logits"], atol=ATOL, rtol=0)


def test_a_left_padded_row_is_classified_as_it_would_be_alone():
    model = load_model(golden_folder("sequence-classification"))
    row = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([[2, 2, 5, 6, 7]])), model(row))
        torch.testing.assert_close(model(torch.tensor([[5, 6, 7, 2, 2]])), model(row))


def _swap_keys_and_values(model: CausalLM) -> None:
    attention = model.model.layers[0].attention
    grouped = attention.wqkv.weight.view(attention.num_key_value_heads, -1, attention.head_dim, 64)
    grouped[:, [-2, -1]] = grouped[:, [-1, -2]].clone()


def _read_wqkv_as_blocks(model: CausalLM) -> None:
    # All queries, then all keys, then all values, as most other models store it.
    attention = model.model.layers[0].attention
    heads, dim = 4, attention.head_dim
    q, k, v = attention.wqkv.weight.split([heads * dim, 2 * dim, 2 * dim])
    grouped = torch.cat((q.view(2, -1, dim, 64), k.view(2, 1, dim, 64), v.view(2, 1, dim, 64)), dim=1)
    attention.wqkv.weight.copy_(grouped.reshape(-1, 64))


def _change_the_rope_base(model: CausalLM) -> None:
    object.__setattr__(model.config, "rope_theta", 10_000.0)


@pytest.mark.parametrize("damage", [_swap_keys_and_values, _read_wqkv_as_blocks, _change_the_rope_base])
def test_a_wrong_network_is_noticed(damage):
    model, tensors = load_model(golden_folder("gqa")), golden("gqa")
    assert max_error(model, tensors) < ATOL
    with torch.no_grad():
        damage(model)
    assert max_error(model, tensors) > 10 * ATOL


def test_dynamic_scaling_that_is_left_out_is_noticed(monkeypatch):
    model, tensors = load_model(golden_folder("dynamic-ntk")), golden("dynamic-ntk")
    assert max_error(model, tensors) < ATOL
    original = rope.inverse_frequencies
    unscaled = lambda config, limits: original(config, limits.clamp(max=config.max_position_embeddings))  # noqa: E731
    monkeypatch.setattr(rope, "inverse_frequencies", unscaled)
    assert max_error(model, tensors) > 10 * ATOL
