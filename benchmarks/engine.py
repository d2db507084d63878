"""What the engine itself costs: the share of a step outside the network, and the second turn of a long chat.

Run: python benchmarks/engine.py. Demo model, bfloat16, medians of five; foreign load is measured beside it.
"""

import statistics
import time

from hardware import RESULTS, foreign_load, header

from internlm2 import LLM, SamplingParams

ROUNDS = 5
TEXT = "The printing press was a machine that changed how people shared what they knew. "


def overhead(
    llm: LLM, num_streams: int, params: dict[str, float], num_tokens: int
) -> tuple[float, float, float]:
    """Share of the steps' time outside the network, milliseconds of it a step, and tokens per second."""
    prompts = [f"{number}. {TEXT}" for number in range(num_streams)]
    settings = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1, **params)
    stats = llm.stats
    before = (stats.step_seconds, stats.network_seconds, stats.num_steps, stats.num_output_tokens)
    started = time.perf_counter()
    llm.generate(prompts, settings)
    wall = time.perf_counter() - started
    network = stats.network_seconds - before[1]
    num_steps = stats.num_steps - before[2]
    return (
        1 - network / wall,
        (wall - network) / num_steps * 1e3,
        (stats.num_output_tokens - before[3]) / wall,
    )


def first_token_seconds(llm: LLM, ids: list[int]) -> float:
    """Time to the first token of one prompt."""
    started = time.perf_counter()
    stream = llm.stream(ids, SamplingParams(max_tokens=2, ignore_eos=True))
    next(stream)
    seconds = time.perf_counter() - started
    stream.close()
    return seconds


def second_turn(llm: LLM, seed: int) -> tuple[float, float]:
    """Time to the first token of a 4,000-token chat: cold, and with one more turn of 32 tokens."""
    base = llm.tokenizer.encode(f"{seed} " + TEXT * 400)[:4000]
    cold = first_token_seconds(llm, base)
    return cold, first_token_seconds(llm, base + llm.tokenizer.encode(TEXT * 4)[:32])


def main() -> None:
    """Measure and write the result file."""
    llm = LLM("demo", dtype="bfloat16")
    overhead(llm, 4, {}, 8)  # warm up
    load = foreign_load()
    rows = []
    kinds = (("greedy", {}), ("temperature 0.8, top_p 0.8", {"temperature": 0.8, "top_p": 0.8}))
    for num_streams, num_tokens in ((1, 48), (64, 24)):
        for name, params in kinds:
            runs = [overhead(llm, num_streams, params, num_tokens) for _ in range(ROUNDS)]
            share, milliseconds, speed = (statistics.median(column) for column in zip(*runs, strict=True))
            spread = sorted(run[0] for run in runs)
            rows.append(
                f"| {num_streams} | {name} | {share:.1%} [{spread[0]:.1%}..{spread[-1]:.1%}] | {milliseconds:.2f} | "
                f"{speed:.0f} |"
            )
            print(rows[-1], flush=True)
    turns = [second_turn(llm, seed) for seed in range(ROUNDS)]
    cold, warm = (statistics.median(column) for column in zip(*turns, strict=True))
    ratios = sorted(a / b for a, b in turns)
    text = header("What the engine itself costs", "python benchmarks/engine.py", ("torch",))
    text += (
        f"Demo model (135M), bfloat16, medians of {ROUNDS}. Foreign load before: {load:.0%}. Outside the network: "
        "scheduling, packing, sampling, detokenising, delivery, everything but the model and its logits.\n\n"
        "| streams | sampling | share outside the network | ms a step | tokens/s |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n## Second turn of a chat\n\n"
        f"Time to the first token of 4,000 tokens: {cold:.2f} s cold; with 32 more tokens behind them "
        f"{warm * 1e3:.0f} ms, **{statistics.median(ratios):.0f} times** less [{ratios[0]:.0f}..{ratios[-1]:.0f}].\n"
    )
    print(text.split("##")[-1])
    (RESULTS / "engine.md").write_text(text)


if __name__ == "__main__":
    main()
