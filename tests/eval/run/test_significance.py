"""Paired tests of two runs, against scipy."""

import random

import numpy as np
import pytest
from scipy import stats

from internlm2.eval.run_folder import Sample
from internlm2.eval.significance import (
    MAX_EXACT,
    MCNEMAR,
    PERMUTATION,
    compare,
    compare_scores,
    mcnemar,
    permutation,
)


@pytest.mark.parametrize("pair", [(1, 0), (0, 5), (3, 3), (2, 7), (9, 4), (1, 11), (40, 61), (5200, 5000)])
def test_mcnemar_is_the_binomial_test_of_the_disagreements(pair):
    assert mcnemar(*pair) == pytest.approx(stats.binomtest(pair[0], sum(pair)).pvalue, rel=1e-9)


def test_mcnemar_of_extremes():
    assert mcnemar(0, 0) == 1.0
    assert 0.0 <= mcnemar(9000, 20) < 1e-300


def graded(n: int, seed: int, shift: float) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    return [(min(1.0, round(draw.random() + shift, 2)), round(draw.random(), 2)) for _ in range(n)]


def by_scipy(pairs, **more):
    first, second = np.array(pairs).T
    return stats.permutation_test(
        (first, second), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", vectorized=True,
        alternative="two-sided", **more,
    ).pvalue  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("seed", range(4))
def test_few_graded_scores_are_compared_exactly(n, seed):
    pairs = graded(n, seed, 0.2)
    expected = by_scipy(pairs, n_resamples=np.inf) if n > 1 else 1.0
    assert permutation([a - b for a, b in pairs]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("shift", "seed"), [(0.0, 1), (0.1, 2), (0.2, 3), (0.3, 4)])
def test_many_graded_scores_are_compared_by_draws(shift, seed):
    pairs = graded(60, seed, shift)
    found = compare_scores(pairs)
    assert found.test == PERMUTATION
    expected = by_scipy(pairs, n_resamples=100_000, rng=np.random.default_rng(7))
    assert found.p_value == pytest.approx(expected, abs=0.008)
    assert compare_scores(pairs) == found, "the same numbers each time"


def test_draws_never_give_a_p_value_of_zero():
    assert permutation([0.5] * 400) == 1 / 100_001


def test_zero_differences_do_not_count_for_the_test():
    values = [0.1, -0.2, 0.3, 0.25]
    assert permutation([*values, *[0.0] * 1000]) == permutation(values) == 6 / 16
    assert permutation([0.0, 0.0]) == 1.0


def test_equal_sums_count_as_equal_whatever_the_rounding():
    # 0.1 + 0.2 - 0.3 is not 0 in floating point; of 8 outcomes all are at least as far from 0 as 0
    assert permutation([0.1, 0.2, -0.3]) == 1.0


def test_both_tests_agree_on_right_and_wrong():
    differences = [1.0] * 9 + [-1.0] * 3 + [0.0] * 50
    assert len([one for one in differences if one]) <= MAX_EXACT
    assert permutation(differences) == pytest.approx(mcnemar(9, 3), abs=1e-12)


def test_the_difference_has_the_error_of_a_paired_mean():
    pairs = graded(80, 3, 0.1)
    found = compare_scores(pairs)
    differences = [100 * (a - b) for a, b in pairs]
    assert found.difference == pytest.approx(np.mean(differences))
    assert found.standard_error == pytest.approx(stats.sem(differences))
    assert found.first_better == sum(a > b for a, b in pairs)
    assert compare_scores([(1.0, 0.0)]).standard_error is None


def sample(key: str, score: float, **more) -> Sample:
    return Sample(key, "gsm8k", "", 0, "p", more.pop("gold", "1"), score=score, **more)


def test_runs_are_compared_on_the_questions_both_have_answered():
    first = {key: sample(key, score) for key, score in zip("abcdeg", (1, 1, 0, 1, 1, 1), strict=True)}
    second = {key: sample(key, score) for key, score in zip("abcf", (0, 1, 1, 0), strict=True)}
    second |= {"d": sample("d", 0, error="x"), "g": sample("g", 0, gold="2")}
    found = compare(first, second, task="gsm8k")
    assert found is not None
    assert (found.n, found.first_better, found.second_better, found.p_value) == (3, 1, 1, 1.0)
    assert (found.difference, found.test) == (0.0, MCNEMAR)
    assert compare(first, second, task="math") is None
    assert compare(first, second, task="gsm8k", subset="x") is None


def test_one_graded_score_makes_the_test_graded():
    first = {key: sample(key, 1.0) for key in "abc"}
    second = {key: sample(key, score) for key, score in zip("abc", (0.0, 0.5, 1.0), strict=True)}
    found = compare(first, second, task="gsm8k")
    assert found is not None
    assert (found.test, found.p_value, found.difference) == (PERMUTATION, 0.5, 50.0)
