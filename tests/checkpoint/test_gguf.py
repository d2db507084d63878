"""GGUF weights: exact both ways, equal to gguf's own dequantisation and to transformers' own import."""

import logging

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from small_models import assert_same_model, random_checkpoint, small_config
from transformers import LlamaForCausalLM

from goldens import LANGUAGE_GOLDENS, golden, golden_folder
from internlm2 import load_model
from internlm2.checkpoint.formats import wqkv
from internlm2.checkpoint.gguf import read as gguf_read
from internlm2.checkpoint.gguf import write as gguf_write
from internlm2.checkpoint.gguf.names import QUANTISED
from internlm2.checkpoint.gguf.read import GGUFCheckpoint
from internlm2.checkpoint.gguf.write import write_gguf
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.save import save_checkpoint
from internlm2.errors import CheckpointError, ConfigError, ExportError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def small_gguf(path, *, architecture="llama", drop=(), quant=Quant.F32, tensors=None, **metadata):
    """Write a tiny GGUF by hand: one layer, hidden 256. drop: keys or tensors to leave out."""
    rows = {
        "token_embd": (32, 256),
        "output_norm": (256,),
        "blk.0.attn_norm": (256,),
        "blk.0.attn_q": (256, 256),
        "blk.0.attn_k": (128, 256),
        "blk.0.attn_v": (128, 256),
        "blk.0.attn_output": (256, 256),
        "blk.0.ffn_norm": (256,),
        "blk.0.ffn_gate": (256, 256),
        "blk.0.ffn_up": (256, 256),
        "blk.0.ffn_down": (256, 256),
    }
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "context_length": 64,
        "embedding_length": 256,
        "block_count": 1,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 64,
        "vocab_size": 32,
    }
    for key, value in (keys | {k: v for k, v in metadata.items() if isinstance(v, int)}).items():
        if key not in drop:
            writer.add_uint32(key if key.startswith("split.") else f"{architecture}.{key}", value)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
    if "eps" not in drop:
        writer.add_layer_norm_rms_eps(1e-5)
    generator = np.random.default_rng(0)
    for name, shape in (rows | (tensors or {})).items():
        if name in drop:
            continue
        if len(shape) == 1 or quant == Quant.F32:
            writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32) * 0.05)
        else:
            byte_shape = gguf.quant_shape_to_byte_shape(shape, quant)
            data = generator.integers(0, 256, byte_shape, dtype=np.uint8)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LANGUAGE_GOLDENS)
def test_safetensors_to_gguf_and_back_is_bit_exact(name, dtype, tmp_path):
    save_checkpoint(open_checkpoint(golden_folder(name)), tmp_path / "source", dtype=DTYPES[dtype])
    source = open_checkpoint(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf", dtype=dtype)
    save_checkpoint(open_checkpoint(tmp_path / "model.gguf"), tmp_path / "back", dtype=DTYPES[dtype])
    assert_same_model(open_checkpoint(tmp_path / "back"), source)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 10}, {"bias": True}])
def test_every_shape_survives(changes, tmp_path):
    original = random_checkpoint(small_config(bos_token_id=None, pad_token_id=7, **changes))
    write_gguf(original, tmp_path / "model.gguf", dtype="float32")
    assert_same_model(GGUFCheckpoint(tmp_path / "model.gguf"), original)
    architecture = gguf.GGUFReader(tmp_path / "model.gguf").fields["general.architecture"].contents()
    assert architecture == ("llama" if changes else "internlm2")


