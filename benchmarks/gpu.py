"""The GPU's kernels and the engine's steps on it, against what the card gives, and against transformers.

Run: python benchmarks/gpu.py, on a machine with an NVIDIA GPU, torch for CUDA and `pip install -e '.[dev]'`. Random
weights of the 7B shape. First all Triton kernels are compared with their twins. Every figure stands beside the copy
bandwidth and the matrix rate that were measured in the same run. `--shape`, `--long` and `--only` make it smaller.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hardware import RESULTS, header

from internlm2.checkpoint.inference import weight_bytes
from internlm2.engine.compute.batch import Part, make_batch
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.model.config import PRESETS, ModelConfig, preset
from internlm2.model.heads import CausalLM
from internlm2.quant.gpu import quantize_for_gpu

KINDS = ("bfloat16", "int8", "int4", "fp8")
PAGE, CONTEXT, STEPS, ROUNDS = 16, 512, 64, 5
BATCHES, PROMPTS, CHUNK = (1, 8, 32), (512, 2048, 32768), 8192
NO_GPU = (
    "benchmarks/gpu.py: torch finds no CUDA GPU here, so there is nothing to measure and gpu.md is not written. "
    "Run it on a machine with an NVIDIA GPU and torch for CUDA."
)


@dataclass(frozen=True)
class Card:
    """What the GPU gives: bytes copied (read and written) and bfloat16 operations, a second."""

    bytes_per_second: float
    flops_per_second: float


def seconds(work: Callable[[], object], device: torch.device, *, rounds: int = ROUNDS) -> list[float]:
    """Durations of `work`, sorted, after one round that is not counted."""
    times: list[float] = []
    for _ in range(rounds + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])


def wait(device: torch.device) -> None:
    """Until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_card(device: torch.device, *, num_bytes: int = 2 << 30, side: int = 8192) -> Card:
    """Copies within its memory, and products of square matrices."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(seconds(lambda: target.copy_(source), device, rounds=20))
    a, b = torch.randn(2, side, side, dtype=torch.bfloat16, device=device)
    product = statistics.median(seconds(lambda: a @ b, device, rounds=20))
    return Card(2 * num_bytes / copy, 2 * side**3 / product)


def random_model(config: ModelConfig, kind: str, device: torch.device) -> CausalLM:
    """Small normal weights in bfloat16, rounded to `kind`."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = CausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.init_weights()
    if kind != "bfloat16":
        quantize_for_gpu(model, kind)
    return model


def make_runner(model: CausalLM, num_tokens: int, kv_dtype: str | None = None) -> Runner:
    """The model with pages for so many tokens, all of them finite."""
    weight = model.model.tok_embeddings.weight
    cache = PageCache(
        model.config,
        num_pages=num_tokens // PAGE + 1,
        page_size=PAGE,
        dtype=weight.dtype,
        device=weight.device,
        kv_dtype=kv_dtype,
    )
    cache.keys.zero_(), cache.values.zero_()
    if cache.is_int8:
        cache.key_scales.fill_(0.01), cache.value_scales.fill_(0.01)
    return Runner(model, cache)


