"""The twins of the GPU's kernels, against the network's own modules, torch's attention and exact arithmetic."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from internlm2.engine.compute.attend import attention_plain
from internlm2.kernels.gpu import attention, elementwise, fp8, linear, prefill, weight
from internlm2.kernels.gpu.available import runs_triton
from internlm2.model.layers import RMSNorm
from internlm2.model.rope import Rotary, rotate
from internlm2.quant import kv
from internlm2.quant.gpu import GpuLinear, gpu_weight
from internlm2.quant.weight import FORMATS, round_weight

PAGE = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_importing_and_using_the_twins_needs_neither_triton_nor_torchs_compiler():
    script = (
        "import sys, torch, internlm2.engine.compute.gpu_layers, internlm2.checkpoint.load_gpu;"
        "from internlm2.kernels.gpu import elementwise; elementwise.swiglu(torch.ones(1, 4));"
        "sys.exit(any(name in sys.modules for name in ('triton', 'torch._dynamo')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert not runs_triton(torch.ones(1))


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_rows_attend_as_a_dense_softmax_does(kv_dtype):
    lengths, group = [1, 9, 0, 16], 3
    keys, values = torch.randn(2, 15 * PAGE, 2, 10)
    scales = ()
    dense = keys, values
    if kv_dtype:
        (keys, key_scales), (values, value_scales) = kv.quantize(keys), kv.quantize(values)
        scales = key_scales, value_scales
        dense = (keys * key_scales[..., None]), (values * value_scales[..., None])
    pages = attention.LayerPages(keys, values, PAGE, *scales)
    table = torch.randperm(15)[:12].view(4, 3).to(torch.int32)
    table = F.pad(table, (0, 1), value=13)
    q = torch.randn(4, 2 * group, 10)
    out = attention.attend_rows(q, pages, table, torch.tensor(lengths, dtype=torch.int32), scale=0.3)
    for row, length in enumerate(lengths):
        slots = [int(table[row, p // PAGE]) * PAGE + p % PAGE for p in range(length)]
        if length:
            k, v = (block[slots] for block in dense)
            expected, _ = attention_plain(q[row : row + 1], k, v, scale=0.3)
            torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-5, atol=1e-5)
        else:
            assert (out[row] == 0).all()


@pytest.mark.parametrize(
    ("rows", "heads", "sms", "splits"),
    [(1, 8, 132, 32), (2, 8, 132, 16), (8, 8, 132, 4), (32, 8, 132, 1), (64, 8, 132, 1), (1, 2, 16, 16)],
)
def test_keys_are_cut_so_that_every_multiprocessor_has_work(rows, heads, sms, splits):
    assert attention.plan_splits(rows, heads, sms) == splits


@pytest.mark.parametrize(
    ("rows", "tiles", "sms", "plan"),
    [
        (92544, 128, 132, (64, 1)),
        (28672, 64, 132, (64, 1)),
        (6144, 64, 132, (32, 2)),
        (4096, 224, 132, (32, 3)),
        (2048, 3, 132, (32, 1)),
        (32, 64, 132, (32, 8)),
    ],
)
def test_products_are_cut_so_that_every_multiprocessor_has_work(rows, tiles, sms, plan):
    assert linear.plan_product(rows, tiles, sms) == linear.Plan(*plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_the_networks(dtype):
    module = RMSNorm(33, 1e-5)
    torch.nn.init.normal_(module.weight)
    module.to(dtype)
    x, add = torch.randn(2, 5, 33).to(dtype)
    stream, out = elementwise.rms_norm(x, module.weight, eps=1e-5, add=add)
    assert torch.equal(stream, x + add)
    assert torch.equal(out, module(x + add))
    assert elementwise.rms_norm(x, module.weight, eps=1e-5)[0] is x


def test_swiglu_is_the_networks():
    gate, value = torch.randn(2, 5, 33)
    found = elementwise.swiglu(torch.cat((gate, value), dim=1))
    torch.testing.assert_close(found, F.silu(gate) * value)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_rotation_is_the_networks_and_padding_writes_nothing(kv_dtype):
    keys, values = torch.full((2, 20, 2, 6), 7.0)
    scales = ()
    if kv_dtype:
        keys, values = keys.to(torch.int8), values.to(torch.int8)
        scales = torch.full((20, 2), 9.0), torch.full((20, 2), 9.0)
    pages = attention.LayerPages(keys, values, PAGE, *scales)
    qkv = torch.randn(3, 2 * (3 + 2) * 6)
    angles = torch.randn(3, 3).repeat(1, 2)
    slots = torch.tensor([11, -1, 4])
    found = elementwise.rotate_and_store(qkv, angles.cos(), angles.sin(), pages, slots)
    parts = qkv.view(3, 1, 2, 5, 6)
    turned = rotate(parts.flatten(2, 3), Rotary(angles.cos()[:, None], angles.sin()[:, None]))
    turned = turned.view(3, 2, 5, 6)
    torch.testing.assert_close(found, turned[:, :, :3].flatten(1, 2))
    for own, block, own_scales in zip(
        (turned[:, :, 3], parts[:, 0, :, 4]), (keys, values), scales or (None, None), strict=True
    ):
        if own_scales is None:
            torch.testing.assert_close(block[slots[[0, 2]]], own[[0, 2]])
        else:
            expected, expected_scales = kv.quantize(own[[0, 2]])
            assert torch.equal(block[slots[[0, 2]]], expected)
            torch.testing.assert_close(own_scales[slots[[0, 2]]], expected_scales)
        others = [slot for slot in range(20) if slot not in (11, 4)]
        assert (block[others] == 7).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(5, 64), (33, 100), (16, 384)])
def test_packing_keeps_every_number(kind, shape):
    fmt, group = FORMATS[kind], 96 if shape[1] == 384 else 32
    q, scales, zeros = round_weight(torch.randn(shape), fmt, group)
    packed = weight.pack(q, scales, zeros, group=group)
    exact = q.float()
    if zeros is not None:
        exact = exact - zeros.repeat_interleave(group, 1)[:, : shape[1]].float() / 16
    exact = exact * scales.repeat_interleave(group, 1)[:, : shape[1]].float()
    assert torch.equal(weight.unpack(packed), exact)
    twice = weight.join(packed, weight.pack(q.flip(0), scales.flip(0), zeros, group=group))
    assert torch.equal(weight.unpack(twice)[: shape[0]], exact)
    bits = 8 * packed.num_bytes / exact.numel()
    if shape == (16, 384):
        assert bits == (8.5 if kind == "int8" else 4.75)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("num_rows", [1, 7, 65])  # beyond 64 the weights are unpacked
def test_products_are_near_those_of_the_weights(kind, num_rows):
    plain, bias = torch.randn(48, 96), torch.randn(48)
    module = GpuLinear(gpu_weight(plain, kind), bias=bias)
    x = torch.randn(num_rows, 1, 96)
    expected = F.linear(x, plain, bias)
    error = (module(x) - expected).norm() / (expected - bias).norm()
    assert error < {"int8": 0.01, "int4": 0.1, "fp8": 0.05}[kind]
    assert module(x).dtype == x.dtype


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e4])
def test_e4m3_rows_are_torchs_rounding(scale):
    x = torch.randn(4, 64) * scale
    x[1] = 0
    rounded, scales = fp8.quantize_rows(x)
    assert rounded.float().abs().amax(1).tolist() == [448, 0, 448, 448]
    torch.testing.assert_close(rounded.float() * scales, x, rtol=0.0626, atol=float(scales.max()) * 2**-9)


@pytest.mark.parametrize("shape", [(2, 1, 8), (2, 3, 10)])  # K, G, D
def test_prompts_attend_as_a_plain_softmax_does(shape):
    num_kv_heads, group, head_dim = shape
    prompts = [prefill.Prompt(0, 9, 30), prefill.Prompt(9, 12, 12), prefill.Prompt(30, 1, 17)]
    q = torch.randn(22, num_kv_heads * group, head_dim)
    k, v = torch.randn(2, 59, num_kv_heads, head_dim)
    found = prefill.attend_prompts(q, k, v, prompts, scale=0.2, method="sdpa")
    row = key = 0
    for prompt in prompts:
        for own in range(prompt.num_rows):
            seen = key + prompt.num_keys - prompt.num_rows + own + 1
            expected, _ = attention_plain(q[row : row + 1], k[key:seen], v[key:seen], scale=0.2)
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)
            row += 1
        key += prompt.num_keys


def test_long_prompts_are_attended_in_blocks(monkeypatch):
    prompts = [prefill.Prompt(0, 40, 50)]
    q, k, v = torch.randn(40, 2, 8), torch.randn(50, 1, 8), torch.randn(50, 1, 8)
    whole = prefill.attend_prompts(q, k, v, prompts, scale=0.3, method="sdpa")
    monkeypatch.setattr(prefill, "_MANY_KEYS", 45)
    monkeypatch.setattr(prefill, "_QUERIES_AT_ONCE", 16)
    blocks = prefill.attend_prompts(q, k, v, prompts, scale=0.3, method="sdpa")
    torch.testing.assert_close(blocks, whole)


def test_several_prompts_are_one_call_of_flash_attention(monkeypatch):
    """torch's function is for GPUs, so a double with its signature shows what it is asked for."""
    from torch.nn.attention import varlen

    def double(q, k, v, bounds_q, bounds_k, max_q, max_k, *, scale, window_size, enable_gqa):  # noqa: PLR0917
        assert bounds_q.tolist() == [0, 9, 21]
        assert bounds_k.tolist() == [0, 30, 42]
        assert bounds_q.dtype == bounds_k.dtype == torch.int32
        assert (max_q, max_k, scale, window_size, enable_gqa) == (12, 30, 0.2, (-1, 0), True)
        return q + 1

    monkeypatch.setattr(varlen, "varlen_attn", double)
    prompts = [prefill.Prompt(0, 9, 30), prefill.Prompt(9, 12, 12)]
    q, k = torch.randn(21, 6, 8), torch.randn(42, 2, 8)
    found = prefill.attend_prompts(q, k, k, prompts, scale=0.2, method="varlen")
    assert torch.equal(found, q + 1)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "has_flash", "method"),
    [
        (torch.bfloat16, 128, (9, 0), True, "varlen"),
        (torch.float16, 80, (8, 0), True, "varlen"),
        (torch.float32, 128, (9, 0), True, "sdpa"),
        (torch.bfloat16, 128, (7, 5), True, "sdpa"),
        (torch.bfloat16, 128, (9, 0), False, "sdpa"),
        (torch.bfloat16, 84, (9, 0), True, "sdpa"),
        (torch.bfloat16, 512, (9, 0), True, "sdpa"),
        (torch.bfloat16, 128, None, False, "sdpa"),
    ],
)
def test_flash_attention_is_chosen_where_it_runs(dtype, head_dim, capability, has_flash, method):
    assert prefill.choose_method(dtype, head_dim, capability=capability, has_flash=has_flash) == method
    assert prefill.method_for(torch.zeros(1, 1, 8)) == "sdpa"