@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"head_dim": 10}, {"num_key_value_heads": 1}])
def test_transformers_own_import_computes_the_same(changes, tmp_path):
    """Tied, so that the file is of architecture `llama`, which transformers knows how to un-permute."""
    config = small_config(tie_word_embeddings=True, **changes)
    write_gguf(random_checkpoint(config), tmp_path / "model.gguf", dtype="float32")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.arange(30)[None]
    if config.bias:  # transformers forgets attention_bias when it reads a GGUF, so compare the matrices alone
        read = GGUFCheckpoint(tmp_path / "model.gguf")
        for layer, block in enumerate(theirs.model.layers):
            parts = wqkv.split(read.read(f"model.layers.{layer}.attention.wqkv.weight"), config)
            assert torch.equal(parts.q, block.self_attn.q_proj.weight)
            assert torch.equal(parts.k, block.self_attn.k_proj.weight)
        return
    with torch.no_grad():
        expected, found = theirs(ids).logits, load_model(tmp_path / "model.gguf")(ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_forgotten_permutation_would_be_seen(tmp_path, monkeypatch):
    """Negative control: without putting the rotary halves back, the official logits are missed by far."""
    write_gguf(open_checkpoint(golden_folder("gqa")), tmp_path / "model.gguf", dtype="float32")
    tensors = golden("gqa")
    ids, expected = tensors["forward.33.input_ids"], tensors["forward.33.logits"]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "model.gguf")(ids), expected, atol=1e-4, rtol=0)
        monkeypatch.setattr(gguf_read.wqkv, "half_split_rows", lambda rows, num_heads: rows)
        assert (load_model(tmp_path / "model.gguf")(ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gqa", "six-groups"])
def test_q8_0_holds_what_gguf_itself_makes_of_the_rows(name, tmp_path):
    original = open_checkpoint(golden_folder(name))
    write_gguf(original, tmp_path / "model.gguf", dtype="q8_0")
    found = GGUFCheckpoint(tmp_path / "model.gguf")
    for tensor in original.tensors:
        values = original.read(tensor)
        if (
            values.dim() == 2 and values.shape[1] % 32 == 0
        ):  # blocks run along rows, so row order does not matter
            quantised = gguf.quants.quantize(values.numpy(), Quant.Q8_0)
            values = torch.from_numpy(gguf.quants.dequantize(quantised, Quant.Q8_0))
        elif values.dim() == 2:
            values = values.half()
        assert torch.equal(found.read(tensor), values), tensor


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # gguf on random scales
@pytest.mark.parametrize("quant", [*QUANTISED, Quant.F16, Quant.BF16], ids=lambda q: q.name)
def test_every_number_format_is_read_as_gguf_reads_it(quant, tmp_path):
    path = small_gguf(tmp_path / "model.gguf", quant=quant)
    found = GGUFCheckpoint(path)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}

    def expected(name):
        tensor = stored[f"{name}.weight"]
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))

    def bits(tensor):
        assert tensor.dtype == {Quant.F16: torch.float16, Quant.BF16: torch.bfloat16}.get(
            quant, torch.float32
        )
        return tensor.float().nan_to_num(7.0)  # random bytes make some scales NaN

    layer = "model.layers.0"
    w2 = bits(found.read(f"{layer}.feed_forward.w2.weight"))
    assert torch.equal(w2, expected("blk.0.ffn_down").nan_to_num(7.0))
    parts = wqkv.split(bits(found.read(f"{layer}.attention.wqkv.weight")), found.config)
    assert torch.equal(parts.v, expected("blk.0.attn_v").nan_to_num(7.0))
    # Undo the permutation in the words of llama.cpp's converter, which made it.
    heads = expected("blk.0.attn_q").nan_to_num(7.0).numpy().reshape(4, 32, 2, 256).swapaxes(1, 2)
    assert np.array_equal(parts.q.numpy(), heads.reshape(256, 256))


def test_rounding_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="internlm2"):
        write_gguf(open_checkpoint(golden_folder("gqa")), tmp_path / "model.gguf", dtype="bfloat16")
    assert "were rounded" in caplog.text


def test_dynamic_scaling_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="internlm2"):
        write_gguf(open_checkpoint(golden_folder("dynamic-ntk")), tmp_path / "model.gguf", dtype="float32")
    assert "exact up to 64 tokens" in caplog.text


