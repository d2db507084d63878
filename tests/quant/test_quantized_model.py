"""A model on packed weights against the same model on plain ones."""

import copy

import pytest
import torch
from torch import nn

from internlm2.errors import RequestError
from internlm2.model.config import ModelConfig
from internlm2.model.heads import CausalLM, RewardModel, build_model
from internlm2.quant.linear import PackedFeedForward, PackedLinear, quantize_model
from internlm2.quant.weight import FORMATS, WeightFormat, quantize_weight

IDS = torch.tensor([[1, 5, 9, 200, 3, 77, 42, 8]])


def tiny(
    *, tied: bool = False, bias: bool = False, head: str = "language", dtype: torch.dtype = torch.float32
):
    config = ModelConfig(
        vocab_size=301, hidden_size=96, intermediate_size=200, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=tied, bias=bias, head=head,
    )  # fmt: skip
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(3))
    if bias:
        for layer in model.model.layers:
            nn.init.normal_(layer.attention.wqkv.bias)
            nn.init.normal_(layer.attention.wo.bias)
    return model.to(dtype).eval()


@pytest.mark.parametrize(("kind", "largest"), [("bfloat16", 0.01), ("int8", 0.03), ("int4", 0.2)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_logits_are_near_those_of_the_plain_model(kind, largest: float, tied: bool, bias: bool) -> None:
    model = tiny(tied=tied, bias=bias)
    expected = model(IDS)
    quantize_model(model, kind)
    out = model(IDS)
    assert out.dtype == torch.float32
    assert 0 < (out - expected).norm() / expected.norm() < largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_whole_prompt_and_prefixes_give_the_same_bits_per_row(dtype: torch.dtype) -> None:
    packed = PackedLinear(quantize_weight(torch.randn(100, 96), FORMATS["int8"]))
    x = torch.randn(50, 96).to(dtype)
    assert torch.equal(packed(x), torch.cat([packed(x[:37]), packed(x[37:])]))


@torch.inference_mode()
def test_the_whole_of_the_layers_is_replaced_and_the_embedding_stays() -> None:
    model = tiny(tied=True)
    embedding = model.model.tok_embeddings.weight.clone()
    quantize_model(model, "int4")
    assert not [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(isinstance(layer.feed_forward, PackedFeedForward) for layer in model.model.layers)
    assert torch.equal(model.model.tok_embeddings.weight, embedding)
    assert isinstance(model, CausalLM)
    assert isinstance(model.output, PackedLinear)
    assert model.output.packed.kind == "int8"
    assert model.model.layers[0].attention.wo.packed.kind == "int4"


def test_the_head_can_be_chosen() -> None:
    model = tiny()
    quantize_model(model, WeightFormat("int4", 64, has_zeros=True), head="bfloat16")
    assert model.output.packed.kind == "bfloat16"
    assert model.model.layers[0].attention.wo.packed.has_zeros


@torch.inference_mode()
def test_a_reward_model_keeps_its_head() -> None:
    model = tiny(head="reward")
    assert isinstance(model, RewardModel)
    expected = model(IDS)
    quantize_model(model, "int8")
    torch.testing.assert_close(model(IDS), expected, atol=0.02, rtol=0.02)
    assert isinstance(model.v_head, nn.Linear)


@torch.inference_mode()
def test_a_copy_computes_the_same() -> None:
    model = tiny()
    quantize_model(model, "int8")
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))


def test_what_cannot_be_packed_is_refused() -> None:
    model = tiny(dtype=torch.float16)
    with pytest.raises(RequestError, match=r"model is in torch.float16.*Load it with dtype='bfloat16'"):
        quantize_model(model, "int8")
    with pytest.raises(RequestError, match=r"model is on meta.*Load it with device='cpu'"):
        quantize_model(tiny().to("meta"), "int8")
    model = tiny()
    quantize_model(model, "int8")
    with pytest.raises(RequestError, match="packed, split or adapted already"):
        quantize_model(model, "int8")


def test_printing_a_packed_linear_says_what_it_is() -> None:
    packed = PackedLinear(quantize_weight(torch.randn(10, 96), FORMATS["int8"]))
    assert repr(packed) == "PackedLinear(in_features=96, out_features=10, kind=int8)"
