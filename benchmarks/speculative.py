"""Speculative decoding of the demo model: prompt lookup against the plain loop, where a text repeats and where not.

Run: python benchmarks/speculative.py. The two take turns step by step; medians of five.
"""

import statistics
import time
from collections.abc import Sequence

from hardware import RESULTS, foreign_load, header

from internlm2 import LLM, SamplingParams

NUM_TOKENS, ROUNDS = 128, 5
CODE = """def total_price(items, tax):
    result = 0
    for item in items:
        if item.count > 0:
            result = result + item.count * item.price
    result = result + result * tax
    print("The total price is", result)
    return result
"""
TEXTS = {
    "copies code of its prompt": "\nThe same program again:\n\n".join(("The program:\n\n" + CODE, CODE, "")),
    "tells a story": "Once upon a time, in a small village by the sea, there lived an old clockmaker who",
}
CASES = (("copies code of its prompt", 0.0), ("tells a story", 0.0), ("tells a story", 0.8))


def run_both(llms: Sequence[LLM], ids: list[int], params: SamplingParams) -> list[tuple[float, list[int]]]:
    """Seconds a token after the first, and the answer, of each.

    The engines take turns step by step, so that what else the machine does meets them alike.
    """
    streams = [llm.stream(ids, params) for llm in llms]
    answers = [list(next(stream).token_ids) for stream in streams]
    seconds = [0.0 for _ in llms]
    open_ = set(range(len(llms)))
    while open_:
        for index in sorted(open_):
            started = time.perf_counter()
            piece = next(streams[index], None)
            seconds[index] += time.perf_counter() - started
            if piece is None:
                open_.remove(index)
            else:
                answers[index] += piece.token_ids
    return [(s / (len(tokens) - 1), tokens) for s, tokens in zip(seconds, answers, strict=True)]


def main() -> None:
    """Measure and write the result file."""
    plain, lookup = LLM("demo"), LLM("demo", speculative="lookup")
    rows: list[str] = []
    loads: list[float] = []
    for name, temperature in CASES:
        ids = plain.encode(TEXTS[name])
        params = SamplingParams(
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            temperature=temperature,
            seed=1,
            repetition_penalty=1.0,
        )
        (_, expected), (_, found) = run_both((plain, lookup), ids, params)  # warm up
        agreed = [a == b for a, b in zip(expected, found, strict=True)]
        same = agreed.index(False) if False in agreed else len(agreed)
        before = (lookup.stats.num_drafted_tokens, lookup.stats.num_accepted_tokens)
        runs = [run_both((plain, lookup), ids, params) for _ in range(ROUNDS)]
        pairs = [(1 / a, 1 / b) for (a, _), (b, _) in runs]
        num_drafted = (lookup.stats.num_drafted_tokens - before[0]) // ROUNDS
        num_accepted = (lookup.stats.num_accepted_tokens - before[1]) // ROUNDS
        loads.append(foreign_load())
        without, with_guesses = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        rows.append(
            f"| {name} | {temperature:g} | {without:.1f} | {with_guesses:.1f} | "
            f"**{statistics.median(ratios):.2f}** [{ratios[0]:.2f}..{ratios[-1]:.2f}] | "
            f"{num_accepted} of {num_drafted} | {same} of {NUM_TOKENS} |"
        )
        print(rows[-1], flush=True)
    text = header(
        "Speculative decoding by prompt lookup, demo model", "python benchmarks/speculative.py", ("torch",)
    )
    text += (
        f"SmolLM2-135M, bfloat16, one sequence, {NUM_TOKENS} new tokens, medians of {ROUNDS} runs, in which the two "
        "take turns step by step. Foreign load between the runs: "
        f"{min(loads):.0%} to {max(loads):.0%} of the processor.\n\n"
        "| text | temperature | plain tokens/s | lookup tokens/s | ratio [spread] | agreed guesses | equal tokens |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        "Equal tokens: the length of the common beginning. In bfloat16 a step of nine rows rounds otherwise than one "
        "of a single row, so where two tokens are as good as equally likely the other one may be chosen; in float32 "
        "the tests find no difference.\n"
    )
    (RESULTS / "speculative.md").write_text(text)


if __name__ == "__main__":
    main()
