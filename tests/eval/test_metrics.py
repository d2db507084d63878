"""Means, their errors, and rows over subsets."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm2.eval.metrics import Score, average, mean, summarise
from internlm2.eval.task import Average


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_mean_and_error_are_those_of_statistics(scores):
    found = mean(scores)
    assert found.n == len(scores)
    assert found.percent == pytest.approx(100 * statistics.fmean(scores), abs=1e-9)
    expected = 100 * statistics.stdev(scores) / math.sqrt(len(scores))
    assert found.standard_error == pytest.approx(expected, abs=1e-6)


def test_one_question_has_no_error_to_speak_of():
    assert mean([1.0]).percent == 100.0
    assert math.isnan(mean([1.0]).standard_error)


def test_rows_count_subsets_or_questions_alike():
    subsets = {"a": Score(50.0, 3.0, 10), "b": Score(80.0, 4.0, 30)}
    assert average(Average("all", ("a", "b")), subsets) == Score(65.0, 2.5, 40)
    weighted = average(Average("all", ("a", "b"), True), subsets)
    assert weighted is not None
    assert weighted.percent == 72.5
    assert weighted.standard_error == pytest.approx(math.hypot(0.25 * 3, 0.75 * 4))


def test_a_row_with_a_missing_subset_is_left_out():
    rows, subsets = summarise(
        [Average("both", ("a", "b")), Average("one", ("a",))], {"a": [1.0, 0.0], "b": []}
    )
    assert list(rows) == ["one"]
    assert list(subsets) == ["a"]
