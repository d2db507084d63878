"""Whether two runs differ by more than chance, on the questions that both have a verdict on.

Right or wrong: McNemar's exact test (Q. McNemar, Psychometrika 12, 1947). Graded scores: the paired permutation test
(R. A. Fisher, The Design of Experiments, 1935), which asks how often a difference as large comes up when each pair of
scores is exchanged or not by the toss of a coin.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from internlm2.eval.run_folder import Sample

MCNEMAR, PERMUTATION = "McNemar, exact", "paired permutation"
MAX_EXACT = 16  # pairs that differ, up to which every outcome of the coins is counted
NUM_DRAWS = 100_000
_DRAWS_AT_ONCE = 1 << 22  # numbers in memory
_CLOSE = 1e-9  # relative: sums that are equal but for rounding count as equal


@dataclass(frozen=True)
class Comparison:
    """Two runs on the questions that both have a verdict on.

    first_better, second_better: questions on which one of them has the higher score. difference: of the means, first
    less second, in percent points, and its standard error over the choice of questions (None for a single one).
    p_value: how likely a difference as large as this is, in either direction, between two equally good runs. test: its
    name.
    """

    n: int
    first_better: int
    second_better: int
    difference: float
    standard_error: float | None
    p_value: float
    test: str


def compare(
    first: Mapping[str, Sample], second: Mapping[str, Sample], *, task: str, subset: str | None = None
) -> Comparison | None:
    """A task or subset of two runs, every question alike; None where no question is common to both.

    Questions count as common where key and right answer agree and both runs have a verdict.
    """
    pairs = [
        (sample.score, second[key].score)
        for key, sample in first.items()
        if sample.task == task
        and subset in (None, sample.subset)
        and not sample.error
        and key in second
        and not second[key].error
        and second[key].gold == sample.gold
    ]
    return compare_scores(pairs) if pairs else None


def compare_scores(pairs: Sequence[tuple[float, float]]) -> Comparison:
    """The two scores of each question, from 0 to 1. At least one question is needed."""
    assert pairs, "a comparison of nothing"
    differences = [a - b for a, b in pairs]
    n, difference = len(pairs), math.fsum(differences) / len(pairs)
    variance = math.fsum((one - difference) ** 2 for one in differences) / (n - 1) if n > 1 else math.nan
    first_better, second_better = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    is_graded = any(score not in (0.0, 1.0) for pair in pairs for score in pair)
    return Comparison(
        n, first_better, second_better, 100 * difference, None if n == 1 else 100 * math.sqrt(variance / n),
        permutation(differences) if is_graded else mcnemar(first_better, second_better),
        PERMUTATION if is_graded else MCNEMAR,
    )  # fmt: skip


def mcnemar(first_only: int, second_only: int) -> float:
    """The two-sided exact p-value: both kinds of disagreement are equally likely where the runs are equally good."""
    n, fewer = first_only + second_only, min(first_only, second_only)
    term, total = 1, 1
    for k in range(1, fewer + 1):
        term = term * (n - k + 1) // k
        total += term
    return min(1.0, 2 * total / 2**n)


def permutation(differences: Sequence[float], *, seed: int = 0) -> float:
    """The two-sided p-value of paired differences under exchange of each pair.

    Exact for up to 16 differences other than zero; else of 100,000 draws with `seed`, the observed one counted in, so
    that it is never 0 and the same call gives the same number.
    """
    values = np.array([one for one in differences if one], dtype=np.float64)
    if not len(values):
        return 1.0
    threshold = abs(values.sum()) - _CLOSE * np.abs(values).sum()
    if len(values) <= MAX_EXACT:
        coins = np.arange(1 << len(values))[:, None] >> np.arange(len(values)) & 1
        return float(np.mean(np.abs((1 - 2 * coins) @ values) >= threshold))
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // len(values))
    num_extreme, num_left = 0, NUM_DRAWS
    while num_left:
        num = min(at_once, num_left)
        signs = 1.0 - 2.0 * generator.integers(0, 2, (num, len(values)), dtype=np.int8)
        num_extreme += int(np.count_nonzero(np.abs(signs @ values) >= threshold))
        num_left -= num
    return (num_extreme + 1) / (NUM_DRAWS + 1)
