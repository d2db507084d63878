"""How fast are the kernels against the memory? Products with packed weights, attention over pages, decoding steps.

Run: python benchmarks/kernels.py [products] [attention] [decoding]. The 1.8B shape with random weights, more of them
than the caches hold, and the demo model; the streaming-read probe runs before and after each sample, competitors take
turns, and rounds during which others used the processor are dropped and repeated.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hardware import RESULTS, header
from kernels_of_layers import attention_rows, decoding_rows, random_packed_model
from sampling_beside_memory import LOUD, SAMPLES, Meter

from internlm2.checkpoint.load import load_model
from internlm2.kernels import PackedWeight, linear, pack_bfloat16, pack_int4, pack_int8
from internlm2.kernels.library import library
from internlm2.model.config import preset
from internlm2.model.heads import CausalLM
from internlm2.quant.linear import quantize_model

# rows, columns, and whether w1 and w3 are read together
SHAPES = ((4096, 2048, False), (2048, 2048, False), (8192, 2048, True), (2048, 8192, False))
NUM_ROWS = (1, 4, 8, 16, 512)
WEIGHT_BYTES = 256 << 20  # eight times the largest cache here
GROUP = 32
PARTS = ("products", "attention", "decoding")


@dataclass(frozen=True)
class Stack:
    """Layers of one kind. run: one pass over them with so many rows. num_bytes: what a pass reads."""

    name: str
    run: Callable[[dict[int, torch.Tensor]], None]
    num_bytes: int
    operations: int  # of one row


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


def make_int8(rows: int, columns: int, is_gated: bool, *, is_turned: bool = True) -> PackedWeight:
    """Random weights; those that are not turned, as of a file, meet activations of 15 bits."""
    parts = torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.rand(rows, columns // GROUP)
    gate, bits = parts if is_gated else None, 8 if is_turned else 15
    return pack_int8(*parts, group=GROUP, gate=gate, activation_bits=bits, uses_hadamard=is_turned)


def make_int4(
    rows: int, columns: int, is_gated: bool, *, group: int = GROUP, has_zeros: bool = False
) -> PackedWeight:
    """Random weights."""
    zeros = torch.randint(0, 241, (rows, columns // group), dtype=torch.uint8) if has_zeros else None
    q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    parts = q, torch.rand(rows, columns // group), zeros
    return pack_int4(*parts, group=group, gate=parts if is_gated else None)


def product_rows(meter: Meter) -> Iterator[str]:
    """Lines of the table of products."""
    makers: dict[str, Callable[[], Stack]] = {
        "bf16": lambda: packed_stack("bf16", make_bfloat16),
        "int8": lambda: packed_stack("int8 g32, turned", make_int8),
        "int8 of a file": lambda: packed_stack(
            "int8 g32 of a file, 15-bit activations", functools.partial(make_int8, is_turned=False)
        ),
        "int4": lambda: packed_stack("int4 g32", make_int4),
        "int4 zeros": lambda: packed_stack(
            "int4 g32 with zeros", lambda *shape: make_int4(*shape, has_zeros=True)
        ),
        "int4 g128": lambda: packed_stack("int4 g128", lambda *shape: make_int4(*shape, group=128)),
        "torch": torch_stack,
    }
    for make in makers.values():
        stack = make()
        for num_rows in NUM_ROWS:
            x = {columns: torch.randn(num_rows, columns).bfloat16() for columns in (2048, 8192)}
            samples = meter.measure([functools.partial(stack.run, x)])
            if not samples.is_enough:
                yield f"| {stack.name} | {num_rows} | too loud | | | |"
                continue
            rate = stack.num_bytes / samples.seconds()
            operations = stack.operations * num_rows / samples.seconds()
            yield (
                f"| {stack.name} | {num_rows} | {rate / 1e9:.1f} | {samples.probe() / 1e9:.1f} | "
                f"{samples.share(stack.num_bytes)} | {operations / 1e9:.0f} |"
            )


def step_rows(meter: Meter) -> Iterator[str]:
    """Lines of the table of decoding steps: the demo model, and the 1.8B shape."""

    def demo(kind: str) -> CausalLM:
        model = load_model("demo", dtype="bfloat16")
        assert isinstance(model, CausalLM)
        quantize_model(model, kind)
        return model.eval()

    kinds = ("bfloat16", "int8", "int4")
    models = {kind: functools.partial(demo, kind) for kind in kinds}
    yield from decoding_rows(meter, "demo", models, context=128, num_steps=32)
    int4 = functools.partial(make_int4, has_zeros=True)
    shape = preset("1.8b")
    large = {
        "bfloat16": functools.partial(random_packed_model, shape, make_bfloat16, make_bfloat16),
        "int8": functools.partial(random_packed_model, shape, make_int8, make_int8),
        "int4": functools.partial(random_packed_model, shape, int4, make_int8),
    }
    yield from decoding_rows(meter, "1.8B", large, context=512, num_steps=8)


def table(title: str, columns: str, lines: Iterator[str]) -> str:
    """One part of the result file, printed as it comes."""
    text = f"\n## {title}\n| {columns} |\n{'|---' * (columns.count('|') + 1)}|\n"
    for line in lines:
        print(line, flush=True)
        text += line + "\n"
    return text


def main() -> None:
    """Measure what the command line names, or everything, and write the result file."""
    built = library()
    if built is None:
        sys.exit("The kernels are not built, so there is nothing to measure.")
    parts = sys.argv[1:] or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"Unknown: {', '.join(sorted(unknown))}. There are: {', '.join(PARTS)}.")
    meter = Meter(built)
    text = header(
        "Kernels against the memory", "python benchmarks/kernels.py " + " ".join(sys.argv[1:]), ("torch",)
    )
    text += (
        f"Instructions: {built.level_name}; {torch.get_num_threads()} threads. Medians of {SAMPLES} and their range;\n"
        "shares are of the streaming-read rate measured around each sample. Rounds with foreign load over\n"
        f"{LOUD:.0%} are dropped.\n"
    )
    if "products" in parts:
        title = "Products with the weights of 1.8B layers (wqkv, wo, w1 + w3, w2); at 512 rows GOP/s count"
        columns = "weights | rows | GB/s of weights | probe GB/s | share of the probe | GOP/s"
        text += table(title, columns, product_rows(meter))
    if "attention" in parts:
        title = "Attention over pages, 16 heads, 8 key/value heads of 128; torch is `PagedAttend`, in turns"
        columns = (
            "keys and values | batch | GB/s of keys and values | share of the probe | GFLOP/s | times torch"
        )
        text += table(title, columns, attention_rows(meter))
    if "decoding" in parts:
        title = "Greedy decoding steps of one sequence (demo: context 128; 1.8B: 512, random weights), bfloat16 keys"
        columns = (
            "model | weights | tokens/s | MB per token | share of the probe | "
            "times the same weights module by module with torch's attention"
        )
        text += table(title, columns, step_rows(meter))
    (RESULTS / "kernels.md").write_text(text)


if __name__ == "__main__":
    main()
