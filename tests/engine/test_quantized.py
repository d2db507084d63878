"""The engine on packed weights: what a request gets does not depend on its company, and the options say what goes."""

import pytest
import torch

from folders import write_adapter, write_chat_folder
from internlm2 import LLM, SamplingParams
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.save import save_checkpoint
from internlm2.engine.options import EngineOptions
from internlm2.engine.reward import RewardScorer
from internlm2.engine.speculative import DraftModel
from internlm2.errors import RequestError
from internlm2.kernels.library import library
from internlm2.quant.linear import PackedLinear

PROMPTS = ["Hello", "你好, world", [1, *range(40, 120)], "A longer text that takes more than one page. " * 3]


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_many_at_once_and_cached_get_what_each_gets_alone(chat_folder, kind):
    llm = LLM(chat_folder, dtype="float32", quantization=kind, chunk_tokens=48)
    assert isinstance(llm.model.output, PackedLinear)
    params = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=1)
    alone = LLM(chat_folder, dtype="float32", quantization=kind, prefix_cache=False)
    expected = [alone.generate([prompt], params)[0] for prompt in PROMPTS]
    for _ in range(2):  # the second time from the cache
        for one, other in zip(llm.generate(PROMPTS, params), expected, strict=True):
            assert one.token_ids == other.token_ids
            ours, theirs = ([token.logprob for token in out.logprobs] for out in (one, other))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert llm.stats.num_cached_tokens > 0


def test_few_bits_stay_close_and_fewer_less_so(chat_folder):
    texts, endings = ["The river was", "def add(a, b):"], [" wide and slow", " return a + b"]
    exact, *others = (
        torch.tensor(
            [
                logprob
                for score in LLM(chat_folder, dtype="float32", quantization=kind).score(texts, endings)
                for logprob in score.token_logprobs
            ]
        )
        for kind in (None, "bfloat16", "int8", "int4")
    )
    losses = [float((other - exact).abs().mean()) for other in others]
    assert 0 < losses[1] < losses[2] < 0.1
    assert losses[0] < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantization": "int3"},
            "quantization is 'int3', but must be one of auto, none, bfloat16, int8, int4",
        ),
        ({"quantization": "int8", "deterministic": True}, "deterministic"),
        ({"quantization": "int8", "adapters": {}}, "adapters"),
        ({"quantization": "int8", "tensor_parallel": 2}, "tensor_parallel"),
        ({"quantization": "int8", "dtype": "float16"}, "dtype='bfloat16'"),
    ],
)
def test_what_does_not_go_together_is_refused(chat_folder, options, message):
    with pytest.raises(RequestError, match=message):
        LLM(chat_folder, **options)


def test_a_packed_model_drafts_for_and_is_drafted_for(chat_folder):
    plain = LLM(chat_folder, dtype="float32", quantization="int8")
    guessing = LLM(chat_folder, dtype="float32", quantization="int8", speculative=chat_folder)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    assert guessing.generate(PROMPTS, params) == plain.generate(PROMPTS, params)
    assert guessing.stats.num_accepted_tokens > 0


@pytest.fixture(scope="module")
def half_folder(chat_folder, tmp_path_factory):
    """The tiny model with weights that bfloat16 holds exactly, so that only computing can lose anything."""
    folder = tmp_path_factory.mktemp("half") / "model"
    save_checkpoint(open_checkpoint(chat_folder), folder, dtype=torch.bfloat16)
    return folder


def has_fast_kernels() -> bool:
    built = library()
    return built is not None and built.level_name != "scalar"


needs_fast_kernels = pytest.mark.skipif(not has_fast_kernels(), reason="packs only with AVX2 or better")


def test_without_a_word_bfloat16_is_packed_where_it_pays_and_plain_where_something_needs_it(
    chat_folder, tmp_path
):
    label = "bfloat16" if has_fast_kernels() else "plain"
    assert LLM(chat_folder).weights.label == label
    reward = RewardScorer(write_chat_folder(tmp_path / "reward", head="reward"))
    assert reward.weights.label == label
    for options in (
        {"quantization": None},
        {"quantization": "none"},
        {"dtype": "float32"},
        {"deterministic": True},
        {"adapters": {"poet": write_adapter(tmp_path / "poet")}},
    ):
        llm = LLM(chat_folder, **options)
        assert llm.weights.label == "plain"
        assert isinstance(llm.model.model.layers[0].attention.wo, torch.nn.Linear)
    assert EngineOptions(tensor_parallel=2).needs_plain == "tensor_parallel"


@needs_fast_kernels
def test_packed_by_default_loses_no_more_than_plain_bfloat16_does(half_folder):
    texts = ["The river was", "def add(a, b):", "你好"]
    endings = [" wide and slow and cold", " return a + b", ", world and all who live in it"]

    def logprobs(**options) -> torch.Tensor:
        scores = LLM(half_folder, **options).score(texts, endings)
        return torch.tensor([logprob for score in scores for logprob in score.token_logprobs])

    exact = logprobs(dtype="float32")
    packed, plain = (float((logprobs(quantization=kind) - exact).norm()) for kind in ("auto", "none"))
    assert 0 < packed < 1.1 * plain
    assert packed / exact.norm() < 0.005


@needs_fast_kernels
def test_packed_by_default_each_gets_the_same_bits_in_company_as_alone(half_folder):
    params = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=1)
    alone = LLM(half_folder, prefix_cache=False)
    expected = [alone.generate([prompt], params)[0] for prompt in PROMPTS]
    company = LLM(half_folder, chunk_tokens=48)
    for _ in range(2):  # the second time from the cache
        assert company.generate(PROMPTS, params) == expected
    assert company.stats.num_cached_tokens > 0


@needs_fast_kernels
def test_a_draft_is_packed_like_its_model(half_folder):
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    for kind, label in (("auto", "bfloat16"), ("int8", "bfloat16"), ("none", None)):
        llm = LLM(half_folder, quantization=kind, speculative=half_folder)
        drafter = llm.frontend.engine._drafter
        assert isinstance(drafter, DraftModel)
        linear = drafter._runner.model.model.layers[0].attention.wo
        assert (linear.packed.kind if isinstance(linear, PackedLinear) else None) == label
        assert llm.generate(PROMPTS, params)[0].token_ids
