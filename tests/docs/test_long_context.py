"""docs/long-context.md holds no number that the code does not give."""

from dataclasses import replace
from pathlib import Path

import torch

from internlm2.checkpoint import describe as describe_module
from internlm2.checkpoint.describe import describe
from internlm2.checkpoint.memory import GIB
from internlm2.checkpoint.plan import Plan, plan
from internlm2.model.config import ModelConfig, RopeScaling, preset
from internlm2.model.rope import inverse_frequencies

PAGE = (Path(__file__).parents[2] / "docs" / "long-context.md").read_text(encoding="utf-8")
SIZES = ("1.8b", "7b", "20b")
LENGTHS = (4_096, 32_768, 200_000, 1_000_000)


def rows(*lines: list[str]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def planned(size: str, num_tokens: int, kv_dtype: str) -> Plan:
    return plan(preset(size), num_tokens=num_tokens, kv_dtype=kv_dtype)


def memory_rows(field: str) -> str:
    return rows(
        *[
            [f"{n:,}"]
            + [
                f"{getattr(planned(size, n, kv_dtype), field) / GIB:.2f}"
                for size in SIZES
                for kv_dtype in ("bfloat16", "int8")
            ]
            for n in LENGTHS
        ]
    )


def fixed_rows() -> str:
    plans = [planned(size, 4_096, "bfloat16") for size in SIZES]
    return rows(
        ["weights"] + [f"{p.weight_bytes / GIB:.2f} GiB" for p in plans],
        ["working memory"] + [f"{p.activation_bytes / GIB:.2f} GiB" for p in plans],
        ["a token in bfloat16"] + [f"{p.kv_bytes_per_token:,} bytes" for p in plans],
        ["a token in int8"] + [f"{planned(size, 1, 'int8').kv_bytes_per_token:,} bytes" for size in SIZES],
    )


def work_rows() -> str:
    lines = []
    for size in SIZES:
        for n in LENGTHS:
            p, int8 = (planned(size, n, kv_dtype) for kv_dtype in ("bfloat16", "int8"))
            prefill = p.prefill_linear_flops + p.prefill_attention_flops
            lines.append(
                [
                    size.upper(),
                    f"{n:,}",
                    f"{p.prefill_linear_flops / 1e12:,.0f}",
                    f"{p.prefill_attention_flops / 1e12:,.0f}",
                    f"{p.prefill_attention_flops / prefill:.0%}".replace("%", " %"),
                    f"{(p.decode_linear_flops + p.decode_attention_flops) / 1e9:,.1f}",
                    f"{p.decode_read_bytes / 1e9:.2f}",
                    f"{int8.decode_read_bytes / 1e9:.2f}",
                ]
            )
    return rows(*lines)


def rotary_base(config: ModelConfig, length_limit: int) -> float:
    second = inverse_frequencies(config, torch.tensor([length_limit]))[0, 1].double()
    return float(second ** (-config.head_dim / 2))


def base_rows() -> str:
    lines = []
    for factor in (1.0, 2.0, 3.0):
        config = replace(preset("7b"), rope_scaling=RopeScaling("dynamic", factor))
        bases = [f"{rotary_base(config, n) / 1e6:.3f}" for n in (32_768, 65_536, 131_072, 200_000, 1_000_000)]
        lines.append([f"{factor:g}", *bases])
    return rows(*lines)


def test_the_memory_tables_are_what_the_plan_says():
    assert memory_rows("kv_bytes") in PAGE, memory_rows("kv_bytes")
    assert memory_rows("total_bytes") in PAGE, memory_rows("total_bytes")
    assert fixed_rows() in PAGE, fixed_rows()


def test_the_table_of_work_is_what_the_plan_says():
    assert work_rows() in PAGE, work_rows()


def test_the_rotary_bases_are_those_of_the_network():
    assert base_rows() in PAGE, base_rows()


def test_the_example_is_what_the_command_prints(monkeypatch):
    monkeypatch.setattr(describe_module.memory, "available_on", lambda device: 64 * GIB)
    printed = describe("7b", context=200_000, kv_dtype="int8", device="cpu").fit.as_text()
    assert f"```text\n{printed}\n```\n" in PAGE, printed
    assert "internlm2 model info 7b --context 200000 --kv-dtype int8\n" in PAGE


def test_no_table_row_escapes_the_tests():
    known = memory_rows("kv_bytes") + memory_rows("total_bytes") + fixed_rows() + work_rows() + base_rows()
    numbers = {
        line for line in PAGE.splitlines() if line.startswith("|") and any(c.isdigit() for c in line)
    } - set(known.splitlines())
    heads = {line for line in numbers if "bfloat16" in line or "1.8B" in line or "factor" in line}
    assert numbers == heads


def test_the_shares_that_the_page_names():
    int8, bfloat16, float32 = (planned("7b", 1, k).kv_bytes for k in ("int8", "bfloat16", "float32"))
    assert f"{int8 / bfloat16:.0%} {int8 / float32:.0%}" == "52% 26%"
    assert "52 % of the memory and of the reads in bfloat16, 26 % of float32" in " ".join(PAGE.split())
