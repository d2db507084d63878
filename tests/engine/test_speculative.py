"""Guesses change the speed of an answer and never its tokens; whatever is asked for, and whoever guesses."""

import json
import shutil

import pytest
import torch

from folders import write_chat_folder
from internlm2 import LLM, SamplingParams
from internlm2.checkpoint.formats.official import ModelCheckpoint
from internlm2.checkpoint.save import save_checkpoint
from internlm2.engine.schedule.request import Sequence
from internlm2.engine.speculative import (
    FIRST_CREDIT,
    INCOME,
    ROW_COST,
    TRY_COST,
    TRY_COST_FLOAT32,
    PromptLookup,
    Purse,
)
from internlm2.errors import CheckpointError, RequestError
from internlm2.model import ModelConfig, build_model

REPETITIVE = [1, *([70, 71, 72, 73, 74] * 8)]
PROMPTS = [
    "Hello",
    REPETITIVE,
    "one two three one two three one two",
    [1, *range(20, 90)],
    "a" * 40,
    [1, 400, 511],
]


@pytest.fixture(scope="module")
def plain(chat_folder):
    return LLM(chat_folder, dtype="float32")


@pytest.fixture(scope="module")
def bad_draft(chat_folder, tmp_path_factory):
    """Another random model of the same vocabulary, smaller in every way, with fewer rows than the large one."""
    folder = tmp_path_factory.mktemp("draft") / "model"
    config = ModelConfig(
        vocab_size=261,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(5))
    save_checkpoint(ModelCheckpoint(model), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(chat_folder / name, folder)
    return folder


@pytest.fixture(scope="module", params=["lookup", "itself", "bad draft"])
def speculating(request, chat_folder, bad_draft):
    who = {"lookup": "lookup", "itself": chat_folder, "bad draft": bad_draft}[request.param]
    return LLM(chat_folder, dtype="float32", speculative=who)


def drafted(llm: LLM, prompts, params) -> tuple[list, int, int]:
    """The answers, and how many tokens were guessed and agreed to; the engine is clean afterwards."""
    before = (llm.stats.num_drafted_tokens, llm.stats.num_accepted_tokens)
    outs = llm.generate(prompts, params)
    llm.frontend.engine.scheduler.check_integrity()
    assert llm.frontend.engine.scheduler.pool.num_held == 0
    return outs, llm.stats.num_drafted_tokens - before[0], llm.stats.num_accepted_tokens - before[1]


CASES = {
    "greedy": SamplingParams(max_tokens=70, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True),
    "cold": SamplingParams(max_tokens=60, temperature=0.05, seed=4, top_k=20, top_p=0.9),
    "several": SamplingParams(max_tokens=40, temperature=0.1, seed=5, n=3),
    "stops": SamplingParams(max_tokens=60, temperature=0.3, seed=1, stop_token_ids=tuple(range(5, 261, 7))),
    "early stops": SamplingParams(max_tokens=60, min_tokens=20, stop_token_ids=tuple(range(5, 261, 2))),
    "penalties": SamplingParams(
        max_tokens=50, repetition_penalty=1.05, presence_penalty=0.05, frequency_penalty=0.02, ignore_eos=True
    ),
    "pushed": SamplingParams(max_tokens=50, logit_bias={80: 3.0, 81: 2.5}, bad_words_ids=((80, 80), (90,))),
    "one letter": SamplingParams(max_tokens=40, regex="(ab){4,30}", temperature=0.5, seed=8),
    "json": SamplingParams(max_tokens=60, json_schema={"type": "array", "items": {"enum": ["aaaa", "aaab"]}}),
    "logprobs": SamplingParams(max_tokens=40, prompt_logprobs=0, ignore_eos=True),
}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_with_guesses_is_the_answer_without(plain, speculating, name):
    expected = plain.generate(PROMPTS, CASES[name])
    outs, num_drafted, num_accepted = drafted(speculating, PROMPTS, CASES[name])
    assert [out.samples for out in outs] == [out.samples for out in expected]
    assert 0 <= num_accepted <= num_drafted
    if name in ("greedy", "cold", "penalties"):
        assert num_drafted > 0  # or the test shows nothing


def test_log_probabilities_stand_beside_their_tokens(plain, speculating):
    params = SamplingParams(max_tokens=50, logprobs=2, ignore_eos=True)
    [expected], [out] = plain.generate([REPETITIVE], params), speculating.generate([REPETITIVE], params)
    assert out.token_ids == expected.token_ids
    torch.testing.assert_close(
        torch.tensor([token.logprob for token in out.logprobs]),
        torch.tensor([token.logprob for token in expected.logprobs]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_stop_string_inside_agreed_tokens_cuts_at_the_same_place(plain, speculating, seed):
    params = SamplingParams(max_tokens=60, temperature=0.05, seed=seed, ignore_eos=True)
    free = plain.generate([REPETITIVE], params)[0].text
    for start in (7, 20, 33):
        own = SamplingParams(
            max_tokens=60, temperature=0.05, seed=seed, ignore_eos=True, stop=(free[start : start + 3],)
        )
        assert drafted(speculating, [REPETITIVE], own)[0] == plain.generate([REPETITIVE], own)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 17])
def test_the_last_token_is_the_last_whatever_was_guessed(plain, speculating, count):
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    outs, _, _ = drafted(speculating, PROMPTS, params)
    assert [len(out.token_ids) for out in outs] == [count] * len(PROMPTS)
    assert outs == plain.generate(PROMPTS, params)


def test_a_stream_joined_is_the_whole_answer(plain, speculating):
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    pieces = list(speculating.stream(REPETITIVE, params))
    assert [t for piece in pieces for t in piece.token_ids] == plain.generate([REPETITIVE], params)[
        0
    ].token_ids


@pytest.mark.parametrize("who", ["lookup", "itself", "bad draft"])
def test_with_hardly_any_memory_sequences_come_back_and_answer_the_same(plain, chat_folder, bad_draft, who):
    speculative = {"lookup": "lookup", "itself": chat_folder, "bad draft": bad_draft}[who]
    page_bytes = 16 * (512 + {"lookup": 0, "itself": 512, "bad draft": 64}[who])
    llm = LLM(
        chat_folder,
        dtype="float32",
        speculative=speculative,
        memory_gib=14.5 * page_bytes / (1 << 30),
        max_model_len=160,
        chunk_tokens=24,
    )
    assert llm.frontend.engine.scheduler.pool.num_pages == 14
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for _ in range(2):  # the second time from what is left in the cache
        outs, num_drafted, _ = drafted(llm, PROMPTS, params)
        assert outs == plain.generate(PROMPTS, params)
        assert num_drafted > 0
    assert llm.stats.num_preemptions > 0


def test_a_model_that_guesses_for_itself_is_always_right(chat_folder, monkeypatch):
    monkeypatch.setattr("internlm2.engine.build.TRY_COST_FLOAT32", TRY_COST)  # as if guessing were worth it
    llm = LLM(chat_folder, dtype="float32", speculative=chat_folder, num_draft_tokens=4)
    for params in (
        SamplingParams(max_tokens=60, ignore_eos=True),
        SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0, seed=2),
    ):
        for _ in range(2):  # alone on a cold cache, then on shared pages
            steps = llm.stats.num_steps
            _, num_drafted, num_accepted = drafted(llm, PROMPTS, params)
            assert num_accepted == num_drafted > 0
            assert llm.stats.num_steps - steps <= 20  # 60 tokens, up to five in a step


