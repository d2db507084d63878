"""Adapters of a model that serves: requests choose one, and none is taken away from under them."""

import pytest
from peft_folders import peft_adapter

from internlm2 import LLM, SamplingParams
from internlm2.errors import RequestError

PROMPT = [1, *range(60, 110)]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def folders(chat_folder, tmp_path_factory):
    """Three adapter folders of the tiny chat model. Not to be changed."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(["poet", "lawyer", "clerk"]):
        peft_adapter(chat_folder, root / name, seed=seed)
    return {name: root / name for name in ("poet", "lawyer", "clerk")}


@pytest.fixture
def llm(chat_folder, folders):
    both = {"poet": folders["poet"], "lawyer": folders["lawyer"]}
    return LLM(chat_folder, dtype="float32", memory_gib=0.01, adapters=both)


def answer(llm, adapter=None):
    """Log-probabilities tell adapters apart better than ids."""
    [output] = llm.generate([PROMPT], PARAMS, adapter=adapter)
    return output.token_ids, [token.logprob for token in output.logprobs]


def test_requests_with_different_adapters_share_a_batch(llm):
    expected = [answer(llm, name) for name in ("poet", "lawyer", None)]
    tickets = llm.frontend.submit(
        llm.frontend.prepare(PROMPT, PARAMS, adapter=name) for name in ("poet", "lawyer", None)
    )
    llm.frontend.wait(tickets)
    for ticket, (ids, logprobs) in zip(tickets, expected, strict=True):
        assert [token for piece in ticket.pieces for token in piece.token_ids] == ids
        assert [t.logprob for piece in ticket.pieces for t in piece.logprobs] == pytest.approx(
            logprobs, abs=1e-4
        )
    assert expected[0] != expected[1]


def test_an_adapter_that_is_in_use_is_not_removed(llm):
    expected = answer(llm, "poet")
    stream = llm.stream(PROMPT, PARAMS, adapter="poet")
    pieces = [next(stream)]
    with pytest.raises(
        RequestError, match=r"^The adapter 'poet' cannot be removed while requests use it \(1 open\). Wait"
    ):
        llm.adapters.remove("poet")
    pieces += stream
    assert [token for piece in pieces for token in piece.token_ids] == expected[0]
    llm.adapters.remove("poet")
    assert llm.adapters.names == ("lawyer",)


def test_a_request_that_waits_or_is_refused_or_aborted_counts_as_long_as_it_is_open(llm):
    varied = SamplingParams(max_tokens=4, n=3, temperature=1.0)
    ticket = llm.frontend.prepare(PROMPT, varied, adapter="poet")  # not in the engine yet
    with pytest.raises(RequestError, match=r"requests use it \(3 open\)"):
        llm.adapters.remove("poet")
    with pytest.raises(RequestError, match="The prompt is empty"):
        llm.generate([PROMPT, []], PARAMS, adapter="lawyer")
    llm.frontend.settle()
    llm.adapters.remove("lawyer")
    llm.frontend.abort(ticket)
    llm.frontend.settle()
    llm.adapters.remove("poet")
    assert not llm.frontend._streams


def test_an_adapter_removed_while_a_request_is_admitted_refuses_that_request_alone(llm, monkeypatch):
    """By another thread: after the name was found good, and before the request is queued."""
    generation = llm.frontend._admission.generation

    def removing(*args, **kwargs):
        admitted = generation(*args, **kwargs)
        llm.adapters.remove("poet")
        return admitted

    others = llm.frontend.submit([llm.frontend.prepare(PROMPT, PARAMS, adapter="lawyer")])
    with monkeypatch.context() as patch:
        patch.setattr(llm.frontend._admission, "generation", removing)
        with pytest.raises(RequestError, match="There is no adapter called 'poet'"):
            llm.frontend.submit([llm.frontend.prepare(PROMPT, PARAMS, adapter="poet")])
    llm.frontend.wait(others)
    assert not llm.frontend._streams


def test_removing_one_adapter_leaves_requests_with_another_alone(llm):
    expected = answer(llm, "lawyer")
    stream = llm.stream(PROMPT, PARAMS, adapter="lawyer")
    pieces = [next(stream)]
    llm.adapters.remove("poet")
    with pytest.raises(RequestError, match=r"no adapter called 'poet'. Known: lawyer"):
        llm.generate([PROMPT], PARAMS, adapter="poet")
    pieces += stream
    assert [t.logprob for piece in pieces for t in piece.logprobs] == pytest.approx(expected[1], abs=1e-4)


def test_a_name_that_is_given_again_shares_no_keys_with_the_adapter_of_before(llm, chat_folder, folders):
    answer(llm, "poet")
    llm.adapters.remove("poet")
    llm.adapters.add("poet", folders["clerk"])
    fresh = LLM(chat_folder, dtype="float32", memory_gib=0.01, adapters={"poet": folders["clerk"]})
    (ids, logprobs), (expected_ids, expected) = answer(llm, "poet"), answer(fresh, "poet")
    assert ids == expected_ids
    assert logprobs == pytest.approx(expected, abs=1e-4)