def test_values_beyond_float16_are_refused_and_nothing_stays(tmp_path):
    checkpoint = random_checkpoint(small_config())
    with torch.no_grad():
        checkpoint.read("model.layers.1.feed_forward.w1.weight")[3, 4] = 1e6
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_gate\.weight holds values up to 1e\+06.*bfloat16"):
        write_gguf(checkpoint, tmp_path / "model.gguf", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path):
    checkpoint = random_checkpoint(small_config())
    alive, most = [], 0

    class Watched:
        path, config, tensors = checkpoint.path, checkpoint.config, checkpoint.tensors
        tokenizer_folder = None

        def read(self, name):
            nonlocal most
            import weakref

            tensor = checkpoint.read(name).clone()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

    write_gguf(Watched(), tmp_path / "model.gguf", dtype="float32")
    assert len(alive) == len(checkpoint.tensors)
    assert most <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: write_gguf(random_checkpoint(small_config()), p, dtype="int4"), "dtype 'int4'"),
        (lambda p: write_gguf(open_checkpoint(golden_folder("reward")), p, dtype="float32"), "reward head"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(call, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        call(tmp_path / "model.gguf")


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        write_gguf(random_checkpoint(small_config()), tmp_path / "model.gguf", dtype="float32")
    assert (tmp_path / "model.gguf").read_text() == "mine"


@pytest.mark.parametrize("keep", [0, 3, 10, 40, 300, 900, 1500, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused_wherever_it_is_cut(keep, tmp_path):
    path = small_gguf(tmp_path / "model.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(CheckpointError, match="truncated"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("position", [4, 8, 16, 24, 60])
def test_a_damaged_header_is_refused(position, tmp_path):
    path = small_gguf(tmp_path / "model.gguf")
    content = bytearray(path.read_bytes())
    content[position : position + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"truncated or damaged|is damaged"):
        GGUFCheckpoint(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(CheckpointError, match="no GGUF file"):
        GGUFCheckpoint(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="does not exist"):
        GGUFCheckpoint(tmp_path / "absent.gguf")


def test_the_other_byte_order_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="other byte order"):
        GGUFCheckpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architecture": "qwen2"}, CheckpointError, "architecture 'qwen2'"),
        ({"split.count": 3}, CheckpointError, "one of 3 parts.*llama-gguf-split --merge"),
        ({"quant": Quant.TQ1_0}, CheckpointError, "stored as TQ1_0"),
        ({"expert_count": 8}, ConfigError, "expert_count is 8"),
        ({"attention.sliding_window": 4096}, ConfigError, "sliding_window is 4096"),
        ({"attention.value_length": 32}, ConfigError, "value_length is 32"),
        ({"rope.dimension_count": 32}, ConfigError, "rope.dimension_count is 32"),
        ({"rope.scaling.type": "yarn"}, ConfigError, "rope.scaling.type is 'yarn'"),
        ({"tensors": {"rope_freqs": (32,)}}, ConfigError, "rotary frequencies of its own"),
        ({"drop": ("embedding_length",)}, CheckpointError, "embedding_length is missing"),
        ({"drop": ("eps",)}, CheckpointError, "layer_norm_rms_epsilon is missing"),
        ({"block_count": "one"}, CheckpointError, "block_count is 'one', but must be a whole number"),
        ({"rope.freq_base": "big"}, CheckpointError, "freq_base is 'big', but must be a number"),
        ({"attention.head_count_kv": 3}, ConfigError, "multiple of num_key_value_heads"),
        ({"drop": ("blk.0.attn_v",)}, CheckpointError, r"blk\.0\.attn_v\.weight is missing"),
        ({"tensors": {"blk.0.attn_v": (64, 256)}}, CheckpointError, r"attn_v\.weight has shape \[64, 256\]"),
        ({"tensors": {"blk.0.attn_q_norm": (64,)}}, CheckpointError, "attn_q_norm.weight has no place"),
    ],
)
def test_what_internlm2_cannot_be_is_refused_by_name(changes, error, message, tmp_path):
    changes = dict(changes)
    if changes.get("block_count") == "one":
        changes["drop"] = ("block_count",)
    with pytest.raises(error, match=message):
        GGUFCheckpoint(small_gguf(tmp_path / "model.gguf", **changes))


def test_linear_scaling_under_its_old_and_new_key(tmp_path):
    old = GGUFCheckpoint(small_gguf(tmp_path / "old.gguf", **{"rope.scale_linear": 4.0}))
    new = GGUFCheckpoint(
        small_gguf(tmp_path / "new.gguf", **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    )
    assert old.config.rope_scaling == new.config.rope_scaling
    assert new.config.rope_scaling is not None
    assert new.config.rope_scaling.factor == 4.0


def test_a_file_without_tokenizer_has_no_tokenizer_folder(tmp_path):
    assert GGUFCheckpoint(small_gguf(tmp_path / "model.gguf")).tokenizer_folder is None


def test_tensors_are_written_in_the_planned_order_and_size(tmp_path):
    config = small_config()
    plan = gguf_write.plan_tensors(config, Quant.Q8_0)
    write_gguf(random_checkpoint(config), tmp_path / "model.gguf", dtype="q8_0")
    found = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    planned = [tensor for tensors in plan.values() for tensor in tensors]
    assert [(t.name, t.n_bytes) for t in found] == [(p.name, p.num_bytes) for p in planned]
