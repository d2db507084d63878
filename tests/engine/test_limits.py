"""Memory budgets and bad requests: each a clear error, and the engine goes on."""

import json
import shutil

import pytest

from folders import write_adapter, write_chat_folder
from internlm2 import LLM, SamplingParams
from internlm2.engine.reward import RewardScorer
from internlm2.errors import CheckpointError, ConfigError, MemoryBudgetError, RequestError, TokenizerError


@pytest.fixture(scope="module")
def llm(chat_folder):
    return LLM(chat_folder, dtype="float32", memory_gib=0.01, max_num_seqs=4)


@pytest.mark.parametrize(("options", "message"), [
    ({"memory_gib": -1.0}, "memory_gib is -1.0, but must be above 0"),
    ({"host_memory_gib": -1.0}, "host_memory_gib is -1.0"),
    ({"kv_dtype": "int3"}, "kv_dtype is 'int3', but must be None"),
    ({"max_num_seqs": 0}, "max_num_seqs is 0"),
    ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ({"max_model_len": 1}, "max_model_len is 1"),
    ({"max_model_len": "long"}, "max_model_len is 'long'"),
    ({"deterministic": True, "adapters": {"a": "b"}}, "deterministic=True does not go with adapters"),
])  # fmt: skip
def test_impossible_options_are_refused(chat_folder, options, message):
    with pytest.raises(RequestError, match=message):
        LLM(chat_folder, **options)


def test_a_budget_too_small_for_one_sequence_is_told(chat_folder):
    with pytest.raises(
        MemoryBudgetError, match=r"holds \d+ tokens of .* KiB, but one sequence may have 100000"
    ):
        LLM(chat_folder, dtype="float32", max_model_len=100_000, memory_gib=0.01)
    with pytest.raises(MemoryBudgetError, match=r"memory_gib is 1e\+06, but cpu has"):
        LLM(chat_folder, dtype="float32", memory_gib=1e6)


def test_auto_takes_the_longest_that_fits(chat_folder, monkeypatch):
    monkeypatch.setattr("internlm2.checkpoint.memory.available_bytes", lambda: 100 << 20)
    auto = LLM(chat_folder, dtype="float32", max_model_len="auto")
    pool = auto.frontend.engine.scheduler.pool
    cache = auto.frontend.engine.runner.cache
    assert auto.max_model_len == pool.num_pages * 16
    assert (90 << 20) - 16 * cache.num_bytes // (pool.num_pages * 16) <= cache.num_bytes <= 90 << 20


def with_scaling(chat_folder, folder, scaling):
    """The chat model, trained to 256 tokens, with other scaling."""
    shutil.copytree(chat_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("scaling", "longest"), [(None, 256), ({"type": "linear", "factor": 3.0}, 768)])
def test_no_model_is_run_beyond_what_it_is_made_for(chat_folder, tmp_path, scaling, longest):
    folder = with_scaling(chat_folder, tmp_path / "model", scaling)
    message = (
        f"max_model_len is {longest + 1}, but .*model is made for {longest} tokens.*rope_scaling.*dynamic"
    )
    with pytest.raises(RequestError, match=message):
        LLM(folder, max_model_len=longest + 1)
    for length in (longest, "auto", None):
        assert LLM(folder, max_model_len=length, memory_gib=0.01).max_model_len == longest


def test_dynamic_scaling_goes_beyond_the_trained_length(chat_folder):
    assert LLM(chat_folder, max_model_len=1000, memory_gib=0.01).max_model_len == 1000


@pytest.fixture
def unread(monkeypatch):
    """Fails the test when weights are read."""

    def load_checkpoint(*args, **options):
        pytest.fail("weights were read before everything else was checked")

    for loader in ("load_checkpoint", "load_for_inference"):
        monkeypatch.setattr(f"internlm2.engine.build.{loader}", load_checkpoint, raising=False)


