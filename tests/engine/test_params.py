"""What a request may ask for: the edges of every range are allowed, and what lies outside is refused with a reason."""

import re
from fractions import Fraction

import numpy as np
import pytest

from internlm2.engine.sampling.params import MAX_LOGPROBS, MAX_SAMPLES, SamplingParams
from internlm2.errors import RequestError

NAN = float("nan")
WHOLE = "must be a whole number."
WHOLE_OR_NONE = "must be a whole number or None."
NUMBER = "must be a number."
PENALTY = "must be from -2 to 2."
ID = "must be a whole number from 0 on."
WORD = "must be at least one id, each a whole number from 0 on."
TEXTS = "must be a tuple of texts, not one text."
NOT_EMPTY = "must be texts of at least one character."
TEMPERATURE = "must be 0 (greedy) or from 0.0001 to 10000."

REFUSED = [
    ({"max_tokens": 1.5}, f"max_tokens is 1.5, but {WHOLE}"),
    ({"min_tokens": "1"}, f"min_tokens is '1', but {WHOLE}"),
    ({"n": 2.0}, f"n is 2.0, but {WHOLE}"),
    ({"top_k": None}, f"top_k is None, but {WHOLE}"),
    ({"priority": 0.5}, f"priority is 0.5, but {WHOLE}"),
    ({"seed": 1.5}, f"seed is 1.5, but {WHOLE_OR_NONE}"),
    ({"logprobs": "3"}, f"logprobs is '3', but {WHOLE_OR_NONE}"),
    ({"prompt_logprobs": 0.5}, f"prompt_logprobs is 0.5, but {WHOLE_OR_NONE}"),
    ({"length_limit": 9.0}, f"length_limit is 9.0, but {WHOLE_OR_NONE}"),
    ({"temperature": "hot"}, f"temperature is 'hot', but {NUMBER}"),
    ({"temperature": True}, f"temperature is True, but {NUMBER}"),
    ({"temperature": 1j}, f"temperature is 1j, but {NUMBER}"),
    ({"top_p": None}, f"top_p is None, but {NUMBER}"),
    ({"min_p": "0.1"}, f"min_p is '0.1', but {NUMBER}"),
    ({"typical_p": [0.5]}, f"typical_p is [0.5], but {NUMBER}"),
    ({"repetition_penalty": None}, f"repetition_penalty is None, but {NUMBER}"),
    ({"presence_penalty": "1"}, f"presence_penalty is '1', but {NUMBER}"),
    ({"frequency_penalty": False}, f"frequency_penalty is False, but {NUMBER}"),
    ({"logit_bias": {7: "1"}}, f"logit_bias of 7 is '1', but {NUMBER}"),
    ({"logit_bias": {7: None}}, f"logit_bias of 7 is None, but {NUMBER}"),
    ({"max_tokens": 0}, "max_tokens is 0, but must be at least 1."),
    ({"min_tokens": -1}, "min_tokens is -1, but must be from 0 to max_tokens."),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, but must be from 0 to max_tokens."),
    ({"length_limit": 0}, "length_limit is 0, but must be from 1 to 2147483648."),
    ({"logprobs": -1}, "logprobs is -1, but must be from 0 to 64."),
    ({"logprobs": 65}, "logprobs is 65, but must be from 0 to 64."),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1, but must be from 0 to 64."),
    ({"prompt_logprobs": 65}, "prompt_logprobs is 65, but must be from 0 to 64."),
    ({"temperature": -0.1}, f"temperature is -0.1, but {TEMPERATURE}"),
    ({"temperature": NAN}, f"temperature is nan, but {TEMPERATURE}"),
    ({"temperature": 1e-40}, f"temperature is 1e-40, but {TEMPERATURE}"),
    ({"temperature": float("inf")}, f"temperature is inf, but {TEMPERATURE}"),
    ({"n": 0}, "n is 0, but must be from 1 to 256."),
    ({"n": 257, "temperature": 1.0}, "n is 257, but must be from 1 to 256."),
    ({"n": 2}, "n is 2, but must be 1 at temperature 0, where all answers are the same (set a temperature)."),
    ({"seed": -1}, "seed is -1, but must be from 0 to 2^63 - 1."),
    ({"seed": 2**63}, f"seed is {2**63}, but must be from 0 to 2^63 - 1."),
    ({"top_k": -1}, "top_k is -1, but must be at least 0 (0 is off)."),
    ({"top_p": 0.0}, "top_p is 0.0, but must be above 0 and at most 1."),
    ({"top_p": 1.5}, "top_p is 1.5, but must be above 0 and at most 1."),
    ({"top_p": NAN}, "top_p is nan, but must be above 0 and at most 1."),
    ({"min_p": -0.5}, "min_p is -0.5, but must be from 0 to 1."),
    ({"min_p": 2.0}, "min_p is 2.0, but must be from 0 to 1."),
    ({"typical_p": 0.0}, "typical_p is 0.0, but must be above 0 and at most 1."),
    ({"typical_p": 1.1}, "typical_p is 1.1, but must be above 0 and at most 1."),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, but must be from 0.01 to 100."),
    ({"repetition_penalty": NAN}, "repetition_penalty is nan, but must be from 0.01 to 100."),
    ({"presence_penalty": 2.1}, f"presence_penalty is 2.1, but {PENALTY}"),
    ({"frequency_penalty": -2.1}, f"frequency_penalty is -2.1, but {PENALTY}"),
    ({"logit_bias": {-1: 1.0}}, f"An id in logit_bias is -1, but {ID}"),
    ({"logit_bias": {"7": 1.0}}, f"An id in logit_bias is '7', but {ID}"),
    ({"logit_bias": {7: 101}}, "logit_bias of 7 is 101, but must be from -100 to 100."),
    ({"logit_bias": {7: NAN}}, "logit_bias of 7 is nan, but must be from -100 to 100."),
    ({"bad_words_ids": ((),)}, f"A word in bad_words_ids is (), but {WORD}"),
    ({"bad_words_ids": ((3, -4),)}, f"A word in bad_words_ids is (3, -4), but {WORD}"),
    ({"stop": "end"}, f"stop is 'end', but {TEXTS}"),
    ({"bad_words": "bad"}, f"bad_words is 'bad', but {TEXTS}"),
    ({"choice": "yes"}, f"choice is 'yes', but {TEXTS}"),
    ({"stop": ("",)}, f"stop is ('',), but {NOT_EMPTY}"),
    ({"bad_words": ("a", "")}, f"bad_words is ('a', ''), but {NOT_EMPTY}"),
    ({"choice": ("",)}, f"choice is ('',), but {NOT_EMPTY}"),
    (
        {"json_schema": {}, "regex": "a"},
        "json_schema and regex are given, but an answer has one form. Keep one of them.",
    ),
    (
        {"regex": "a", "choice": ("a",)},
        "regex and choice are given, but an answer has one form. Keep one of them.",
    ),
    (
        {"json_schema": "{}", "regex": "a", "choice": ("a",)},
        "json_schema and regex and choice are given, but an answer has one form. Keep one of them.",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_values_outside_their_range_are_refused_with_the_reason(values, message):
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 1, "min_tokens": 1, "length_limit": 1, "logprobs": 0, "prompt_logprobs": MAX_LOGPROBS},
        {"logprobs": MAX_LOGPROBS, "prompt_logprobs": 0, "seed": 0, "top_k": 1 << 70, "priority": -5},
        {
            "temperature": 1e-4,
            "n": MAX_SAMPLES,
            "seed": 2**63 - 1,
            "top_p": 1e-9,
            "min_p": 0,
            "typical_p": 1e-9,
        },
        {"temperature": 1e4, "top_p": 1, "min_p": 1, "typical_p": 1, "repetition_penalty": 0.01},
        {"repetition_penalty": 100, "presence_penalty": -2, "frequency_penalty": 2},
        {
            "logit_bias": {0: -100, 5: 100},
            "bad_words_ids": ((0,), (1, 2)),
            "bad_words": ("a",),
            "stop": ("b",),
        },
        {"json_schema": {}},
        {"regex": ""},
        {"choice": ("a", "b")},
    ],
)
def test_the_edges_of_every_range_are_allowed(values):
    params = SamplingParams(**values)
    assert {name: getattr(params, name) for name in values} == values


