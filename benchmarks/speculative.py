"""Speculative decoding of the demo model: prompt lookup against the plain loop, where a text repeats and where not.

Run: python benchmarks/speculative.py. The two take turns; medians of nine.
"""

import statistics
import time
from collections.abc import Sequence

from hardware import RESULTS, foreign_load, header

from internlm2 import LLM, SamplingParams

NUM_TOKENS, ROUNDS = 192, 9
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


def run_both(
    llms: Sequence[LLM], ids: list[int], params: SamplingParams, number: int
) -> list[tuple[float, list[int]]]:
    """Seconds a token after the first, and the answer, of each. They take turns in who is first; none runs beside."""
    found: dict[int, tuple[float, list[int]]] = {}
    for index in sorted(range(len(llms)), reverse=number % 2 == 1):
        stream = llms[index].stream(ids, params)
        tokens = list(next(stream).token_ids)
        num_first, started = len(tokens), time.perf_counter()
        for piece in stream:
            tokens += piece.token_ids
        found[index] = ((time.perf_counter() - started) / (len(tokens) - num_first), tokens)
    return [found[index] for index in range(len(llms))]


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
        (_, expected), (_, found) = run_both((plain, lookup), ids, params, 0)  # warm up
        agreed = [a == b for a, b in zip(expected, found, strict=True)]
        same = agreed.index(False) if False in agreed else len(agreed)
        before = (lookup.stats.num_drafted_tokens, lookup.stats.num_accepted_tokens)
        runs = [run_both((plain, lookup), ids, params, number) for number in range(ROUNDS)]
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
        f"SmolLM2-135M, bfloat16, one sequence, {NUM_TOKENS} new tokens, weights {plain.weights.held}, medians of "
        f"{ROUNDS} runs, in which the two take turns. Foreign load between the runs: "
        f"{min(loads):.0%} to {max(loads):.0%} of the processor.\n\n"
        "| text | temperature | plain tokens/s | lookup tokens/s | ratio [spread] | agreed guesses | equal tokens |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        "Equal tokens: the length of the common beginning. With packed weights a row of a step has the same bits "
        "whatever the others are; with plain ones in bfloat16 it is rounded otherwise, and of two tokens as good as "
        "equally likely the other one may be chosen.\n"
    )
    (RESULTS / "speculative.md").write_text(text)


if __name__ == "__main__":
    main()
