"""The look at a model before it is scored: what is well passes, and each fault is found and named."""

import copy
import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from endpoint_server import completion, serving

from internlm2.cli import main as cli
from internlm2.doctor.probes import PROBES
from internlm2.engine.llm import LLM
from internlm2.eval.backends.engine import EngineModel
from internlm2.eval.model import Answer, Request, ScriptedModel
from internlm2.eval.self_check import (
    BEGINNING,
    RIGHT_END,
    SelfCheckError,
    check_answers,
    check_tokenizer,
    require,
)
from internlm2.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(chat_folder) -> Tokenizer:
    return Tokenizer.from_pretrained(chat_folder)


def problems(tokenizer: Tokenizer, *, num_rows: int = 512, is_chat: bool = True) -> dict[str, str]:
    checks = check_tokenizer(tokenizer, PROBES, num_rows=num_rows, is_chat=is_chat)
    return {check.name: check.problem for check in checks if check.problem}


def test_a_sound_tokenizer_passes(tokenizer):
    assert problems(tokenizer) == {}
    names = [check.name for check in check_tokenizer(tokenizer, PROBES, num_rows=512, is_chat=False)]
    assert names == ["tokenizer", "start and stop tokens"]


def test_the_real_tokenizer_passes(official_folder):
    real = Tokenizer.from_pretrained(official_folder)
    assert problems(real, num_rows=real.vocab_size) == {}


def faulty(tokenizer: Tokenizer, **methods: Callable[..., object]) -> Tokenizer:
    other = copy.copy(tokenizer)
    for name, method in methods.items():
        setattr(other, name, method)
    return other


def test_texts_that_are_not_read_back_are_a_problem(tokenizer):
    lossy = faulty(tokenizer, encode=lambda text, **more: tokenizer.encode(text.lower(), **more))
    assert problems(lossy)["tokenizer"] == "'A beautiful flower' is read back as 'a beautiful flower'."
    assert "has the id" in problems(tokenizer, num_rows=100)["tokenizer"]
    assert "but the model has 100 rows" in problems(tokenizer, num_rows=100)["tokenizer"]


@pytest.mark.parametrize("num_starts", [0, 2])
def test_a_wrong_number_of_start_tokens_is_a_problem(num_starts, tokenizer):
    def encode(text: str, bos: bool = False, **more) -> list[int]:
        return [*([tokenizer.bos_id] * num_starts if bos else []), *tokenizer.encode(text, **more)]

    assert "a text starts with the ids" in problems(faulty(tokenizer, encode=encode))["start and stop tokens"]


def test_forged_and_missing_stop_tokens_are_a_problem(tokenizer):
    open_door = faulty(tokenizer, encode=lambda text, bos=False, **_: tokenizer.encode(text, bos, True))
    assert "that spells the stop tokens" in problems(open_door)["start and stop tokens"]
    endless = faulty(tokenizer, specials=replace(tokenizer.specials, stop_ids=frozenset()))
    assert problems(endless) == {
        "start and stop tokens": "the vocabulary names no token that ends an answer.",
        "chat template": f"<|im_end|> (id {tokenizer.special_tokens['<|im_end|>']}) does not end an answer.",
    }
    far = faulty(tokenizer, specials=replace(tokenizer.specials, stop_ids=frozenset({4, 600})))
    assert (
        problems(far)["start and stop tokens"]
        == "the stop tokens [600] are beyond the 512 rows of the model."
    )


def test_a_template_that_leaves_something_out_is_a_problem(tokenizer):
    chat = tokenizer.apply_chat
    cases: list[Callable[..., list[int]]] = [
        lambda messages: chat(messages)[1:],  # no start token
        lambda messages: [tokenizer.bos_id or 0, *chat(messages)],
        lambda messages: chat(messages, add_generation_prompt=False),
        lambda messages: chat([*messages, *messages[:0], {"role": "assistant", "content": "?"}, *messages]),
    ]
    for case in cases:
        told = problems(faulty(tokenizer, apply_chat=case))["chat template"]
        assert told.startswith("a question is given to the model as ")
    forged = faulty(tokenizer, apply_chat=lambda messages: tokenizer.encode(tokenizer.render_chat(messages), allow_special=True))  # fmt: skip
    assert problems(forged)["chat template"] == "a question that spells <|im_end|> ends its turn."


def test_a_base_models_folder_is_no_chat_model(tokenizer):
    ids = {name: one for name, one in tokenizer.specials.ids.items() if name != "<|im_start|>"}
    base = faulty(tokenizer, specials=replace(tokenizer.specials, ids=ids))
    assert problems(base)["chat template"].endswith("Leave --chat out for base models.")
    assert problems(base, is_chat=False) == {}


# -- answers --------------------------------------------------------------------------------------------------


class Model(ScriptedModel):
    """Ends answers at stop texts, as a model should. change: what a fault makes of an answer."""

    def __init__(
        self, text: str = "Green, I believe.", change: Callable[[Request, Answer], Answer] = lambda _, a: a
    ):
        super().__init__(lambda request: RIGHT_END if request.labels else text)
        self.change = change

    def answer(self, requests):
        for request, answer in super().answer(requests):
            text = answer.text
            for stop in request.stop:
                text = text.partition(stop)[0]
            yield request, self.change(request, replace(answer, text=text, output_tokens=len(text.split())))


