"""Text in, text out: streams equal whole answers, stops stop, conversations follow the format."""

import json
import shutil
import time

import pytest
import torch

import internlm2
from folders import write_chat_folder
from goldens import golden_folder
from internlm2 import LLM, SamplingParams
from internlm2.checkpoint.open import open_checkpoint
from internlm2.engine.reward import RewardScorer
from internlm2.engine.text import Piece
from internlm2.errors import ChatError, CheckpointError, RequestError

MESSAGES = [{"role": "user", "content": "你好, world"}]


@pytest.fixture(scope="module")
def llm(chat_folder):
    return LLM(chat_folder, dtype="float32")


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_results_come_in_prompt_order_and_text_gets_bos(llm):
    outs = llm.generate(["Hello", [1, 70, 71], "Hello"], SamplingParams(max_tokens=6))
    assert outs[0] == outs[2]
    assert outs[0].prompt_token_ids == [1, *llm.tokenizer.encode("Hello")]
    assert outs[1].prompt_token_ids == [1, 70, 71]
    assert outs[0].text == llm.tokenizer.decode(outs[0].token_ids, skip_special=True)


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_joined_is_the_whole_answer(llm, seed):
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=seed)
    pieces = list(llm.stream("Hello", params))
    whole = llm.generate(["Hello"], params)[0]
    assert joined(pieces) == whole.text
    assert [t for p in pieces for t in p.token_ids] == whole.token_ids
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reason


def test_progress_is_told_until_the_prompt_is_read(llm, monkeypatch):
    forward = llm.frontend.engine.runner.forward

    def slow(batch):
        time.sleep(0.3)
        return forward(batch)

    monkeypatch.setattr(llm.frontend.engine.runner, "forward", slow)
    ids = [1, *[70] * 1300]
    told = []
    pieces = llm.stream(ids, SamplingParams(max_tokens=3), on_progress=lambda *numbers: told.append(numbers))
    next(pieces)
    assert [total for _, total in told] == [len(ids)] * len(told)
    assert [done for done, _ in told] == [512, 1024, len(ids)]
    list(pieces)
    assert len(told) == 3


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(llm):
    free = llm.generate(["Hello"], SamplingParams(max_tokens=60, temperature=1.0, seed=1))[0].text
    stop = free[10:13]
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=1, stop=(stop,))
    for answer, reason in (
        (joined(list(llm.stream("Hello", params))), list(llm.stream("Hello", params))[-1].finish_reason),
        (llm.generate(["Hello"], params)[0].text, llm.generate(["Hello"], params)[0].finish_reason),
    ):
        assert answer == free[: free.index(stop)]
        assert reason == "stop"


def test_a_chat_is_the_rendered_conversation(llm):
    params = SamplingParams(max_tokens=8)
    out = llm.chat(MESSAGES, params)
    assert out.prompt_token_ids == llm.tokenizer.apply_chat(MESSAGES)
    assert out.token_ids == llm.generate([llm.tokenizer.apply_chat(MESSAGES)], params)[0].token_ids
    assert joined(list(llm.stream_chat(MESSAGES, params))) == out.text


def test_an_answer_ends_at_every_stop_token_of_the_model(llm, monkeypatch):
    free = llm.generate(["Hello"], SamplingParams(max_tokens=20))[0]
    stops = frozenset({free.token_ids[7]})
    monkeypatch.setattr(type(llm.tokenizer), "stop_ids", stops)
    out = llm.generate(["Hello"], SamplingParams(max_tokens=20))[0]
    assert out.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[7])]
    assert out.finish_reason == "stop"


def test_the_longest_length_is_kept(chat_folder):
    short = LLM(chat_folder, dtype="float32", max_model_len=12)
    out = short.generate([[1, 70, 71, 72]], SamplingParams(max_tokens=100, ignore_eos=True))[0]
    assert len(out.token_ids) == 8
    with pytest.raises(RequestError, match="The prompt has 12 tokens, but this model takes 12"):
        short.generate([[1] * 12])
    dynamic = LLM(chat_folder, memory_gib=0.01)  # stretches as far as the memory goes
    assert dynamic.max_model_len == dynamic.frontend.engine.scheduler.pool.num_pages * 16


def test_a_long_neighbour_does_not_shorten_an_answer(chat_folder):
    short = LLM(chat_folder, dtype="float32", max_model_len=60)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = [[1, 70, 71], [1, *range(60, 112)]]
    together = short.generate(prompts, params)
    assert together == [short.generate([prompt], params)[0] for prompt in prompts]
    assert [len(out.token_ids) for out in together] == [57, 7]


def test_numbers_of_torch_are_plain_numbers(llm):
    prompt = torch.tensor([1, 70, 71])
    out = llm.generate([prompt], SamplingParams(max_tokens=3))[0]
    assert out == llm.generate([prompt.tolist()], SamplingParams(max_tokens=3))[0]
    assert {type(token) for token in out.prompt_token_ids} == {int}


def test_a_length_without_room_is_refused(chat_folder):
    with pytest.raises(RequestError, match="max_model_len is 0"):
        LLM(chat_folder, max_model_len=0)


def test_a_gguf_without_a_tokenizer_is_told(monkeypatch, chat_folder):
    monkeypatch.setattr("internlm2.engine.build.open_checkpoint", _without_tokenizer)
    for make in (LLM, RewardScorer):
        with pytest.raises(CheckpointError, match="has weights but no tokenizer"):
            make(chat_folder)


