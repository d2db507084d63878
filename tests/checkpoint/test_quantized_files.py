"""Quantised folders: the real compressed-tensors and transformers as oracles, bit-exact reloads, and bad files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantized_folders import IDS, WORD, edit_config, edit_tensors, tiny, write
from safetensors.torch import load_file

from folders import byte_tokenizer_json
from internlm2 import LLM, SamplingParams
from internlm2.checkpoint.formats.compressed_tensors import QuantizedCheckpoint, pack_words, unpack_words
from internlm2.checkpoint.formats.official import ModelCheckpoint
from internlm2.checkpoint.inference import choose_for, load_for_inference
from internlm2.checkpoint.load import load_model
from internlm2.checkpoint.load_packed import load_packed, load_packed_checkpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.errors import ExportError, RequestError
from internlm2.kernels import unpack
from internlm2.kernels.packed import stored_halves
from internlm2.model.heads import build_model
from internlm2.quant.linear import PackedFeedForward, PackedLinear

CASES = [
    {"kind": "int4"},
    {"kind": "int4", "symmetric": True, "method": "rtn"},
    {"kind": "int8", "method": "rtn"},
    {"kind": "int8", "group": 64, "method": "rtn"},
]

# Against other programs


@pytest.mark.parametrize("options", CASES, ids=str)
def test_compressed_tensors_itself_gives_the_same_weights_bit_for_bit(tmp_path, options):
    oracle = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    folder = write(tmp_path / "m", **options)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config.pop("quant_method")
    parsed = oracle.quantization.QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    stored = load_file(folder / "model.safetensors")
    ours = open_checkpoint(folder)
    assert isinstance(ours, QuantizedCheckpoint)
    for ending, official in (
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("self_attn.o_proj", "attention.wo"),
    ):
        for layer in range(2):
            prefix = f"model.layers.{layer}.{ending}."
            parts = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
            parts.pop("bias", None)
            theirs = compressor.decompress(parts, scheme)["weight"]
            found = ours.read(f"model.layers.{layer}.{official}.weight")
            assert found.dtype == theirs.dtype == torch.bfloat16
            assert torch.equal(found, theirs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [8, 37, 64])
def test_words_are_those_of_compressed_tensors(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    lowest = -(1 << (bits - 1))
    signed = torch.randint(lowest, -lowest, (5, columns), dtype=torch.int8)
    ours = signed if bits == 8 else (signed + 8).view(torch.uint8)
    words = pack_words(ours, bits)
    assert torch.equal(words, helpers.pack_to_int32(signed, bits))
    assert torch.equal(unpack_words(words, bits, columns, what="x"), ours)


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.inference_mode()
def test_transformers_loads_it_and_computes_the_same(tmp_path, options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    folder = write(tmp_path / "m", **options)
    # NOTE: transformers 5.23 reads zeros only when it dequantises (vllm-project/llm-compressor#1704).
    settings = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings
    )
    ours = load_model(folder)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_transformers_loads_the_symmetric_form_without_any_option(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    folder = write(tmp_path / "m", symmetric=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours = load_model(folder, dtype="bfloat16")
    # Every linear's weights are the same bits; what differs is the order of bfloat16 sums.
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits.float(), atol=0.1, rtol=0.1)


def test_what_compressed_tensors_writes_is_read(tmp_path, int4):
    """Its own rounding and packing of another matrix, in several forms, put in the place of one of ours."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = torch.randn(192, 64).to(torch.float16)
    forms = [
        (4, True, "group", 16, "pack-quantized"), (4, False, "group", 64, "pack-quantized"),
        (8, False, "channel", None, "pack-quantized"), (8, True, "channel", None, "int-quantized"),
    ]  # fmt: skip
    for number, (bits, symmetric, strategy, group, form) in enumerate(forms):
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        scale = torch.rand(192, 64 // (group or 64)).to(torch.float16) * 0.1 + 0.1
        zero = torch.randint(-3, 4, scale.shape, dtype=torch.int8)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero * (not symmetric)}
        compressor = BaseCompressor.get_value_from_registry(form)
        packed = compressor.compress(state, scheme)
        expected = compressor.decompress(packed, scheme)["weight"]
        if symmetric:
            packed.pop("weight_zero_point", None)
        folder = Path(shutil.copytree(int4, tmp_path / str(number)))

        def put(tensors, parts=packed):
            for part in ("_packed", "_scale", "_shape", "_zero_point"):
                tensors.pop(WORD + part)
            tensors |= {WORD.removesuffix("weight") + key: value.contiguous() for key, value in parts.items()}

        edit_tensors(folder, put)
        group_json = {"targets": ["Linear"], "format": form, "weights": args.model_dump(mode="json")}
        edit_config(
            folder, lambda d, g=group_json: d["quantization_config"]["config_groups"].update(group_1=g)
        )
        checkpoint = open_checkpoint(folder)
        assert torch.equal(checkpoint.read("model.layers.0.feed_forward.w3.weight"), expected)
        rounded = checkpoint.rounded("model.layers.0.feed_forward.w3.weight")
        torch.testing.assert_close(rounded.values().half(), expected, atol=1e-3, rtol=1e-3)


