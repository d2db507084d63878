"""Single-stream decoding of the demo model: our plain loop against transformers on the same weights.

Run: python benchmarks/decode.py. Alternating runs, medians of five; the plain loop has no kernels of its own yet.
"""

import statistics
import time

import torch
from hardware import RESULTS, header
from transformers import LlamaForCausalLM

from internlm2 import LLM, SamplingParams
from internlm2.checkpoint.formats.llama import write_llama
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import cache_root, resolve_model

NUM_TOKENS, ROUNDS = 64, 5
PROMPT = "The history of the printing press begins in"


def ours(llm: LLM, ids: list[int]) -> float:
    """Tokens per second after the first."""
    times = [
        time.monotonic() for _ in llm.stream(ids, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
    ]
    return (len(times) - 1) / (times[-1] - times[0])


def theirs(model: LlamaForCausalLM, ids: list[int]) -> float:
    """The same of transformers' generate, by the difference of a long and a short run."""

    def run(count: int) -> float:
        start = time.monotonic()
        model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.monotonic() - start

    return (NUM_TOKENS - 1) / (run(NUM_TOKENS) - run(1))


def main() -> None:
    """Measure both dtypes and write the result file."""
    folder = cache_root() / "benchmark-llama"
    if not folder.exists():
        write_llama(open_checkpoint(resolve_model("demo")), folder)
    rows = []
    for dtype in ("float32", "bfloat16"):
        llm = LLM("demo", dtype=dtype)
        peer = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        ids = llm.encode(PROMPT)
        ours(llm, ids), theirs(peer, ids)  # warm up
        pairs = [(ours(llm, ids), theirs(peer, ids)) for _ in range(ROUNDS)]
        mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(a / b for a, b in pairs)
        rows.append(
            f"| {dtype} | {mine:.1f} | {other:.1f} | **{statistics.median(ratios):.2f}** "
            f"[{ratios[0]:.2f}..{ratios[-1]:.2f}] |"
        )
        print(rows[-1], flush=True)
    text = header(
        "Single-stream decoding, demo model", "python benchmarks/decode.py", ("torch", "transformers")
    )
    text += (
        f"SmolLM2-135M, {len(PROMPT.split())} words of prompt, {NUM_TOKENS} new tokens, greedy, medians of {ROUNDS} "
        "alternating runs.\n\n| dtype | internlm2 tokens/s | transformers (sdpa) tokens/s | ratio [spread] |\n"
        "|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    (RESULTS / "decode.md").write_text(text)


if __name__ == "__main__":
    main()