def test_a_bad_drafter_is_soon_left_alone(chat_folder, bad_draft):
    llm = LLM(chat_folder, dtype="float32", speculative=bad_draft)
    _, num_drafted, num_accepted = drafted(llm, ["Hello"], SamplingParams(max_tokens=100, ignore_eos=True))
    assert 0 < num_drafted < 30
    assert num_accepted < num_drafted / 2


def test_an_interrupted_step_leaves_nothing_behind(plain, chat_folder, monkeypatch):
    llm = LLM(chat_folder, dtype="float32", speculative=chat_folder)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    forward, calls = llm.frontend.engine.runner.forward, []

    def failing(batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(batch)

    monkeypatch.setattr(llm.frontend.engine.runner, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, params)
    assert drafted(llm, PROMPTS, params)[0] == plain.generate(PROMPTS, params)


# -- the drafters alone -----------------------------------------------------------------------------------


def sequence(tokens: list[int]) -> Sequence:
    return Sequence(sequence_id=0, tokens=list(tokens), max_total_tokens=1000)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 2, 3], [4, 5, 6, 2]),
        ([1, 2, 9, 9, 1, 2, 8, 8, 1, 2], [8, 8, 1, 2]),  # the latest place
        (
            [5, 1, 2, 9, 6, 1, 2, 8, 5, 1, 2],
            [9, 6, 1, 2],
        ),  # the longest agreement goes before the latest place
        ([7, 3, 3, 3], [3, 3, 3, 3]),
        ([7, 1, 2, 1, 2, 1], [2, 1, 2, 1]),
    ],
)
def test_lookup_copies_what_followed_the_same_tokens(tokens, expected):
    lookup, own = PromptLookup(), sequence(tokens)
    assert lookup.wanted(own) == 4
    assert lookup.propose([own], [4], []) == [expected]
    stepwise, own = PromptLookup(), sequence(tokens[:1])
    for token in tokens[1:]:
        stepwise.wanted(own)
        own.tokens.append(token)
    stepwise.wanted(own)
    assert stepwise.propose([own], [4], []) == [expected]


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 2, 3, 4], [5, 1, 6, 1]])
def test_lookup_is_silent_where_nothing_repeats(tokens):
    assert PromptLookup().wanted(sequence(tokens)) == 0