@pytest.mark.parametrize("kind", [np.float32, np.float64, Fraction, int])
def test_numbers_of_other_kinds_are_allowed(kind):
    assert SamplingParams(temperature=kind(1), logit_bias={3: kind(2)}).temperature == 1


def test_a_request_that_asks_for_nothing_is_greedy_and_unchanged():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.typical_p) == (0, 0, 1, 0, 1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1, 0, 0)


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": True},
        {"logprobs": True},
        {"length_limit": 2**70},
        {"stop_token_ids": (1.5,)},
        {"stop_token_ids": None},
        {"stop_token_ids": 5},
        {"stop": None},
        {"stop": (b"x",)},
        {"choice": ("a", 5)},
        {"bad_words": 5},
        {"logit_bias": None},
        {"logit_bias": [1]},
        {"bad_words_ids": 5},
        {"bad_words_ids": (5,)},
        {"stop": (text for text in ("a",))},  # would be empty after the check
        {"regex": 5},
        {"json_schema": 5},
        {"ignore_eos": "no"},
    ],
)
def test_values_of_another_kind_are_refused_by_name(values):
    with pytest.raises(RequestError, match=next(iter(values))):
        SamplingParams(**values)


def test_numbers_of_numpy_become_plain_ones():
    params = SamplingParams(max_tokens=np.int64(8), length_limit=np.int32(200), seed=np.int64(3))
    assert [type(v) for v in (params.max_tokens, params.length_limit, params.seed)] == [int] * 3
