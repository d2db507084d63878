"""Is a model fit to be scored? Looked at before the first question: a wrong tokenizer or template shows nowhere else.

What would spoil scores is a problem and ends the run; what may be meant, such as an answer that does not end, is a
doubt and is only said. Of an endpoint no tokens are seen, so that only its answers are checked.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from internlm2.errors import ChatError
from internlm2.eval.model import Answer, LanguageModel, Request
from internlm2.eval.task import ChatPrompt, EvalError, TextPrompt, Turn
from internlm2.log import logger
from internlm2.tokenizer import Tokenizer
from internlm2.tokenizer.special import IM_END, IM_START, OLD_SPELLINGS

MAX_TOKENS = 48
QUESTION = "Answer with one word: what colour is grass?"
BEGINNING = "The capital of France is"
RIGHT_END, WRONG_END = " Paris", " qzxk"
_CONTROL = (IM_START, IM_END, *OLD_SPELLINGS, "</s>")
_LEAST_TO_STOP = 6  # characters of an answer in the middle of which a stop text is put


class SelfCheckError(EvalError):
    """A model that must not be scored as it is."""


@dataclass(frozen=True)
class Check:
    """name: what was looked at. problem: what would spoil scores. doubt: what may be meant.

    Both are "" if all is well.
    """

    name: str
    problem: str = ""
    doubt: str = ""


def require(checks: Collection[Check]) -> None:
    """Log the doubts. Raises SelfCheckError where there are problems."""
    for check in checks:
        if check.doubt:
            logger.warning("Self-check, %s: %s", check.name, check.doubt)
    problems = [f"{check.name}: {check.problem}" for check in checks if check.problem]
    if problems:
        raise SelfCheckError(
            f"The model is not fit to be scored. {' '.join(problems)} See `internlm2 doctor MODEL`; --no-self-check "
            "scores it all the same."
        )
    logger.info("Self-check: %s: well.", ", ".join(check.name for check in checks))


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def check_tokenizer(
    tokenizer: Tokenizer, texts: Sequence[str], *, num_rows: int, is_chat: bool
) -> Iterator[Check]:
    """Whether ids stand for the texts that they should. num_rows: of the model's embedding."""
    yield _round_trip(tokenizer, texts, num_rows)
    yield _start_and_stop(tokenizer, num_rows)
    if is_chat:
        yield _template(tokenizer)


def _round_trip(tokenizer: Tokenizer, texts: Sequence[str], num_rows: int) -> Check:
    name = "tokenizer"
    for text in texts:
        ids = tokenizer.encode(text)
        if max(ids, default=0) >= num_rows:
            return Check(name, f"{text!r} has the id {max(ids)}, but the model has {num_rows} rows.")
        decoded = tokenizer.decode(ids)
        if decoded != text:
            return Check(name, f"{text!r} is read back as {decoded!r}.")
    return Check(name)


def _start_and_stop(tokenizer: Tokenizer, num_rows: int) -> Check:
    name = "start and stop tokens"
    plain, started = tokenizer.encode(BEGINNING), tokenizer.encode(BEGINNING, bos=True)
    expected = plain if tokenizer.bos_id is None else [tokenizer.bos_id, *plain]
    if started != expected:
        return Check(name, f"a text starts with the ids {started[:3]}, but must with {expected[:3]}.")
    if not tokenizer.stop_ids:
        return Check(name, "the vocabulary names no token that ends an answer.")
    beyond = sorted(one for one in tokenizer.stop_ids if one >= num_rows)
    if beyond:
        return Check(name, f"the stop tokens {beyond} are beyond the {num_rows} rows of the model.")
    forged = tokenizer.stop_ids.intersection(tokenizer.encode(f"</s> {IM_END}"))
    if forged:
        return Check(name, f"text that spells the stop tokens {sorted(forged)} is read as these tokens.")
    return Check(name)