@pytest.mark.usefixtures("unread")
def test_wrong_adapters_are_told_before_the_model_is_loaded(chat_folder, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    for change, message in (
        ({"r": 5}, "rank 5 on this model asks for"),
        ({"use_dora": True}, "use_dora is True"),
        ({"r": "4"}, "key 'r' is '4'"),
    ):
        wrong = tmp_path / message[:8]
        shutil.copytree(adapter, wrong)
        config = json.loads((wrong / "adapter_config.json").read_text()) | change
        (wrong / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises((CheckpointError, ConfigError), match=message):
            LLM(chat_folder, adapters={"good": adapter, "wrong": wrong})
    (adapter / "adapter_model.safetensors").unlink()
    for folder, message in (
        (adapter, "has no adapter_model.safetensors"),
        (chat_folder, "has no adapter_config.json"),
        (tmp_path / "nowhere", "nowhere has no adapter_config.json"),
    ):
        with pytest.raises(CheckpointError, match=message):
            LLM(chat_folder, adapters={"wrong": folder})


@pytest.mark.usefixtures("unread")
def test_wrong_drafts_and_heads_are_told_before_the_model_is_loaded(chat_folder, tmp_path):
    reward = write_chat_folder(tmp_path / "reward", head="reward")
    with pytest.raises(CheckpointError, match="has a reward head, but drafting needs CausalLM"):
        LLM(chat_folder, speculative=reward)
    with pytest.raises(CheckpointError, match=r"No model at '.*nowhere'"):
        LLM(chat_folder, speculative=tmp_path / "nowhere")
    shape = write_chat_folder(tmp_path / "shape")
    config = json.loads((shape / "config.json").read_text()) | {"num_hidden_layers": 3}
    (shape / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tensor model.layers.2.*is missing"):
        LLM(chat_folder, speculative=shape)
    (shape / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"No tokenizer: .*shape holds neither"):
        LLM(chat_folder, speculative=shape)
    with pytest.raises(
        CheckpointError, match="has a language head, but scoring conversations needs RewardModel"
    ):
        RewardScorer(chat_folder)


def test_a_reward_scorer_is_closed_once_and_for_all(tmp_path):
    folder = write_chat_folder(tmp_path / "reward", head="reward")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    with RewardScorer(folder, dtype="float32") as scorer:
        assert len(scorer.scores([chat])) == 1
    scorer.close()
    with pytest.raises(RequestError, match=r"This model was closed. Load it again"):
        scorer.scores([chat])


@pytest.mark.parametrize(("prompt", "params", "message"), [
    ([], {}, "The prompt is empty"),
    ([1, 99_999], {}, "The prompt has token id 99999"),
    ([1, -1], {}, "The prompt has token id -1"),
    ([1] * 200_000, {}, "The prompt has 200000 tokens, but this model takes"),
    ([1, 2], {"stop_token_ids": (99_999,)}, "stop_token_ids holds 99999"),
    ([1, 2], {"logit_bias": {99_999: 1.0}}, "logit_bias holds 99999"),
    ([1, 2], {"bad_words_ids": ((99_999,),)}, "bad_words_ids holds 99999"),
    ([1, 2, 3], {"length_limit": 3}, "length_limit is 3, but the prompt alone has"),
])  # fmt: skip
def test_a_bad_request_is_refused_and_the_engine_goes_on(llm, prompt, params, message):
    before = llm.generate(["Hello"], SamplingParams(max_tokens=5))
    with pytest.raises(RequestError, match=message):
        llm.generate(["Hello", prompt], SamplingParams(max_tokens=5, **params))
    assert llm.generate(["Hello"], SamplingParams(max_tokens=5)) == before
    llm.frontend.settle()
    assert not llm.frontend.engine.has_work
    assert llm.frontend.engine.scheduler.pool.num_held == 0


def test_unknown_adapters_and_uneven_params_are_refused(llm):
    with pytest.raises(RequestError, match=r"There is no adapter called 'poet'. None is loaded: load"):
        llm.generate(["Hello"], adapter="poet")
    with pytest.raises(RequestError, match="There are 1 params for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])
    for wrong in ({"temperature": 1}, [{"temperature": 1}], "greedy", [None]):
        with pytest.raises(
            RequestError, match=r"^params is .* must be SamplingParams\(...\), or a list of them"
        ):
            llm.generate(["a"], wrong)
        with pytest.raises(RequestError, match=r"^params is "):
            llm.stream("a", wrong)
    with pytest.raises(RequestError, match="The continuation is empty"):
        llm.score(["a"], [""])


def test_scores_add_up_and_know_what_greedy_would_write(llm):
    [answer] = llm.generate([[1, 70, 71]], SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0))
    [score] = llm.score([[1, 70, 71]], [answer.token_ids])
    assert score.is_greedy
    assert score.token_logprobs == pytest.approx([t.logprob for t in answer.logprobs], abs=1e-5)
    assert score.logprob == pytest.approx(sum(score.token_logprobs))
    other = llm.score([[1, 70, 71]], [[answer.token_ids[0], (answer.token_ids[1] + 1) % 200]])[0]
    assert not other.is_greedy


def test_several_samples_differ_and_share_their_prompt(llm):
    params = SamplingParams(max_tokens=8, n=3, temperature=1.0, seed=4, ignore_eos=True)
    prompt = [1, *range(60, 120)]
    before = llm.stats.num_prompt_tokens
    [out] = llm.generate([prompt], params)
    assert len({tuple(s.token_ids) for s in out.samples}) == 3
    assert out.samples[0].token_ids == out.token_ids
    assert llm.stats.num_prompt_tokens - before < 2 * len(prompt)
    again = llm.generate([prompt], params)[0]
    assert [s.token_ids for s in again.samples] == [s.token_ids for s in out.samples]


def test_leaving_a_stream_early_frees_everything(llm):
    stream = llm.stream("Hello", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert llm.frontend.engine.has_work
    stream.close()
    llm.frontend.settle()
    assert not llm.frontend.engine.has_work
    assert llm.frontend.engine.scheduler.pool.num_held == 0
