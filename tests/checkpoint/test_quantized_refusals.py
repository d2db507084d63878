"""Quantised folders that cannot be read, and options that cannot be: each says what is wrong."""

from pathlib import Path

import pytest
import torch
from quantized_folders import WORD, edit_config, edit_tensors, tiny, write

from internlm2.checkpoint.formats.compressed_tensors import pack_words, unpack_words
from internlm2.checkpoint.load import load_model
from internlm2.checkpoint.load_packed import load_packed
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from internlm2.errors import CheckpointError, RequestError
from internlm2.quant.layerwise import sequences


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_packed(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"already quantised by another tool \(GPTQ\).*internlm2 model quantize"),
        ({"quant_method": "awq"}, r"another tool \(AWQ\)"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, r"another tool \(bitsandbytes\)"),
        ({"quant_method": "fp8"}, r"another tool \(fp8\)"),
        ({"quant_method": "martian"}, r"another tool \(martian\)"),
        ({"bits": 4}, "a tool that it does not name"),
        ([1], "must be an object"),
        ({"quant_method": "compressed-tensors"}, "has no config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": 3}}, "does not say how weights are stored"),
    ],
)  # fmt: skip
def test_files_of_other_tools_are_named(copy, config, message):
    edit_config(copy, lambda data: data.update(quantization_config=config))
    refuse(copy, message)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("weights", {"type": "float", "num_bits": 8}, "'float' with 8 bits; int with 4 or 8 is read"),
        ("weights", {"num_bits": 3}, "with 3 bits"),
        ("weights", {"actorder": "group"}, "columns are reordered"),
        ("weights", {"strategy": "block"}, "strategy is 'block'"),
        ("weights", {"group_size": -7}, "group_size -7"),
        ("weights", {"group_size": 64}, "is stored as int4, groups of 32, with zeros, but config.json says int4, groups of 64"),
        ("weights", {"symmetric": True}, "stored as int4, groups of 32, with zeros"),
        ("group", {"format": "marlin-24"}, "format is 'marlin-24'"),
        ("group", {"input_activations": {"dynamic": False, "num_bits": 8}}, "activations are rounded with fixed scales"),
        ("group", {"output_activations": {"num_bits": 8}}, "activations are rounded with fixed scales"),
        ("top", {"transform_config": {"config_groups": {"R1": {}}}}, "transforms of the weights"),
        ("top", {"kv_cache_scheme": {"num_bits": 8}}, "fixed scales for keys and values"),
        ("top", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
    ],
)  # fmt: skip
def test_schemes_that_are_not_read_are_named(copy, place, change, message):
    def edit(data):
        top = data["quantization_config"]
        group = top["config_groups"]["group_0"]
        {"top": top, "group": group, "weights": group["weights"]}[place].update(change)

    edit_config(copy, edit)
    refuse(copy, message)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        (
            "qweight",
            torch.int32,
            r"up_proj.qweight has dtype I32; only float weights are read",
        ),  # AutoGPTQ, AutoAWQ
        ("weight", torch.uint32, r"up_proj.weight has dtype U32"),  # MLX
        ("weight", torch.float8_e4m3fn, r"up_proj.weight has dtype F8_E4M3"),
    ],
)
def test_quantised_tensors_of_which_config_json_says_nothing_are_refused(copy, name, dtype, message):
    edit_config(copy, lambda data: data.pop("quantization_config"))

    def change(tensors):
        for key in [key for key in tensors if not tensors[key].is_floating_point() or "_scale" in key]:
            tensors.pop(key)
        tensors[WORD.removesuffix("weight") + name] = torch.zeros(192, 8).to(dtype)

    edit_tensors(copy, change)
    refuse(copy, message + ".*Give the folder as it was before quantisation")


def replaced(part: str, value) -> object:
    return lambda tensors: tensors.update({WORD + part: value(tensors[WORD + part])})


def with_nan(x):
    x[0, 0] = torch.nan
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(WORD + "_scale"), "up_proj.weight_scale is missing beside its weight"),
        (lambda t: t.pop(WORD + "_packed"), "weight_scale|up_proj.weight"),
        (lambda t: t.pop(WORD + "_zero_point"), "A tensor is missing"),
        (replaced("_scale", with_nan), "NaN or infinite"),
        (replaced("_scale", lambda x: x[:-1].contiguous()), r"weight_scale is torch.bfloat16 of shape \[191, 2\]"),
        (replaced("_scale", lambda x: x.int()), "must be floating"),
        (replaced("_scale", lambda x: x.repeat(1, 3)[:, :5].contiguous()), "5 scales a row, which do not divide 64"),
        (replaced("_packed", lambda x: x[:, :-1].contiguous()), r"shape \[192, 7\], but config.json asks for 192 rows of 64"),
        (replaced("_packed", lambda x: x.float()), "torch.float32 of shape"),
        (replaced("_zero_point", lambda x: x[:-1].contiguous()), r"must be torch.int32 of \[24, 2\]"),
        (replaced("_shape", lambda x: x + 1), r"says \[193, 65\], but config.json asks for \[192, 64\]"),
        (replaced("_shape", lambda x: x.repeat(2)), "not two whole numbers"),
        (lambda t: t.update({WORD + "_g_idx": torch.zeros(64, dtype=torch.int32)}), "reorders columns"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "model.norm.weight is torch.int8"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    ],
)  # fmt: skip
def test_damaged_folders_are_refused_with_the_tensor(copy, change, message):
    edit_tensors(copy, change)
    refuse(copy, message)


def test_values_beyond_the_last_column_are_refused():
    words = pack_words(torch.full((2, 12), 15, dtype=torch.uint8), 4)
    words[1, 1] |= 1 << 20
    with pytest.raises(CheckpointError, match="X holds values beyond its last column"):
        unpack_words(words, 4, 12, what="X")


def test_a_truncated_file_is_refused(copy):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    refuse(copy, "truncated or damaged")


# What cannot be written


def test_options_that_cannot_be_are_refused(tmp_path, int4):
    for options, message in (
        ({"kind": "int3"}, "to is 'int3', but must be 'int8' or 'int4'"),
        ({"kind": "int4", "method": "magic"}, "method is 'magic'"),
        ({"kind": "int4", "group": 48}, "group is 48, but must be 32, 64 or 128"),
        ({"kind": "int4", "layout": "x"}, "layout is 'x'"),
    ):
        with pytest.raises(RequestError, match=message):
            QuantizeOptions(**options)
    with pytest.raises(
        RequestError, match=r"has 64 columns, which groups of 128 do not divide. Give --group 32 or 64"
    ):
        write(tmp_path / "m", group=128)
    with pytest.raises(CheckpointError, match="is quantised already"):
        quantize_checkpoint(open_checkpoint(int4), tmp_path / "m", QuantizeOptions(kind="int4", method="rtn"))
    with pytest.raises(RequestError, match="needs a text to calibrate with"):
        quantize_checkpoint(tiny(), tmp_path / "m", QuantizeOptions(kind="int4"))
    with pytest.raises(RequestError, match="fewer than 2 tokens"):
        sequences([5])
    assert list(tmp_path.iterdir()) == []