def _template(tokenizer: Tokenizer) -> Check:
    name = "chat template"
    end = tokenizer.special_tokens.get(IM_END)
    if end not in tokenizer.stop_ids:
        return Check(name, f"{IM_END} (id {end}) does not end an answer.")
    try:
        ids = tokenizer.apply_chat([{"role": "user", "content": QUESTION}])
        forged = tokenizer.apply_chat([{"role": "user", "content": f"{QUESTION}{IM_END}"}])
    except ChatError as error:
        return Check(name, f"{error} Leave --chat out for base models.")
    text = tokenizer.decode(ids)
    header = f"{tokenizer.decode(tokenizer.encode(IM_START, allow_special=True))}assistant\n"
    starts = ids.count(tokenizer.bos_id) if tokenizer.bos_id is not None else 1
    if text.count(QUESTION) != 1 or not text.endswith(header) or starts != 1:
        return Check(name, f"a question is given to the model as {text!r}.")
    if forged.count(end) != ids.count(end):
        return Check(name, f"a question that spells {IM_END} ends its turn.")
    return Check(name)


# -- answers ----------------------------------------------------------------------------------------------------------


def check_answers(model: LanguageModel, *, is_chat: bool, has_labels: bool) -> Iterator[Check]:
    """Whether it answers, stops, and, where labels are compared, scores. Raises what the model raises."""
    prompt = ChatPrompt((), (Turn("user", QUESTION),)) if is_chat else TextPrompt("", BEGINNING)
    first = _ask(model, Request("self-check:answer", prompt, max_tokens=MAX_TOKENS))
    yield _answer(first, is_chat=is_chat)
    place = len(first.text) // 2
    stop = first.text[place : place + 3]
    if not first.error and len(first.text) >= _LEAST_TO_STOP and stop.strip():
        again = Request("self-check:stop", prompt, max_tokens=MAX_TOKENS, stop=(stop,))
        yield _stop(first, _ask(model, again), stop)
    if has_labels:
        labels = (RIGHT_END, WRONG_END)
        yield _labels(_ask(model, Request("self-check:labels", TextPrompt("", BEGINNING), labels=labels)))


def _ask(model: LanguageModel, request: Request) -> Answer:
    answers = [answer for _, answer in model.answer([request])]
    return answers[0] if answers else Answer(error="there is no answer")


def _answer(answer: Answer, *, is_chat: bool) -> Check:
    name = "answer"
    if answer.error:
        return Check(name, answer.error)
    leaked = [token for token in _CONTROL if token in answer.text]
    if leaked:
        return Check(
            name, f"it holds {leaked[0]} as text, so that this token does not end it: {answer.text[:200]!r}."
        )
    if answer.output_tokens > MAX_TOKENS:
        return Check(
            name, f"it has {answer.output_tokens} tokens, where at most {MAX_TOKENS} were asked for."
        )
    if not answer.text.strip():
        return Check(name, doubt="it is empty.")
    if is_chat and answer.finish_reason == "length":
        told = f"to {QUESTION!r} it has not ended after {MAX_TOKENS} tokens. Is this a chat model?"
        return Check(name, doubt=told)
    return Check(name)


def _stop(first: Answer, second: Answer, stop: str) -> Check:
    name = "stop texts"
    if second.error:
        return Check(name, second.error)
    if stop in second.text:
        return Check(
            name, doubt=f"an answer went on behind the stop text {stop!r}. This costs time, no score."
        )
    if second.text != first.text[: first.text.find(stop)]:
        told = f"the same question was answered {first.text[:100]!r} and then {second.text[:100]!r}: scores may vary."
        return Check(name, doubt=told)
    return Check(name)


def _labels(answer: Answer) -> Check:
    name = "scores of given answers"
    if answer.error:
        return Check(name, answer.error)
    right, wrong = (answer.logprobs.get(label, math.nan) for label in (RIGHT_END, WRONG_END))
    if not (math.isfinite(right) and math.isfinite(wrong)):
        return Check(name, f"{BEGINNING}{RIGHT_END} has the log-probability {right}, and{WRONG_END} {wrong}.")
    if right <= wrong:
        told = f"{BEGINNING!r} goes on with {WRONG_END!r} rather than {RIGHT_END!r}. Are the weights trained?"
        return Check(name, doubt=told)
    return Check(name)
