"""Continuations that differ in their last token only are scored in one pass, as each alone."""

import pytest
import torch

import internlm2
from internlm2.engine.admission import Admission
from internlm2.engine.llm import LLM
from internlm2.engine.schedule.request import Task
from internlm2.errors import RequestError

PROMPT = [1, *range(40, 90)]  # several pages and a part of one
CONTINUATIONS = ([65], [66], [67, 68], [67, 69], [65], [68], [67, 68, 70])


@pytest.fixture(scope="module")
def llm(chat_folder) -> LLM:
    torch.set_num_threads(1)
    return LLM(chat_folder, dtype="float32", max_model_len=200, chunk_tokens=32)


@torch.inference_mode()
def by_the_network(folder, ids: list[int], start: int) -> tuple[list[float], bool]:
    """Log-probabilities of the ids from `start` on, and whether each is the likeliest."""
    logits = internlm2.load_model(folder)(torch.tensor([ids]))[0].double().log_softmax(-1)
    each = [float(logits[p - 1, ids[p]]) for p in range(start, len(ids))]
    return each, all(int(logits[p - 1].argmax()) == ids[p] for p in range(start, len(ids)))


@pytest.mark.parametrize("prompts", [[PROMPT] * 7, [PROMPT[n % 2 :] for n in range(7)]])
def test_scores_are_those_of_the_network(prompts, llm, chat_folder):
    found = llm.score(prompts, CONTINUATIONS)
    for prompt, continuation, score in zip(prompts, CONTINUATIONS, found, strict=True):
        each, is_greedy = by_the_network(chat_folder, [*prompt, *continuation], len(prompt))
        assert score.token_logprobs == pytest.approx(each, abs=1e-4)
        assert score.token_ids == continuation
        assert score.logprob == pytest.approx(sum(each), abs=1e-4)
        assert score.is_greedy == is_greedy


def test_the_likeliest_token_is_greedy(llm, chat_folder):
    logits = internlm2.load_model(chat_folder)(torch.tensor([PROMPT]))[0, -1]
    best = int(logits.argmax())
    found = llm.score([PROMPT, PROMPT], [[best], [(best + 1) % 400]])
    assert [score.is_greedy for score in found] == [True, False]


def test_one_pass_is_computed_for_all(chat_folder):
    llm = LLM(chat_folder, dtype="float32", max_model_len=200)
    llm.score([PROMPT] * 4, [[65], [66], [67], [68]])
    assert llm.stats.num_prompt_tokens == len(PROMPT)
    llm.score([PROMPT] * 2, [[70, 65], [70, 66]])
    assert llm.stats.num_prompt_tokens <= len(PROMPT) + 16 + 2, "whole pages come from the cache"


def test_the_longest_text_is_as_long_as_before(llm):
    ids = [1] + [65] * 199
    assert len(llm.score([ids[:-1]], [ids[-1:]])) == 1
    with pytest.raises(RequestError, match="The prompt has 201 tokens"):
        llm.score([ids], [[65]])


@pytest.mark.parametrize("bad", [-1, 512])
def test_ids_outside_the_vocabulary_are_refused(bad, llm):
    with pytest.raises(RequestError, match=f"has token id {bad}"):
        llm.score([PROMPT] * 2, [[65], [bad]])
    assert not llm.frontend.engine.has_work


class Looked(int):
    """A token id that counts how often it is compared."""

    times = 0

    def __lt__(self, other: int) -> bool:
        Looked.times += 1
        return int(self) < other


def test_a_prompt_is_looked_at_once_whatever_the_alternatives(llm):
    admission = Admission(llm.model.config, llm.tokenizer, max_model_len=200)
    prompt = [Looked(token) for token in PROMPT]
    times = []
    for alternatives in ([], [65], [65, 66, 67, 68]):
        Looked.times = 0
        admission.reading(prompt, Task.SCORE, alternatives)
        times.append(Looked.times)
    assert times[1] == times[2] <= times[0] + 1
    assert times[0] >= len(PROMPT) - 1
