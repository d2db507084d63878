"""A model split over two processes answers as the whole one does."""

import pytest
import torch

from internlm2 import LLM, SamplingParams
from internlm2.engine.compute.batch import Part, make_batch
from internlm2.engine.compute.split import pack_batch, unpack_batch
from internlm2.engine.frontend import Ticket

PROMPTS = ["Hello", "你好, world", [1, *range(40, 120)], "A longer text that takes more than one page. " * 3]


@pytest.fixture(autouse=True)
def threads():
    """A split model shares the processor out; what runs next gets it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(chat_folder):
    return LLM(chat_folder, dtype="float32")


@pytest.fixture(scope="module")
def split(chat_folder):
    llm = LLM(chat_folder, dtype="float32", tensor_parallel=2, chunk_tokens=32)
    yield llm
    llm.close()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=24, ignore_eos=True),
        SamplingParams(max_tokens=24, temperature=1.0, top_p=0.9, seed=5, n=2, repetition_penalty=1.2),
    ],
    ids=["greedy", "sampled"],
)
def test_a_split_model_answers_as_the_whole_one(whole, split, params):
    assert [o.samples for o in split.generate(PROMPTS, params)] == [
        o.samples for o in whole.generate(PROMPTS, params)
    ]


def test_what_is_read_off_a_text_is_the_same(whole, split):
    ours, theirs = (llm.score(PROMPTS[:2], [" and more", "我们"]) for llm in (split, whole))
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.token_logprobs, other.token_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.embed(PROMPTS), whole.embed(PROMPTS), rtol=1e-5, atol=1e-5)


def test_each_process_holds_a_part(whole, split):
    heads = whole.model.config.num_key_value_heads
    cache = split.frontend.engine.runner.cache
    assert cache.keys.shape[2] == heads // 2
    sizes = [sum(weight.numel() for weight in llm.model.model.layers.parameters()) for llm in (split, whole)]
    assert 0.4 < sizes[0] / sizes[1] < 0.6


def test_after_a_caller_has_left_the_processes_are_still_at_the_same_place(split, whole, monkeypatch):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    real, is_first = Ticket.wait, []

    def interrupted(self, seconds=None):
        if not is_first:
            is_first.append(True)
            raise KeyboardInterrupt
        real(self, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(Ticket, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            split.generate(["interrupted"], params)
    assert split.generate(PROMPTS, params) == whole.generate(PROMPTS, params)
    split.frontend.engine.scheduler.check_integrity()


def test_a_batch_survives_the_message():
    parts = [Part([5, 6], 30, [3, 9], 40), Part([7], 0, [1], [9]), Part(list(range(50)), 3, [4, 5, 7, 0], 60)]
    batch = make_batch(parts, page_size=16, device=torch.device("cpu"))
    again = unpack_batch(pack_batch(batch), device=torch.device("cpu"))
    assert again.spans == batch.spans
    for name in ("input_ids", "positions", "limits", "slots"):
        assert torch.equal(getattr(again, name), getattr(batch, name))
