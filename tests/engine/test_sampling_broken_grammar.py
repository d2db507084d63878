"""A grammar that fails ends its own answer with its own reason, and no other."""

import pytest
import torch

from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.sampler import SamplingState, sample
from internlm2.errors import RequestError

VOCAB = 33


class Failing:
    """A grammar that gives up where it is told to; what it wrote before does not count."""

    def __init__(self, *, at: str) -> None:
        self.at = at

    def fill(self, bitmask: torch.Tensor) -> None:
        bitmask.fill_(-1)
        if self.at == "fill":
            raise RequestError("The grammar is too large.")

    def advance(self, token_id: int) -> None:
        if self.at == "advance":
            raise RequestError(f"The grammar is too large for {token_id}.")


def states_with(grammar: Failing, **values: object) -> list[SamplingState]:
    """Three sequences, the middle one with the grammar."""
    params = SamplingParams(logprobs=1, **values)
    return [
        SamplingState(params, [1], vocab_size=VOCAB, constraint=grammar if row == 1 else None, seed=row)
        for row in range(3)
    ]


@pytest.mark.parametrize("values", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_a_grammar_that_fails_ends_its_own_row(values):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    found = sample(logits, states_with(Failing(at="fill"), **values))
    expected = sample(logits, states_with(Failing(at="nowhere"), **values))
    assert [str(error) for error in found.errors] == ["None", "The grammar is too large.", "None"]
    assert found.failed == [False, True, False]
    assert found.token_ids == [expected.token_ids[0], 0, expected.token_ids[2]]
    assert found.logprobs == [expected.logprobs[0], None, expected.logprobs[2]]


def test_a_grammar_that_fails_on_a_token_is_told_of_at_the_next():
    logits = torch.zeros(3, VOCAB)
    states = states_with(Failing(at="advance"))
    for state in states:
        state.push(7)
        state.push(8)  # nothing is raised here either: the engine pushes in the middle of a step
    found = sample(logits, states)
    assert [str(error) for error in found.errors] == ["None", "The grammar is too large for 7.", "None"]
    assert not states[1].is_stateless
    assert states[1].num_outputs == 2


def test_logits_that_are_not_finite_are_told_before_the_grammar():
    logits = torch.zeros(3, VOCAB)
    logits[1, 4] = torch.nan
    found = sample(logits, states_with(Failing(at="fill")))
    assert "logits are not finite" in str(found.errors[1])
    assert found.failed == [False, True, False]