def _without_tokenizer(path):
    checkpoint = open_checkpoint(path)
    checkpoint.tokenizer_folder = None
    return checkpoint


def test_without_scaling_the_trained_length_is_the_limit(chat_folder, tmp_path):
    copy = shutil.copytree(chat_folder, tmp_path / "model")
    for scaling, expected in ((None, 256), ({"type": "linear", "factor": 4.0}, 1024)):
        config = json.loads((copy / "config.json").read_text()) | {"rope_scaling": scaling}
        (copy / "config.json").write_text(json.dumps(config))
        assert LLM(copy).max_model_len == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_answer_too(chat_folder, dtype):
    llm = LLM(chat_folder, dtype=dtype)
    assert llm.model.model.tok_embeddings.weight.dtype == getattr(torch, dtype)
    assert len(llm.generate(["Hello"], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


def test_mistakes_are_refused(llm, tmp_path):
    with pytest.raises(RequestError, match="prompts is one text, but must be a list"):
        llm.generate("Hello")
    with pytest.raises(RequestError, match="The prompt is empty"):
        llm.generate([[]])
    with pytest.raises(ChatError):
        llm.chat([{"role": "nobody", "content": "x"}])
    folder = write_chat_folder(tmp_path / "m", head="reward")
    with pytest.raises(CheckpointError, match="has a reward head"):
        LLM(folder)


def test_the_package_offers_its_names_lazily():
    assert set(internlm2.__all__) <= set(dir(internlm2)) | set(internlm2._HOMES)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        internlm2.nonsense  # noqa: B018


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = write_chat_folder(tmp_path_factory.mktemp("reward") / "model", head="reward")
    return RewardScorer(folder, dtype="float32")


class TestReward:
    ANSWERS = ("Hello! How can I help?", "No.", "I have no idea.")

    def talks(self) -> list[list[dict[str, str]]]:
        return [
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
            for answer in self.ANSWERS
        ]

    def test_the_reward_token_ends_the_conversation_once(self, scorer):
        ids = scorer.encode(self.talks()[0])
        assert ids[-1] == scorer.model.config.reward_token_id
        assert ids[:-1] == scorer.tokenizer.apply_chat(self.talks()[0], add_generation_prompt=False)

    def test_an_answer_is_encoded_with_its_header_as_the_official_code_does(self, scorer, official_folder):
        tokenizer = internlm2.Tokenizer.from_pretrained(official_folder)
        talk = [{"role": "assistant", "content": "\nHello"}]
        ids = tokenizer.apply_chat(talk, add_generation_prompt=False, whole_turns=True)
        whole = tokenizer.encode(tokenizer.render_chat(talk, add_generation_prompt=False), allow_special=True)
        assert ids == whole
        assert ids != tokenizer.apply_chat(talk, add_generation_prompt=False)  # a line break merges here

    def test_a_batch_scores_as_each_alone(self, scorer):
        together = scorer.scores(self.talks())
        alone = [scorer.scores([talk])[0] for talk in self.talks()]
        torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-5, atol=1e-5)
        assert len(set(together)) == 3

    def test_rank_gives_indices_best_first(self, scorer):
        scores, order = scorer.scores(self.talks()), scorer.rank(self.talks())
        assert [scores[i] for i in order] == sorted(scores, reverse=True)
        best, worst = self.talks()[order[0]], self.talks()[order[-1]]
        assert scorer.compare(best, worst)
        assert not scorer.compare(worst, best)

    def test_no_conversations_are_refused(self, scorer):
        with pytest.raises(RequestError, match="No conversations to score"):
            scorer.scores([])

    def test_a_language_model_is_refused(self, chat_folder):
        with pytest.raises(
            CheckpointError, match="has a language head, but scoring conversations needs RewardModel"
        ):
            RewardScorer(chat_folder)

    def test_weights_without_tokenizer_are_refused(self):
        with pytest.raises(internlm2.errors.TokenizerError, match="No tokenizer"):
            RewardScorer(golden_folder("reward"))


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.embed("hello"),
        lambda llm: llm.score("abc", "xyz"),
        lambda llm: llm.score(["a", "b"], ["c"]),
        lambda llm: llm.score(["a"], [[1.5]]),
        lambda llm: llm.generate([b"abc"]),
        lambda llm: llm.generate({"a"}),
        lambda llm: llm.generate([5, 6, 7]),
        lambda llm: llm.generate([None]),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(llm, call):
    with pytest.raises(RequestError):
        call(llm)
    assert not llm.frontend.engine.has_work


def test_prompt_logprobs_come_also_with_a_stop_string(llm):
    first = llm.generate(["Hello"], SamplingParams(max_tokens=4))[0].text[:2]
    plain, stopped = (
        llm.generate(["Hello"], SamplingParams(max_tokens=20, prompt_logprobs=1, stop=stop))[0]
        for stop in ((), (first,))
    )
    assert stopped.finish_reason == "stop"
    assert stopped.prompt_logprobs == plain.prompt_logprobs
    assert len(plain.prompt_logprobs) == len(plain.prompt_token_ids) - 1


def test_a_form_ends_the_answer_also_where_stop_tokens_are_ignored(llm):
    params = SamplingParams(max_tokens=40, choice=("hello", "world"), ignore_eos=True)
    answer = llm.generate(["Hello"], params)[0]
    assert (answer.text in params.choice, answer.finish_reason) == (True, "stop")


def test_no_texts_have_no_vectors(llm):
    assert llm.embed([]).shape == (0, llm.embed(["a"]).shape[1])