def decode(runner: Runner, num_rows: int, context: int, num_steps: int) -> None:
    """Greedy steps of `num_rows` sequences, each token read by the host before the next step, as an engine does."""
    pages_each = -(-(context + num_steps) // PAGE)
    tokens = [5] * num_rows
    for position in range(context, context + num_steps):
        parts = [
            Part([token], position, range(row * pages_each, (row + 1) * pages_each), context + num_steps)
            for row, token in enumerate(tokens)
        ]
        batch = make_batch(parts, page_size=PAGE, device=runner.device)
        tokens = runner.logits(runner.forward(batch)).argmax(-1).tolist()


def prefill(runner: Runner, length: int, chunk: int) -> None:
    """One prompt of random ids in chunks, up to its first token."""
    ids = torch.randint(runner.model.config.vocab_size, (length,)).tolist()
    pages = range(-(-length // PAGE))
    hidden = torch.empty(0)
    for first in range(0, length, chunk):
        part = Part(ids[first : first + chunk], first, pages, length)
        hidden = runner.forward(make_batch([part], page_size=PAGE, device=runner.device))
    runner.logits(hidden[-1:]).argmax(-1).tolist()


def step_bytes(model: CausalLM, num_rows: int, context: int, kv_dtype: str | None) -> float:
    """What one step reads: all weights but the embedding, whose head is read, and the keys and values."""
    config, weight = model.config, model.model.tok_embeddings.weight
    per_value = 1 + 4 / config.head_dim if kv_dtype == "int8" else weight.itemsize
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return weight_bytes(model) - weight.nbytes + num_rows * context * values * per_value


def prefill_flops(config: ModelConfig, length: int) -> float:
    """Operations of a prompt; attention counts the half that is not masked. The head works on one row."""
    size, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    of_layer = size * config.qkv_size + heads * size + 3 * size * config.intermediate_size
    linear = 2.0 * length * of_layer * config.num_hidden_layers
    return linear + 2.0 * length**2 * heads * config.num_hidden_layers


def decode_rows(config: ModelConfig, kind: str, card: Card, device: torch.device) -> list[str]:
    """Table lines for one kind of weights."""
    model = random_model(config, kind, device)
    lines: list[str] = []
    for kv_dtype in (None, "int8") if kind in ("bfloat16", "int4") else (None,):
        for num_rows in BATCHES:
            runner = make_runner(model, num_rows * (CONTEXT + STEPS + PAGE), kv_dtype)
            times = seconds(lambda r=runner, n=num_rows: decode(r, n, CONTEXT, STEPS), device)
            each = [took / STEPS for took in times]
            step = statistics.median(each)
            rate = step_bytes(model, num_rows, CONTEXT + STEPS / 2, kv_dtype) / step
            lines.append(
                f"| {kind} | {kv_dtype or 'bfloat16'} | {num_rows} | {1e3 * step:.2f} "
                f"[{1e3 * each[0]:.2f}..{1e3 * each[-1]:.2f}] | {num_rows / step:.0f} | "
                f"{rate / card.bytes_per_second:.0%} |"
            )
            print(lines[-1], flush=True)
    return lines


def prefill_rows(
    config: ModelConfig, kind: str, card: Card, device: torch.device, lengths: tuple[int, ...]
) -> list[str]:
    """Table lines for one kind of weights."""
    model = random_model(config, kind, device)
    lines: list[str] = []
    for length in lengths:
        runner = make_runner(model, length + PAGE)
        rounds = ROUNDS if length < 100_000 else 2
        times = seconds(lambda r=runner, n=length: prefill(r, n, CHUNK), device, rounds=rounds)
        took = statistics.median(times)
        rate = prefill_flops(config, length) / took
        lines.append(
            f"| {kind} | {length:,} | {took:.3f} [{times[0]:.3f}..{times[-1]:.3f}] | {length / took:,.0f} | "
            f"{rate / 1e12:.0f} | {rate / card.flops_per_second:.0%} |"
        )
        print(lines[-1], flush=True)
        del runner
    return lines


def against_transformers(config: ModelConfig, device: torch.device) -> list[str]:
    """Decoding one stream in bfloat16: ours and transformers' Llama, static cache and compiled, alternating."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
    )
    with torch.device(device):
        peer = LlamaForCausalLM(shape).to(torch.bfloat16).eval()
    prompt = torch.randint(config.vocab_size, (1, CONTEXT), device=device)

    def theirs(count: int) -> None:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        peer.generate(prompt, cache_implementation="static", **options)

    runner = make_runner(random_model(config, "bfloat16", device), CONTEXT + STEPS + PAGE)
    pairs: list[tuple[float, float]] = []
    for index in range(ROUNDS + 2):  # generate compiles its forward for a static cache by itself
        long, short = (seconds(lambda n=n: theirs(n), device, rounds=1)[0] for n in (STEPS + 1, 1))
        own = seconds(lambda: decode(runner, 1, CONTEXT, STEPS), device, rounds=1)[0]
        if index >= 2:
            pairs.append((STEPS / own, STEPS / (long - short)))
    ratios = sorted(a / b for a, b in pairs)
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    spread = f"[{ratios[0]:.2f}..{ratios[-1]:.2f}]"
    return [f"| {mine:.1f} | {other:.1f} | **{statistics.median(ratios):.2f}** {spread} |"]


def check_kernels() -> str:
    """All Triton kernels against their twins on this GPU: pytest's last line. Ends the run where one is wrong."""
    cases = Path(__file__).parents[1] / "tests" / "kernels" / "gpu" / "triton_cases.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], flush=True)
    if done.returncode:
        sys.exit("benchmarks/gpu.py: a kernel is wrong on this GPU (above), so nothing was measured.")
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Check, measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="7b", choices=sorted(PRESETS))
    parser.add_argument("--long", type=int, default=200_000, help="length of the long prompt; 0: none")
    parser.add_argument("--only", nargs="*", default=["decode", "prefill", "transformers"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(NO_GPU)
    device, config = torch.device("cuda"), preset(options.shape)
    checked = check_kernels()
    card = measure_card(device)
    name, packages = torch.cuda.get_device_name(device), ("torch", "triton", "transformers")
    text = header(f"GPU, {options.shape} shape, random weights", "python benchmarks/gpu.py", packages)
    text += f"{name}. Copies: {card.bytes_per_second / 1e9:.0f} GB/s (read and written). Products: "
    text += f"{card.flops_per_second / 1e12:.0f} TFLOP/s (bfloat16). Kernels against twins: {checked}.\n"
    print(text, flush=True)
    kinds = KINDS if torch.cuda.get_device_capability(device) >= (8, 9) else KINDS[:-1]
    if "decode" in options.only:
        text += f"\n## Decode, context {CONTEXT}, medians of {ROUNDS}\n\n| weights | keys | streams | ms a step | "
        text += "tokens/s | of the copy bandwidth |\n|---|---|---|---|---|---|\n"
        text += "\n".join(line for kind in kinds for line in decode_rows(config, kind, card, device)) + "\n"
    if "prefill" in options.only:
        lengths = (*PROMPTS, options.long) if options.long else PROMPTS
        text += f"\n## Prefill, chunks of {CHUNK}\n\n| weights | tokens | seconds | tokens/s | TFLOP/s | "
        text += "of the matrix rate |\n|---|---|---|---|---|---|\n"
        for kind in kinds:
            own = lengths if kind == "bfloat16" else PROMPTS
            text += "\n".join(prefill_rows(config, kind, card, device, own)) + "\n"
    if "transformers" in options.only:
        text += "\n## Against transformers, bfloat16, one stream (static cache, compiled)\n\n"
        text += "| internlm2 tokens/s | transformers tokens/s | ratio [spread] |\n|---|---|---|\n"
        text += "\n".join(against_transformers(config, device)) + "\n"
    (RESULTS / "gpu.md").write_text(text)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
