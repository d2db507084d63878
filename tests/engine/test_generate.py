"""The generation loop: results do not depend on company, prompts are checked, stops stop."""

import pytest
import torch

from goldens import golden_folder
from internlm2 import SamplingParams, load_model
from internlm2.checkpoint import memory
from internlm2.engine.generate import generate, stream
from internlm2.errors import MemoryBudgetError, RequestError

PROMPTS = [[1, 17, 300], [1, 44], [1, *range(3, 90)], [1, 17, 300, 4]]


@pytest.fixture(scope="module", params=["gqa", "dynamic-ntk"])
def model(request):
    return load_model(golden_folder(request.param))


@pytest.mark.parametrize("params", [
    SamplingParams(max_tokens=20),
    SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, seed=5),
    SamplingParams(max_tokens=9, repetition_penalty=1.2),
])  # fmt: skip
def test_a_batch_gives_what_each_prompt_gives_alone(model, params):
    together = generate(model, PROMPTS, params)
    assert together == [generate(model, [prompt], params)[0] for prompt in PROMPTS]


def test_rows_that_finish_early_leave_the_others_alone(model):
    full = generate(model, PROMPTS, SamplingParams(max_tokens=12))
    stop_id = full[1].token_ids[3]
    params = SamplingParams(max_tokens=12, stop_token_ids=(stop_id,))
    for before, after in zip(full, generate(model, PROMPTS, params), strict=True):
        if stop_id in before.token_ids:
            assert after.token_ids == before.token_ids[: before.token_ids.index(stop_id)]
            assert after.finish_reason == "stop"
        else:
            assert after == before


def test_the_model_s_own_stops_can_be_ignored(model):
    free = generate(model, [[1, 5]], SamplingParams(max_tokens=8))[0]
    stops = frozenset({free.token_ids[2]})
    stopped = generate(model, [[1, 5]], SamplingParams(max_tokens=8), stop_ids=stops)[0]
    ignored = generate(model, [[1, 5]], SamplingParams(max_tokens=8, ignore_eos=True), stop_ids=stops)[0]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 8
    assert ignored == free


def test_min_tokens_holds_a_stop_back(model):
    free = generate(model, [[1, 5]], SamplingParams(max_tokens=8))[0]
    params = SamplingParams(max_tokens=8, min_tokens=6, stop_token_ids=(free.token_ids[0],))
    assert len(generate(model, [[1, 5]], params)[0].token_ids) >= 6


def test_steps_come_one_by_one(model):
    steps = list(stream(model, [[1, 5], [1, 6]], SamplingParams(max_tokens=3)))
    assert [s.row for s in steps] == [0, 1, 0, 1, 0, 1]
    assert [s.finish_reason for s in steps] == [None] * 4 + ["length"] * 2


def test_each_prompt_may_have_its_own_params(model):
    each = [SamplingParams(max_tokens=n + 2, temperature=n * 0.3, seed=n) for n in range(len(PROMPTS))]
    together = generate(model, PROMPTS, each)
    assert together == [generate(model, [p], one)[0] for p, one in zip(PROMPTS, each, strict=True)]
    assert [len(c.token_ids) for c in together] == [2, 3, 4, 5]


def test_a_stop_id_that_does_not_exist_is_refused(model):
    with pytest.raises(RequestError, match="stop_token_ids holds 1000000, but ids go from 0 to 511"):
        generate(model, [[1]], SamplingParams(stop_token_ids=(10**6,), min_tokens=3))


def test_no_prompts_give_no_results(model):
    assert generate(model, [], SamplingParams()) == []


def test_the_cache_grows_beyond_its_first_block():
    model = load_model(golden_folder("dynamic-ntk"))
    prompt = [1, *(i % 500 + 3 for i in range(600))]
    found = generate(model, [prompt], SamplingParams(max_tokens=5))[0].token_ids
    ids = torch.tensor([prompt])
    for token in found:  # without any cache, the base fixed by the same limit
        with torch.no_grad():
            logits = model(ids, length_limits=torch.tensor([606]))
        assert logits[0, -1].argmax().item() == token
        ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "Prompt 1 is empty"), ([[1, 512]], "Prompt 0 has token id 512, but the embedding has 512 rows"),
     ([[-1]], "token id -1")],
)  # fmt: skip
def test_bad_prompts_are_refused(model, prompts, message):
    with pytest.raises(RequestError, match=message):
        generate(model, prompts, SamplingParams())


def test_a_cache_that_cannot_fit_is_told_before(model, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryBudgetError, match=r"The key/value cache of 1 x 10 tokens needs"):
        generate(model, [[1, 2]], SamplingParams(max_tokens=8))


def test_rows_of_the_embedding_without_a_token_are_never_chosen(model):
    free = generate(model, PROMPTS, SamplingParams(max_tokens=20))
    limit = max(max(c.token_ids) for c in free)
    found = generate(model, PROMPTS, SamplingParams(max_tokens=20), vocab_size=limit)
    assert max(max(c.token_ids) for c in found) < limit
