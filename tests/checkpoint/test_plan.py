"""The plan against what it plans: published numbers, torch's own counts, tensors that exist, and the page."""

import json
import weakref
from dataclasses import replace

import pytest
import quantized_folders
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from goldens import golden_folder
from internlm2.checkpoint import describe as describe_module
from internlm2.checkpoint.describe import describe
from internlm2.checkpoint.inference import choose_weights
from internlm2.checkpoint.memory import available_on
from internlm2.checkpoint.plan import (
    KV_DTYPES,
    Plan,
    activation_bytes,
    context_limit,
    kv_bytes_per_token,
    longest_context,
    plan,
)
from internlm2.engine.compute.page_cache import PageCache
from internlm2.errors import CheckpointError, ConfigError, InternLM2Error, RequestError
from internlm2.model.config import PRESETS, ModelConfig, RopeScaling, preset
from internlm2.model.heads import CausalLM, build_model
from reference.dense_cache import DenseCache

KIB = 1 << 10
SMALL = ModelConfig(
    vocab_size=90, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
CONFIGS = [
    SMALL,
    replace(SMALL, tie_word_embeddings=True),
    replace(SMALL, bias=True, intermediate_size=200),
    replace(SMALL, head="reward", num_attention_heads=24, head_dim=16),
    replace(SMALL, head="classification", num_labels=5, num_key_value_heads=1, head_dim=4),
]


def last_logits(model, ids: torch.Tensor, attend, **options) -> torch.Tensor:
    return model.logits(model.hidden_states(ids, attend=attend, **options)[:, -1:])


def no_attention(q, k, v, meta):
    return torch.empty_like(q)


# Worked out by hand beside the H100 roofline: G parameters, G of them in products for a token, KiB of keys and values
# a token, GFLOP a prompt token, GB of keys and values and PFLOP at 200,000 tokens.
ROOFLINE = {
    "1.8b": (1.889, 1.699, 96, 3.02, 19.7, 4.5),
    "7b": (7.738, 7.358, 128, 13.96, 26.2, 13.3),
    "20b": (19.861, 19.292, 192, 37.45, 39.3, 31.1),
}


class TestPublishedNumbers:
    @pytest.mark.parametrize("size", ROOFLINE)
    def test_the_roofline_of_the_three_sizes(self, size):
        config = preset(size)
        one, two, long = (plan(config, num_tokens=n) for n in (1, 2, 200_000))
        flops = long.prefill_linear_flops + long.prefill_attention_flops
        assert ROOFLINE[size] == (
            round(long.weight_bytes / 2e9, 3),
            round(long.decode_linear_flops / 2e9, 3),
            long.kv_bytes_per_token / KIB,
            round((two.prefill_linear_flops - one.prefill_linear_flops) / 1e9, 2),
            round(long.kv_bytes / 1e9, 1),
            round(flops / 1e15, 1),
        )
        norm_bytes = 2 * (2 * config.num_hidden_layers + 1) * config.hidden_size
        assert long.decode_read_bytes == long.decode_linear_flops + norm_bytes + long.kv_bytes

    def test_attention_is_79_percent_of_a_7b_at_200k(self):
        found = plan(preset("7b"), num_tokens=200_000)
        share = found.prefill_attention_flops / (found.prefill_attention_flops + found.prefill_linear_flops)
        assert round(share, 2) == 0.79
        assert found.kv_bytes == 26_214_400_000

    @pytest.mark.parametrize(("num_tokens", "per_second"), [(4_096, 220), (32_768, 176), (200_000, 82)])
    def test_decoding_a_7b_at_the_bandwidth_of_an_h100(self, num_tokens, per_second):
        assert round(3.35e12 / plan(preset("7b"), num_tokens=num_tokens).decode_read_bytes) == per_second


class TestFlops:
    @pytest.mark.parametrize("config", CONFIGS[:3])
    def test_linear_flops_are_what_torch_counts(self, config):
        model = CausalLM(config)
        found = plan(config, num_tokens=7)
        for num_tokens, expected in ((7, found.prefill_linear_flops), (1, found.decode_linear_flops)):
            with FlopCounterMode(display=False) as counter:
                last_logits(model, torch.zeros(1, num_tokens, dtype=torch.long), no_attention)
            assert counter.get_total_flops() == expected

    def test_the_attention_of_one_token_is_what_torch_counts(self):
        num_tokens = 11

        def over_the_context(q, k, v, meta):
            keys = torch.ones(SMALL.num_attention_heads, num_tokens, SMALL.head_dim)
            return ((q[0].transpose(0, 1) @ keys.transpose(1, 2)) @ keys).transpose(0, 1)[None]

        with FlopCounterMode(display=False) as counter:
            last_logits(CausalLM(SMALL), torch.zeros(1, 1, dtype=torch.long), over_the_context)
        found = plan(SMALL, num_tokens=num_tokens)
        assert counter.get_total_flops() == found.decode_linear_flops + found.decode_attention_flops

    def test_prefill_attention_is_the_sum_over_positions(self):
        heads, width, layers = SMALL.num_attention_heads, SMALL.head_dim, SMALL.num_hidden_layers
        total = 0
        for _ in range(layers):
            for position in range(13):
                for _key in range(position + 1):
                    total += heads * (2 * width + 2 * width)
        assert plan(SMALL, num_tokens=13).prefill_attention_flops == total


class TestMemory:
    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_weights_are_the_bytes_of_a_model_that_exists(self, config, dtype):
        model = build_model(config).to(getattr(torch, dtype))
        held = sum(p.nbytes for p in model.parameters())
        found = plan(config, num_tokens=1, dtype=dtype)
        assert found.weight_bytes == held
        assert found.total_bytes == held + found.kv_bytes + found.activation_bytes
        is_tied = config.tie_word_embeddings
        table = 0 if is_tied else model.model.tok_embeddings.weight.nbytes
        assert found.decode_read_bytes == held - table + found.kv_bytes

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_keys_and_values_are_the_bytes_of_a_cache_that_exists(self, dtype):
        where = {"dtype": getattr(torch, dtype), "device": torch.device("cpu")}
        dense = DenseCache(SMALL, num_rows=3, capacity=48, **where)
        found = plan(SMALL, num_tokens=48, num_sequences=3, dtype=dtype)
        assert found.kv_bytes == dense.keys.nbytes + dense.values.nbytes
        for kv_dtype in (None, "int8"):
            pages = PageCache(SMALL, num_pages=9, page_size=16, kv_dtype=kv_dtype, **where)
            found = plan(SMALL, num_tokens=48, num_sequences=3, dtype=dtype, kv_dtype=kv_dtype)
            assert found.kv_bytes == pages.num_bytes

    def test_int8_has_one_float32_scale_a_token_and_head_for_keys_and_for_values(self):
        for name, config in PRESETS.items():
            shape = (config.num_hidden_layers, 1, config.num_key_value_heads)
            block = torch.empty(*shape, config.head_dim, dtype=torch.int8, device="meta")
            scales = torch.empty(shape, device="meta")
            assert kv_bytes_per_token(config, "int8") == 2 * (block.nbytes + scales.nbytes), name

    @pytest.mark.parametrize("config", CONFIGS[:3])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_working_memory_bounds_what_a_forward_pass_holds_from_above(self, config, dtype):
        model = CausalLM(config).to(getattr(torch, dtype))
        peak_bytes = peak_bytes_of(model, num_tokens=96)
        planned = activation_bytes(config, num_rows=96, num_kept_rows=1, dtype=dtype)
        assert peak_bytes <= planned <= 1.25 * peak_bytes

    def test_working_memory_is_tight_for_the_published_proportions(self):
        config = ModelConfig(
            vocab_size=512, hidden_size=256, intermediate_size=896, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=2,
        )  # fmt: skip
        model = CausalLM(config).to(torch.bfloat16)
        peak_bytes = peak_bytes_of(model, num_tokens=64)
        planned = activation_bytes(config, num_rows=64, num_kept_rows=1, dtype="bfloat16")
        assert peak_bytes <= planned <= 1.02 * peak_bytes

    def test_a_chunk_holds_no_more_tokens_than_there_are(self):
        few, many, more = (plan(SMALL, num_tokens=n).activation_bytes for n in (10, 512, 5_000))
        assert few < many == more
        assert plan(SMALL, num_tokens=10, num_sequences=60).activation_bytes > many  # 60 rows of logits

    def test_two_ranks_hold_half_the_heads_and_the_whole_norms_and_embedding(self):
        whole, part = (plan(SMALL, num_tokens=32, tensor_parallel=n) for n in (1, 2))
        assert 2 * part.kv_bytes == whole.kv_bytes
        shared = SMALL.hidden_size * (SMALL.vocab_size + 2 * SMALL.num_hidden_layers + 1)
        assert part.weight_bytes == (whole.weight_bytes + 2 * shared) // 2
        assert part.decode_read_bytes < whole.decode_read_bytes
        assert part.prefill_linear_flops == whole.prefill_linear_flops
        assert part.activation_bytes < whole.activation_bytes

    def test_the_fullest_rank_counts_where_sizes_are_odd(self):
        odd = replace(SMALL, intermediate_size=41, vocab_size=91)
        even = replace(SMALL, intermediate_size=42, vocab_size=92)
        parts = [plan(config, num_tokens=1, tensor_parallel=2) for config in (odd, even)]
        embedding_row = 2 * SMALL.hidden_size
        assert parts[0].weight_bytes == parts[1].weight_bytes - embedding_row
        tied = plan(replace(odd, tie_word_embeddings=True), num_tokens=1, tensor_parallel=2)
        assert tied.decode_read_bytes == parts[0].decode_read_bytes


def peak_bytes_of(model, *, num_tokens: int) -> int:
    """The most that a forward pass holds besides weights, ids and positions; attention itself left out."""
    ids, positions = torch.zeros(1, num_tokens, dtype=torch.long), torch.arange(num_tokens)[None]
    limits = torch.tensor([num_tokens])
    with torch.no_grad(), PeakBytes([*model.parameters(), ids, positions, limits]) as memory:
        last_logits(model, ids, no_attention, position_ids=positions, length_limits=limits)
    return memory.peak_bytes


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive that are made inside it. known: tensors that do not count."""

    def __init__(self, known) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._now = self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self._now)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return out

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._now -= num_bytes


class TestLongestContext:
    @given(
        config=st.sampled_from(CONFIGS),
        memory_bytes=st.integers(-10, 3_000_000),
        options=st.fixed_dictionaries(
            {
                "num_sequences": st.integers(1, 40),
                "chunk_tokens": st.integers(1, 300),
                "dtype": st.sampled_from(["float32", "bfloat16"]),
                "kv_dtype": st.sampled_from([None, *KV_DTYPES]),
            }
        ),
    )
    @settings(deadline=None, max_examples=100)
    def test_it_fits_and_one_page_more_does_not(self, config, memory_bytes, options):
        longest = longest_context(config, memory_bytes=memory_bytes, **options)
        assert longest % 16 == 0
        if longest:
            assert needed(plan(config, num_tokens=longest, **options)) <= memory_bytes
        assert needed(plan(config, num_tokens=longest + 16, **options)) > memory_bytes

    def test_a_second_rank_makes_room_for_more(self):
        one, two = (longest_context(SMALL, memory_bytes=1 << 20, tensor_parallel=n) for n in (1, 2))
        assert one < two

    def test_what_fits_on_a_card_of_80_gb(self):
        config = preset("20b")
        left = 80_000_000_000 - plan(config, num_tokens=1).weight_bytes
        as_weights, int8 = (longest_context(config, memory_bytes=left, kv_dtype=k) for k in (None, "int8"))
        assert 200_000 < as_weights < 210_000
        assert int8 > 390_000

    def test_the_model_itself_allows(self):
        assert context_limit(SMALL) == 64
        assert context_limit(replace(SMALL, rope_scaling=RopeScaling("linear", 2.5))) == 160
        assert context_limit(replace(SMALL, rope_scaling=RopeScaling("dynamic", 2.0))) is None


def needed(found: Plan) -> int:
    return found.kv_bytes + found.activation_bytes


COUNT = "must be a whole number from 1 to 2147483648"


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (RequestError, f"context is 0, but {COUNT}", {"num_tokens": 0}),
        (RequestError, f"context is 1.5, but {COUNT}", {"num_tokens": 1.5}),
        (RequestError, f"context is 4294967296, but {COUNT}", {"num_tokens": 1 << 32}),
        (RequestError, f"num_sequences is -1, but {COUNT}", {"num_sequences": -1}),
        (RequestError, f"chunk_tokens is 0, but {COUNT}", {"chunk_tokens": 0}),
        (RequestError, f"tensor_parallel is True, but {COUNT}", {"tensor_parallel": True}),
        (ConfigError, "2 key/value heads, which cannot be shared out evenly over 4", {"tensor_parallel": 4}),
        (
            CheckpointError,
            "dtype is 'int8', but must be one of float32, bfloat16, float16",
            {"dtype": "int8"},
        ),
        (
            RequestError,
            "kv_dtype is 'int4', but must be one of float32, bfloat16, float16, int8",
            {"kv_dtype": "int4"},
        ),
        (RequestError, "kv_dtype is ''", {"kv_dtype": ""}),
    ],
)
def test_what_cannot_be_planned_is_explained(error, message, options):
    with pytest.raises(InternLM2Error, match=message) as caught:
        plan(SMALL, **({"num_tokens": 5} | options))
    assert type(caught.value) is error
    if "num_tokens" not in options:
        with pytest.raises(error, match=message):
            longest_context(SMALL, memory_bytes=1 << 20, **options)


class TestDescribe:
    def test_wrong_options_are_told_before_a_model_is_looked_for(self):
        for options in (
            {"context": 0},
            {"dtype": "int3"},
            {"kv_dtype": "int3"},
            {"num_sequences": 0},
            {"device": "x"},
        ):
            with pytest.raises(InternLM2Error, match=f"{next(iter(options))} is"):
                describe("nowhere", **options)

    @pytest.mark.parametrize("name", ["7b", "7B", "internlm2-7b", "InternLM2-7B"])
    def test_a_published_shape_needs_no_files(self, name):
        data = describe(name, context=200_000, kv_dtype="int8").as_json()
        assert data["name"] == "InternLM2 7B"
        assert data["plan"]["kv_bytes"] == 67_584 * 200_000
        assert data["context_limit"] == 32_768

    @pytest.mark.parametrize(
        ("available", "texts"),
        [
            (None, ["cpu does not tell what is available"]),
            (1 << 30, ["has 1.00 GiB available: does not fit, 37.88 GiB too little", "none: the weights leave no room"]),
            (80 << 30, ["fits, 41.12 GiB to spare", "536,816 tokens in bfloat16, 1,041,104 tokens in int8"]),
        ],
    )  # fmt: skip
    def test_the_verdict_depends_on_what_the_machine_has(self, available, texts, monkeypatch):
        monkeypatch.setattr(describe_module.memory, "available_on", lambda device: available)
        data = describe("7b", context=200_000, device="cpu")
        for text in texts:
            assert text in data.as_text()
        assert ("longest" in data.as_text()) == (available is not None)
        machine = data.as_json()["machine"]
        assert machine["fits"] is {None: None, 1 << 30: False, 80 << 30: True}[available]
        assert json.loads(json.dumps(data.as_json()))["machine"] == machine

    def test_a_context_beyond_what_the_model_is_made_for_is_noted(self):
        assert "made for 32,768 tokens" in describe("7b", context=32_769).as_text()
        assert "made for" not in describe("7b").as_text()
        assert "made for" not in describe(str(golden_folder("dynamic-ntk")), context=10**6).as_text()

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_it_says_how_the_loader_would_hold_the_weights_unasked(self, dtype, tmp_path):
        for path, is_quantized in (("7b", False), (str(quantized_folders.write(tmp_path / "int8")), True)):
            data = describe(path, dtype=dtype, device="cpu")
            expected = choose_weights(wanted="auto", dtype=dtype, device="cpu", is_quantized=is_quantized)
            assert expected.packed_as == "own" or not is_quantized
            assert data.as_json()["weights"] == {
                "dtype": dtype, "packed_as": expected.packed_as, "why": expected.why,
            }  # fmt: skip
            assert f"\n  unasked, weights are {expected.held}\n" in data.as_text()

    def test_several_sequences_share_what_there_is(self):
        text = describe("tiny", num_sequences=3, context=1 << 31).as_text()
        assert "Plan: 3 sequences of 2,147,483,648 tokens" in text
        assert "tokens each in int8" in text

    def test_only_a_cpu_or_gpu_tells_what_it_has(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 10))  # free, all
        assert available_on(torch.device("cuda")) == 7
        assert available_on(torch.device("meta")) is None