@pytest.mark.parametrize("try_cost", [TRY_COST, TRY_COST_FLOAT32])
def test_what_bad_luck_costs_stays_below_its_bound(try_cost):
    purse, cost, num_steps = Purse(ROW_COST, 8, try_cost), 0.0, 2000
    for _ in range(num_steps):
        purse.earn()
        if count := purse.affordable():
            purse.settle(count, 0)
            cost += try_cost + count * ROW_COST
    assert try_cost < cost <= try_cost + FIRST_CREDIT + INCOME * num_steps


def test_good_luck_soon_guesses_as_much_as_allowed():
    purse = Purse(ROW_COST, 8)
    purse.settle(purse.affordable(), purse.affordable())
    assert purse.affordable() == 8
    purse.settle(8, 2)
    assert purse.affordable() == 3


def test_a_finished_sequence_is_forgotten(chat_folder):
    lookup, own = PromptLookup(), sequence([1, 2, 3, 1, 2])
    lookup.wanted(own)
    lookup.forget(own)
    lookup.forget(own)
    assert not lookup._lookups
    llm = LLM(chat_folder, dtype="float32", speculative="lookup")
    llm.generate(["Hello"], SamplingParams(max_tokens=5))
    assert not llm.frontend.engine._drafter._lookups


# -- what is refused --------------------------------------------------------------------------------------


def test_settings_that_do_not_go_with_speculation_are_refused(chat_folder):
    with pytest.raises(RequestError, match="deterministic=True does not go with speculative decoding"):
        LLM(chat_folder, speculative="lookup", deterministic=True)
    with pytest.raises(RequestError, match="host_memory_gib does not go with a draft model"):
        LLM(chat_folder, speculative=chat_folder, host_memory_gib=0.01)
    with pytest.raises(RequestError, match="num_draft_tokens is 0, but must be at least 1"):
        LLM(chat_folder, speculative="lookup", num_draft_tokens=0)


def test_a_draft_model_of_another_kind_is_refused(chat_folder, tmp_path):
    other = shutil.copytree(chat_folder, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        RequestError, match=r"has another vocabulary \(261 tokens against 261, 2 of them different"
    ):
        LLM(chat_folder, speculative=other)
    reward = write_chat_folder(tmp_path / "reward", head="reward")
    with pytest.raises(CheckpointError, match="has a reward head, but drafting needs CausalLM"):
        LLM(chat_folder, speculative=reward)
