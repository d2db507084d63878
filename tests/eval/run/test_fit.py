"""How prompts are shortened, and how labels are compared: against cases worked out by hand."""

from dataclasses import replace

import pytest

from internlm2.errors import RequestError
from internlm2.eval.model import Request, compare_labels, fit
from internlm2.eval.task import ChatPrompt, TextPrompt, Turn


def letters(prompt, label: str) -> list[int]:
    return [0, *prompt.text.encode(), *label.encode()]


def test_examples_go_first_then_the_beginning():
    prompt = TextPrompt("head ", "question", ("one ", "two ", "three "))
    request = Request("x:0", prompt, ("A", "B"), max_context_tokens=100)

    def texts(limit: int, **more) -> tuple[list[str], int, int]:
        found = fit(
            replace(request, max_context_tokens=limit, **more), letters, max_model_len=99, num_start=1
        )
        assert all(ids[0] == 0 for ids in found.token_ids), "the start id stays"
        return [bytes(ids[1:]).decode() for ids in found.token_ids], found.dropped_shots, found.cut_tokens

    whole = len("head one two three question") + 2
    assert texts(whole)[1:] == (0, 0)
    assert texts(whole - 1) == (["head one two questionA", "head one two questionB"], 1, 0)
    assert texts(whole - 7) == (["head one questionA", "head one questionB"], 2, 0)
    assert texts(12) == (["d questionA", "d questionB"], 3, 3)
    # an answer needs room too, but drops no example: that is the protocol
    assert texts(whole, labels=(), max_tokens=10)[1:] == (0, 9)


def test_where_only_the_model_limits_the_examples_make_room_for_the_answer():
    prompt = TextPrompt("", "question", ("one ", "two "))
    request = Request("x:0", prompt, max_tokens=10)
    found = fit(request, letters, max_model_len=25, num_start=1)
    assert (bytes(found.token_ids[0][1:]), found.dropped_shots, found.cut_tokens) == (b"one question", 1, 0)


def test_no_room_for_any_prompt_is_refused():
    request = Request("gsm8k:7", TextPrompt("", "q"), max_tokens=512, max_context_tokens=2048)
    with pytest.raises(RequestError, match=r"gsm8k:7 asks for 512 tokens of answer, but .* only 300"):
        fit(request, letters, max_model_len=300, num_start=1)


def test_labels_of_one_length_are_compared_by_what_differs():
    tokens = [["<s>", "q", " A"], ["<s>", "q", " B"]]
    assert compare_labels(tokens, [[-5.0, -1.0], [-5.0, -2.0]]) == (-1.0, -2.0)
    assert compare_labels(tokens, [[-1.0], [-2.0]]) == (-1.0, -2.0), "the common part may be left out"


def test_labels_of_several_lengths_are_compared_by_the_mean_over_the_whole_text():
    tokens = [["<s>", "q", "A"], ["<s>", "q", "B", "B"]]
    assert compare_labels(tokens, [[-3.0, -3.0], [-3.0, -2.0, -2.0]]) == (-2.0, -1.75)


def test_log_probabilities_that_are_no_numbers_are_an_error():
    with pytest.raises(RequestError, match="log-probabilities that are no numbers"):
        compare_labels([[1, 2], [1, 3]], [[float("nan")], [-1.0]])


def test_a_chat_prompt_drops_its_shots_in_pairs():
    shot = (Turn("user", "one"), Turn("assistant", "A"))
    prompt = ChatPrompt((), (Turn("user", "two"),), (shot, shot))
    request = Request("x:0", prompt, max_tokens=1, max_context_tokens=len(prompt.text))
    found = fit(request, letters, max_model_len=10_000, num_start=1)
    assert found.dropped_shots == 1
