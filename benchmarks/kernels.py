"""How fast are the linear kernels against the memory? bf16, int8 and int4 for 1 to 16 rows, and torch beside them.

Run: python benchmarks/kernels.py. Layers of the 1.8B shape, more of them than the caches hold; the streaming-read probe
runs before and after each sample, and samples during which others used the processor are dropped and repeated.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hardware import RESULTS, header

from internlm2.engine.bench import foreign_load
from internlm2.kernels import PackedWeight, linear, pack_bfloat16, pack_int4, pack_int8
from internlm2.kernels.library import Library, library
from internlm2.kernels.packed import allocate

# rows, columns, and whether w1 and w3 are read together
SHAPES = ((4096, 2048, False), (2048, 2048, False), (8192, 2048, True), (2048, 8192, False))
NUM_ROWS = (1, 4, 8, 16, 512)
SAMPLES = 7
TRIES = 20  # samples at most, the dropped ones counted
PROBE_BYTES = 256 << 20
WEIGHT_BYTES = 256 << 20  # eight times the largest cache here
LOUD = 0.05
GROUP = 32


@dataclass(frozen=True)
class Stack:
    """Layers of one kind. run: one pass over them with so many rows. num_bytes: what a pass reads."""

    name: str
    run: Callable[[dict[int, torch.Tensor]], None]
    num_bytes: int
    operations: int  # of one row


@dataclass(frozen=True)
class Sample:
    """bytes_per_second of weights, and of the probe around it."""

    rate: float
    probe: float


def packed_stack(name: str, make: Callable[[int, int, bool], PackedWeight]) -> Stack:
    """As many layers as fill WEIGHT_BYTES."""
    weights = [make(*shape) for shape in SHAPES]
    while sum(weight.num_bytes for weight in weights) < WEIGHT_BYTES:
        weights += [make(*shape) for shape in SHAPES]

    def run(x: dict[int, torch.Tensor]) -> None:
        for weight in weights:
            linear(x[weight.columns], weight)

    operations = sum(2 * w.rows * w.columns * (1 + w.is_gated) for w in weights)
    return Stack(name, run, sum(weight.num_bytes for weight in weights), operations)


def torch_stack() -> Stack:
    """The same in torch: F.linear in bfloat16, as the model calls it without packed weights."""
    shapes = [(rows * (1 + is_gated), columns) for rows, columns, is_gated in SHAPES]
    count = -(-WEIGHT_BYTES // sum(2 * rows * columns for rows, columns in shapes))
    weights = [torch.randn(rows, columns).bfloat16() for _ in range(count) for rows, columns in shapes]

    def run(x: dict[int, torch.Tensor]) -> None:
        for weight in weights:
            F.linear(x[weight.shape[1]], weight)

    num_weights = sum(weight.numel() for weight in weights)
    return Stack("torch F.linear bf16", run, 2 * num_weights, 2 * num_weights)


def make_bfloat16(rows: int, columns: int, is_gated: bool) -> PackedWeight:
    """Random weights."""
    weight = torch.randn(rows, columns).bfloat16()
    return pack_bfloat16(weight, gate=weight if is_gated else None)


def make_int8(rows: int, columns: int, is_gated: bool, *, group: int = GROUP, bits: int = 15) -> PackedWeight:
    """Random weights. bits: of the activations."""
    parts = torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.rand(rows, columns // group)
    return pack_int8(*parts, group=group, gate=parts if is_gated else None, activation_bits=bits)


def make_int4(
    rows: int, columns: int, is_gated: bool, *, group: int = GROUP, has_zeros: bool = False
) -> PackedWeight:
    """Random weights."""
    zeros = torch.randint(0, 241, (rows, columns // group), dtype=torch.uint8) if has_zeros else None
    q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    parts = q, torch.rand(rows, columns // group), zeros
    return pack_int4(*parts, group=group, gate=parts if is_gated else None)


def measure(stack: Stack, num_rows: int, built: Library, memory: torch.Tensor) -> tuple[list[Sample], int]:
    """SAMPLES quiet samples, or as many as TRIES give; and how many were dropped."""
    x = {columns: torch.randn(num_rows, columns).bfloat16() for columns in (2048, 8192)}
    stack.run(x)  # builds what is built on first use

    def probe() -> float:
        start = time.perf_counter()
        built.read(memory.data_ptr(), len(memory), torch.get_num_threads())
        return len(memory) / (time.perf_counter() - start)

    kept: list[Sample] = []
    dropped = 0
    while len(kept) < SAMPLES and dropped < TRIES - SAMPLES:
        before = probe()
        start = time.perf_counter()
        stack.run(x)
        seconds = time.perf_counter() - start
        after = probe()
        load = foreign_load(0.3)
        if load is not None and load > LOUD:
            dropped += 1
            continue
        kept.append(Sample(stack.num_bytes / seconds, (before + after) / 2))
    return kept, dropped


def row(stack: Stack, num_rows: int, samples: list[Sample], dropped: int) -> str:
    """One line of the table."""
    if len(samples) < 5:
        quiet = f"too loud: {len(samples)} quiet samples of {len(samples) + dropped}"
        return f"| {stack.name} | {num_rows} | {quiet} | | | |"
    rate = statistics.median(sample.rate for sample in samples)
    shares = sorted(sample.rate / sample.probe for sample in samples)
    share = f"{statistics.median(shares):.0%} [{shares[0]:.0%}..{shares[-1]:.0%}]"
    operations = rate / stack.num_bytes * stack.operations * num_rows
    probe = statistics.median(sample.probe for sample in samples)
    return f"| {stack.name} | {num_rows} | {rate / 1e9:.1f} | {probe / 1e9:.1f} | {share} | {operations / 1e9:.0f} |"


def main() -> None:
    """Measure every kind at every number of rows and write the result file."""
    built = library()
    if built is None:
        sys.exit("The kernels are not built, so there is nothing to measure.")
    memory = allocate(PROBE_BYTES).fill_(1)
    makers: dict[str, Callable[[], Stack]] = {
        "bf16": lambda: packed_stack("bf16", make_bfloat16),
        "int8": lambda: packed_stack("int8 g32, 15-bit activations", make_int8),
        "int8 fast": lambda: packed_stack(
            "int8 g128, 8-bit activations", lambda *shape: make_int8(*shape, group=128, bits=8)
        ),
        "int4": lambda: packed_stack("int4 g32", make_int4),
        "int4 zeros": lambda: packed_stack(
            "int4 g32 with zeros", lambda *shape: make_int4(*shape, has_zeros=True)
        ),
        "int4 g128": lambda: packed_stack("int4 g128", lambda *shape: make_int4(*shape, group=128)),
        "torch": torch_stack,
    }
    lines = []
    for make in makers.values():
        stack = make()
        for num_rows in NUM_ROWS:
            lines.append(row(stack, num_rows, *measure(stack, num_rows, built, memory)))
            print(lines[-1], flush=True)
    text = header("Linear kernels against the memory", "python benchmarks/kernels.py", ("torch",))
    text += (
        f"Instructions: {built.level_name}; {torch.get_num_threads()} threads. Weights of 1.8B layers (wqkv, wo,\n"
        "w1 + w3, w2), read once in each pass; medians, and the share of the streaming-read rate measured around each\n"
        "sample. 512 rows: of interest is GOP/s.\n"
        f"Samples with foreign load over {LOUD:.0%} are dropped.\n\n"
        "| weights | rows | GB/s of weights | probe GB/s | share of the probe | GOP/s |\n|---|---|---|---|---|---|\n"
    )
    (RESULTS / "kernels.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
