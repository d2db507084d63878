"""A network in another basis: the same outputs, no weight as it was, and no grid left."""

import pytest
import torch

from internlm2.model.config import ModelConfig
from internlm2.model.heads import CausalLM, build_model
from internlm2.quant.basis import in_another_basis
from internlm2.quant.weight import Rounded, WeightFormat, round_weight

IDS = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def a_model(**changes) -> CausalLM:
    shape = {
        "vocab_size": 90, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    model = build_model(ModelConfig(**(shape | changes)))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0.2, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"bias": True},
        {"hidden_size": 33, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    ],
    ids=str,
)
@torch.inference_mode()
def test_another_basis_computes_the_same(changes):
    model = a_model(**changes)
    turned = in_another_basis(model, torch.Generator().manual_seed(3))
    torch.testing.assert_close(turned(IDS), model(IDS), atol=2e-4, rtol=2e-4)
    for name, parameter in turned.model.layers.named_parameters():
        before = model.model.layers.get_parameter(name)
        if parameter.dim() == 2:
            assert (parameter != before).float().mean() > 0.9, name


@torch.no_grad()
def test_weights_on_a_grid_lie_on_none_afterwards():
    model = a_model(hidden_size=96, intermediate_size=128)
    fmt = WeightFormat("int4", 32, has_zeros=True)
    names = [name for name, p in model.model.layers.named_parameters() if p.dim() == 2]
    for name in names:
        weight = model.model.layers.get_parameter(name)
        weight.copy_(Rounded(*round_weight(weight, fmt, 32), 32).values())
    turned = in_another_basis(model, torch.Generator().manual_seed(3))
    for name in names:
        before, after = (
            torch.tensor(
                [len(group.unique()) for group in m.model.layers.get_parameter(name).reshape(-1, 32)]
            ).float()
            for m in (model, turned)
        )
        assert before.max() <= 16
        assert after.mean() > 28, name


@torch.no_grad()
def test_large_channels_stay_large():
    """Mixing all channels evenly would make rounding easier than it is; pairs do so only a little."""
    model = a_model(hidden_size=96)
    weight = model.model.layers[0].feed_forward.w1.weight
    weight[:, 7] *= 20
    turned = in_another_basis(model, torch.Generator().manual_seed(3)).model.layers[0].feed_forward.w1.weight
    sizes = turned.norm(dim=0).sort(descending=True).values
    assert sizes[0] > 5 * sizes[2]