# Reloading


@pytest.mark.parametrize("layout", ["llama", "internlm2"])
@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
@torch.inference_mode()
def test_what_takes_up_the_scales_of_columns_is_in_the_file(tmp_path, layout, method):
    """Norms and the bias of values are stored as scaling left them, or the model would be another one."""
    plain = tiny()
    model = build_model(plain.config)
    model.load_state_dict({name: plain.read(name) for name in plain.tensors})
    for layer in model.model.layers:
        layer.attention_norm.weight[::8] *= 30
        layer.ffn_norm.weight[::8] *= 30
    checkpoint = ModelCheckpoint(model)
    folder = write(tmp_path / "m", checkpoint, kind="int8", method=method, layout=layout)
    found = open_checkpoint(folder)
    is_same = [
        torch.equal(found.read(name).float(), checkpoint.read(name).bfloat16().float())
        for name in found.tensors
        if name.endswith(("norm.weight", "wqkv.bias")) and ".layers." in name
    ]
    assert len(is_same) == 6
    assert any(is_same) != ("awq" in method)
    expected = model.hidden_states(IDS)
    error = (load_model(folder, dtype="float32").hidden_states(IDS) - expected).norm() / expected.norm()
    assert error < 0.03


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("layout", ["llama", "internlm2"])
@torch.inference_mode()
def test_packed_weights_are_the_numbers_of_the_file(tmp_path, options, layout):
    folder = write(tmp_path / "m", layout=layout, **options)
    checkpoint = open_checkpoint(folder)
    model = load_packed(folder, dtype="float32")
    for index, layer in enumerate(model.model.layers):
        for name in ("attention.wqkv", "attention.wo", "feed_forward.w2"):
            rounded = checkpoint.rounded(f"model.layers.{index}.{name}.weight")
            assert torch.equal(unpack(layer.get_submodule(name).packed), rounded.values())
        w13 = layer.feed_forward.w13.packed
        for name, stored in zip(("w1", "w3"), stored_halves(w13, unpack(w13).T), strict=True):
            assert torch.equal(
                stored.T, checkpoint.rounded(f"model.layers.{index}.feed_forward.{name}.weight").values()
            )
    assert torch.equal(load_packed(folder, dtype="float32")(IDS), model(IDS))
    plain = load_model(folder)(IDS)
    assert (
        0 < (model(IDS) - plain).norm() / plain.norm() < 0.02
    )  # bfloat16 weights, int8 head and activations


@torch.inference_mode()
def test_both_layouts_hold_the_same_numbers(tmp_path):
    first, second = (
        open_checkpoint(write(tmp_path / layout, layout=layout)) for layout in ("llama", "internlm2")
    )
    assert first.config == second.config
    for name in first.tensors:
        assert torch.equal(first.read(name), second.read(name)), name
    assert (tmp_path / "internlm2" / "config.json").read_text().count('"internlm2"') == 1


