"""From tokens to text: what a caller gets, and the state that turns updates of one sequence into it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from internlm2.engine.core import FinishReason, Update
from internlm2.engine.sampling.sampler import TokenLogprobs
from internlm2.tokenizer import Tokenizer
from internlm2.tokenizer.stream import StopStrings


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it appears.

    text: may be empty while a character or a stop string is undecided. token_ids: the new ids behind it; none for a
    stop token, several under speculation. finish_reason: None while it goes on. sample: which of the `n` answers.
    logprobs: one for each id, where asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    sample: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One answer. Fields as in `Output`."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Output:
    """One finished request; with n > 1 the first answer, and all of them in `samples`.

    text: the answer, without special tokens. token_ids: its ids. prompt_token_ids: what the model was given.
    finish_reason: "stop" (stop token or string) or "length". logprobs: one for each id, where asked for.
    prompt_logprobs: one for each prompt id after the first, where asked for. num_cached_tokens: tokens of the
    prompt that were computed before, for another request.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    samples: tuple[Sample, ...] = ()
    num_cached_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    logprob: natural logarithm, summed over its tokens. token_ids, token_logprobs: each of them. is_greedy: whether
    greedy decoding would write exactly this.
    """

    logprob: float
    token_ids: list[int]
    token_logprobs: list[float]
    is_greedy: bool


class TextStream:
    """The text of one sequence as its tokens come: whole characters, cut before a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, sample: int = 0) -> None:
        self._decoder = tokenizer.stream(skip_special=True)
        self._stops = StopStrings(tuple(stop))
        self._sample = sample

    def push(self, update: Update) -> Piece:
        """The piece that an update brings; `finish_reason` is "stop" as soon as a stop string is complete."""
        text = ""
        for index, token in enumerate(update.token_ids):
            text += self._stops.push(self._decoder.push((token,)))
            if self._stops.matched is not None:
                return self._piece(text, update, index + 1, "stop")
        if update.finish_reason is not None:
            text += self._stops.push(self._decoder.finish())
            if self._stops.matched is not None:
                return self._piece(text, update, len(update.token_ids), "stop")
            text += self._stops.finish()
        return self._piece(text, update, len(update.token_ids), update.finish_reason)

    def _piece(self, text: str, update: Update, count: int, reason: FinishReason | None) -> Piece:
        return Piece(text, update.token_ids[:count], reason, self._sample, update.logprobs[:count])


def join(pieces: Sequence[Piece], *, has_logprobs: bool) -> Sample:
    """One answer from all its pieces."""
    reason = pieces[-1].finish_reason
    assert reason is not None
    return Sample(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        reason,
        [logprob for piece in pieces for logprob in piece.logprobs] if has_logprobs else None,
    )
