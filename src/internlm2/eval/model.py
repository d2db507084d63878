"""The seam between benchmarks and whatever answers them: questions go in, answers come out as they are done.

A `LanguageModel` is our engine (`backends/engine.py`), an OpenAI endpoint (`backends/endpoint.py`), or a script. All
are scored by the same code. `fit` shortens prompts as the profile says, for models whose tokens can be counted.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from internlm2.errors import RequestError
from internlm2.eval.task import ChatPrompt, TextPrompt

Prompt = TextPrompt | ChatPrompt


@dataclass(frozen=True)
class Request:
    """One question to a model.

    key: names it in messages. prompt: text to continue, or a conversation to answer without a system message.
    labels: where there are any, how likely each is behind the prompt is asked; else an answer is written greedily:
    from min_tokens to max_tokens tokens, ended before any text of `stop`.

    max_context_tokens: of prompt and answer together; None: what the model has. cuts_middle: what is too long loses its
    middle instead of its beginning.
    """

    key: str
    prompt: Prompt
    labels: tuple[str, ...] = ()
    max_tokens: int = 0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    max_context_tokens: int | None = None
    cuts_middle: bool = False


@dataclass(frozen=True)
class Answer:
    """What a model made of a question.

    text: what it wrote. logprobs: by label, natural logarithms that may be compared with each other and with nothing
    else. finish_reason: "stop", "length", or "" for labels. error: why there is no answer, in words.

    prompt_tokens, output_tokens: as far as they are known; those of all labels together. dropped_shots, cut_tokens: by
    how much the prompt was shortened to fit.
    """

    text: str = ""
    logprobs: Mapping[str, float] = field(default_factory=dict)
    finish_reason: str = ""
    error: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    dropped_shots: int = 0
    cut_tokens: int = 0


class LanguageModel(Protocol):
    """Whatever answers."""

    @property
    def description(self) -> Mapping[str, str]:
        """What decides about its answers: "name", and such as "sha256" and "dtype"; no secret."""
        ...

    @property
    def counts_tokens(self) -> bool:
        """Whether it keeps `max_context_tokens`; an endpoint does not say how many tokens a text has."""
        ...

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """Answers as they are done, in any order; requests are taken as there is room for them.

        A question that cannot be answered gives an `Answer` with an error. What would hinder all of them, such as a
        server that is gone, raises an InternLM2Error.
        """
        ...


class ScriptedModel:
    """Answers from a function, for tests and for measuring what reference answers reach.

    script: what it writes, or the label that it finds likeliest.

    >>> ScriptedModel(lambda request: "The answer is 18")
    """

    counts_tokens = True

    def __init__(self, script: Callable[[Request], str], *, name: str = "script") -> None:
        self._script = script
        self.description: Mapping[str, str] = {"name": name}

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """See `LanguageModel.answer`. Characters are its tokens; it has room for any prompt."""
        for request in requests:
            text = self._script(request)
            num_prompt = len(request.prompt.text)
            if request.labels:
                logprobs = {label: 0.0 if label == text else -1.0 for label in request.labels}
                yield request, Answer(logprobs=logprobs, prompt_tokens=num_prompt)
            else:
                counts = {"prompt_tokens": num_prompt, "output_tokens": len(text)}
                yield request, Answer(text, finish_reason="stop", **counts)


def compare_labels(
    tokens: Sequence[Sequence[object]], logprobs: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    """How likely each of several texts is that begin alike; only the order means something.

    tokens: of each text. logprobs: of its last tokens, at least of all that differ between the texts; of all but the
    first where the texts are of different lengths.

    OpenCompass compares the mean loss over all tokens, the start id counted. Where all texts have equally many tokens
    the common beginning cancels, and only the rest is added up here, which rounding cannot disturb.
    """
    lengths = {len(text) for text in tokens}
    if len(lengths) > 1:
        values = [math.fsum(own) / len(text) for own, text in zip(logprobs, tokens, strict=True)]
    else:
        num_rest = lengths.pop() - num_common(tokens)
        values = [math.fsum(own[len(own) - num_rest :]) for own in logprobs]
    if any(math.isnan(value) for value in values):
        raise RequestError(
            "The model gave log-probabilities that are no numbers. Check its weights and dtype."
        )
    return tuple(values)


def num_common(texts: Sequence[Sequence[object]]) -> int:
    """How many tokens the texts begin with alike."""
    count = 0
    for column in zip(*texts, strict=False):
        if any(token != column[0] for token in column):
            break
        count += 1
    return count


@dataclass(frozen=True)
class Fitted:
    """A prompt as ids, once for each label or once. dropped_shots, cut_tokens: by how much it was shortened."""

    token_ids: tuple[list[int], ...]
    dropped_shots: int
    cut_tokens: int


def fit(
    request: Request, encode: Callable[[Prompt, str], list[int]], *, max_model_len: int, num_start: int
) -> Fitted:
    """The ids of a prompt, within the context limit of the request or of the model.

    First the last examples go, then the beginning of the text, behind `num_start` ids, or its middle. encode: ids of a
    prompt with a label behind it. Raises RequestError where the limit leaves no room for a prompt.

    NOTE: OpenCompass drops examples only while the prompt alone is too long, although the answer needs room as well;
    then the text is cut. That is kept where the profile gives a limit.
    """
    limit = min(request.max_context_tokens or max_model_len, max_model_len)
    room = limit - request.max_tokens
    if room <= num_start:
        raise RequestError(
            f"{request.key} asks for {request.max_tokens} tokens of answer, but prompt and answer together may have "
            f"only {limit}. Give the model a larger max_model_len."
        )
    limit_of_shots = room if request.max_context_tokens is None else limit
    num_shots = len(request.prompt.shots)
    first, *others = request.labels or ("",)
    while True:
        prompt = request.prompt.with_shots(num_shots)
        encoded = [encode(prompt, first)]
        if num_shots == 0 or len(encoded[0]) <= limit_of_shots:
            encoded += [encode(prompt, label) for label in others]
        longest = max(map(len, encoded))
        if num_shots == 0 or longest <= limit_of_shots:
            break
        num_shots -= 1
    num_kept = (room + 1) // 2 if request.cuts_middle else num_start
    cut = tuple(
        ids if len(ids) <= room else [*ids[:num_kept], *ids[len(ids) - room + num_kept :]] for ids in encoded
    )
    return Fitted(cut, len(request.prompt.shots) - num_shots, max(0, longest - room))
