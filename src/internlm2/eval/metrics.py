"""From verdicts to the numbers of a table: per subset, and over subsets as the model card averages them.

All scores are percent. A row over several subsets is left out, not shortened, while one of its subsets has no verdict:
half a benchmark is no benchmark.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from internlm2.eval.task import Average


@dataclass(frozen=True)
class Score:
    """A mean in percent. standard_error: of that mean, in percent points, over the choice of questions; n: how many.

    NOTE: the error says how far another draw of questions of the same kind might lie; it knows nothing of protocols.
    """

    percent: float
    standard_error: float
    n: int


def mean(scores: Sequence[float]) -> Score:
    """The mean of scores from 0 to 1, of one subset. At least one is needed; the error of a single one is not known."""
    assert scores, "the mean of nothing"
    n = len(scores)
    average = math.fsum(scores) / n
    variance = math.fsum((score - average) ** 2 for score in scores) / (n - 1) if n > 1 else math.nan
    return Score(100 * average, 100 * math.sqrt(variance / n), n)


def average(row: Average, subsets: Mapping[str, Score]) -> Score | None:
    """A row over several subsets, or None while one is missing.

    Unweighted, every subset counts alike, as the card's `naive_average`; weighted, every question does.
    """
    if any(name not in subsets for name in row.subsets):
        return None
    scores = [subsets[name] for name in row.subsets]
    n = sum(score.n for score in scores)
    weights = row.weights or [score.n / n if row.is_weighted else 1 / len(scores) for score in scores]
    percent = math.fsum(weight * score.percent for weight, score in zip(weights, scores, strict=True))
    variance = math.fsum(
        (weight * score.standard_error) ** 2 for weight, score in zip(weights, scores, strict=True)
    )
    return Score(percent, math.sqrt(variance), n)


def summarise(
    averages: Sequence[Average], verdicts: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Score], dict[str, Score]]:
    """The scores of all rows that are complete, and of all subsets that have verdicts.

    verdicts: scores from 0 to 1 by subset, such as `Verdict.score`.
    """
    subsets = {name: mean(scores) for name, scores in verdicts.items() if scores}
    rows = {row.name: score for row in averages if (score := average(row, subsets)) is not None}
    return rows, subsets