def found(model, *, is_chat: bool = True, has_labels: bool = True) -> dict[str, tuple[str, str]]:
    checks = check_answers(model, is_chat=is_chat, has_labels=has_labels)
    return {check.name: (check.problem, check.doubt) for check in checks}


def test_a_sound_model_passes():
    names = ["answer", "stop texts", "scores of given answers"]
    assert found(Model()) == dict.fromkeys(names, ("", ""))
    assert list(found(Model(), has_labels=False)) == names[:2]
    assert found(Model("Paris"), is_chat=False, has_labels=False) == {"answer": ("", "")}, (
        "too short to be stopped"
    )


@pytest.mark.parametrize(
    ("text", "change", "told"),
    [
        ("Green.<|im_end|>\n<|im_start|>user", None, "it holds <|im_start|> as text"),
        ("Green.[UNUSED_TOKEN_145]", None, "it holds [UNUSED_TOKEN_145] as text"),
        ("Green.</s>", None, "it holds </s> as text"),
        ("Green.", lambda _, answer: replace(answer, error="The endpoint answered 400."), "The endpoint answered 400."),
        ("Green.", lambda _, answer: replace(answer, output_tokens=49), "it has 49 tokens, where at most 48 were asked"),
    ],
)  # fmt: skip
def test_answers_that_spoil_scores_are_a_problem(text, change, told):
    model = Model(text, change) if change else Model(text)
    assert told in found(model)["answer"][0]
    with pytest.raises(SelfCheckError, match="The model is not fit to be scored") as caught:
        require(list(check_answers(model, is_chat=True, has_labels=False)))
    assert told in str(caught.value)
    assert "--no-self-check" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "change", "name", "told"),
    [
        (" \n", None, "answer", "it is empty"),
        ("Green it is.", lambda _, answer: replace(answer, finish_reason="length"), "answer", "not ended after 48 tokens"),
        ("Green it is.", lambda _, answer: replace(answer, text="Green it is."), "stop texts", "went on behind the stop text"),
        ("Green it is.", lambda request, answer: replace(answer, text="Red") if request.stop else answer, "stop texts", "scores may vary"),
        ("Green it is.", lambda request, answer: replace(answer, logprobs=dict.fromkeys(request.labels, -1.0)), "scores of given answers", "Are the weights trained?"),
    ],
)  # fmt: skip
def test_what_may_be_meant_is_only_said(text, change, name, told, caplog):
    model = Model(text, change) if change else Model(text)
    checks = list(check_answers(model, is_chat=True, has_labels=True))
    assert {check.name: told in check.doubt for check in checks}[name]
    assert not any(check.problem for check in checks)
    with caplog.at_level(logging.WARNING, logger="internlm2"):
        logging.getLogger("internlm2").propagate = True
        require(checks)
    assert f"Self-check, {name}: " in caplog.text


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_scores_that_are_no_numbers_are_a_problem(value):
    def change(request: Request, answer: Answer) -> Answer:
        return replace(answer, logprobs={RIGHT_END: -1.0, **dict.fromkeys(request.labels[1:], value)})

    told, _ = found(Model(change=change))["scores of given answers"]
    assert told.startswith(f"{BEGINNING}{RIGHT_END} has the log-probability -1.0, and")


def test_our_engine_is_checked_with_a_real_model(chat_folder):
    with LLM(chat_folder, dtype="float32", max_model_len=512) as llm:
        model = EngineModel(llm, name="tiny")
        checks = {**found(model), **found(model, is_chat=False)}
    assert {name: problem for name, (problem, _) in checks.items() if problem} == {}
    assert (
        "not ended after" in found(Model("x", lambda _, a: replace(a, finish_reason="length")))["answer"][1]
    )


# -- from the command line ------------------------------------------------------------------------------------


def run(model: object, sample, output: Path, *words: object) -> int:
    where = ["--data", sample.path, "--output", output, "--tasks", "bbh.boolean_expressions", "--limit", 1]
    return cli.run([str(word) for word in ("eval", "run", model, *where, *words)])


def test_a_model_with_a_faulty_tokenizer_is_not_scored_unless_told_so(chat_folder, sample, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(chat_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = ["--dtype", "float32", "--threads", 1, "--max-model-len", 3000, "--profile", "fixed"]
    assert run(folder, sample, tmp_path / "run", *flags) == 2
    told = capsys.readouterr().err
    assert "The model is not fit to be scored. tokenizer: 'A beautiful flower' is read back as" in told
    assert not (tmp_path / "run").exists()
    assert run(folder, sample, tmp_path / "run", *flags, "--no-self-check") == 0


def test_an_endpoint_that_leaks_control_tokens_is_not_scored_unless_told_so(sample, tmp_path, capsys):
    with serving(lambda path, body: (200, completion("True<|im_end|>"))) as server:
        words = ["--endpoint", server.url, "--chat"]
        assert run("tiny", sample, tmp_path / "run", *words) == 2
        assert "it holds <|im_end|> as text" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        assert len(server.seen) == 2
        assert run("tiny", sample, tmp_path / "run", *words, "--no-self-check") == 0