@torch.inference_mode()
def test_a_tied_model_and_a_reward_model_come_back(tmp_path):
    tied = write(tmp_path / "tied", tiny(tie_word_embeddings=True))
    assert load_packed(tied)(IDS).shape == (2, 50, 300)
    with pytest.raises(ExportError, match=r"no reward head. Give --layout internlm2"):
        write(tmp_path / "reward", tiny(head="reward"))
    reward = write(tmp_path / "reward", tiny(head="reward"), layout="internlm2", kind="int8")
    plain = tiny(head="reward")
    model = build_model(plain.config)
    model.load_state_dict({name: plain.read(name) for name in plain.tensors})
    torch.testing.assert_close(load_packed(reward, dtype="float32")(IDS), model(IDS), atol=0.05, rtol=0.05)


def test_what_the_kernels_cannot_hold_computes_in_floats(copy):
    """float16 scales are no bfloat16 numbers: rounding them again would change the model."""

    def change(tensors):
        for name in list(tensors):
            if name.endswith("_scale"):
                tensors[name] = (tensors[name].float() * 1.001).to(torch.float16)

    edit_tensors(copy, change)
    model = load_packed(copy, dtype="float32")
    assert isinstance(model.model.layers[0].attention.wo, torch.nn.Linear)
    torch.testing.assert_close(model.hidden_states(IDS), load_model(copy).hidden_states(IDS))


def test_groups_larger_than_the_kernels_are_cut_without_loss(tmp_path):
    folder = write(
        tmp_path / "m", tiny(hidden_size=512, num_attention_heads=8, intermediate_size=1024), group=128
    )

    def join(tensors):
        for name in list(tensors):
            if name.endswith(("_scale", "_zero_point")):
                tensors[name] = tensors[name][:, ::4].contiguous()  # a group is 512 now

    edit_tensors(folder, join)
    edit_config(
        folder,
        lambda d: d["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=512),
    )
    w2 = load_packed(folder).model.layers[0].feed_forward.w2.packed
    assert w2.group == 256
    rounded = open_checkpoint(folder).rounded("model.layers.0.feed_forward.w2.weight")
    assert rounded.group == 512
    assert torch.equal(unpack(w2), rounded.values())


@pytest.fixture
def chat(int4, tmp_path) -> Path:
    folder = Path(shutil.copytree(int4, tmp_path / "chat"))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    )
    return folder


def test_the_engine_packs_by_itself_and_answers_the_same_every_time(chat):
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=1)
    llm = LLM(chat)
    assert isinstance(llm.model.model.layers[0].feed_forward, PackedFeedForward)
    assert isinstance(llm.model.output, PackedLinear)
    assert LLM(chat).generate(["Hello"], params) == llm.generate(["Hello"], params)
    exact = LLM(chat, dtype="float32", deterministic=True)
    assert isinstance(exact.model.model.layers[0].attention.wo, torch.nn.Linear)
    ours, theirs = (
        x.score(["Hel"], ["lo there"])[0].token_logprobs for x in (LLM(chat, dtype="float32"), exact)
    )
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


@torch.inference_mode()
def test_another_quantization_can_be_asked_for(chat):
    model = LLM(chat, quantization="bfloat16").model
    assert model.model.layers[0].attention.wo.packed.kind == "bfloat16"
    checkpoint = open_checkpoint(chat)
    expected = checkpoint.read("model.layers.0.attention.wo.weight").float()
    assert torch.equal(unpack(model.model.layers[0].attention.wo.packed), expected)


def test_plain_loading_and_gpus(int4):
    checkpoint = open_checkpoint(int4)

    def load(wanted: str, dtype: str):
        return load_for_inference(
            checkpoint, choose_for(checkpoint, wanted=wanted, dtype=dtype, device="cpu"), device="cpu"
        )

    half = load("auto", "float16")
    assert half.model.layers[0].attention.wo.weight.dtype == torch.float16
    auto = load("auto", "auto")
    assert isinstance(auto.model.layers[0].attention.wo, PackedLinear)
    plain = load("none", "auto")
    assert isinstance(plain.model.layers[0].attention.wo, torch.nn.Linear)
    with pytest.raises(RequestError, match=r"not quantised. Say how: quantization='int8'"):
        load_packed_checkpoint(tiny())
