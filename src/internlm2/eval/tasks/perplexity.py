"""Perplexity of given texts: by token, by word and by byte, over windows that are part of the number.

A text longer than a window is read in several. Each begins with the start token, where the model has one; `stride` new
tokens are scored in each, behind as many older ones as the window has room for. stride = size cuts the text in chunks
(a lower bound of what a model can do); a small stride slides, and is dearer by size / stride.

Only bits per byte compare models with different tokenizers. Words are what stands between blanks, as in
lm-evaluation-harness: of no use in Chinese.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from internlm2.eval.task import EvalError

BATCH_TOKENS = 65_536  # windows under way together, in tokens


class TokenScorer(Protocol):
    """A model that says how likely each token of a text is."""

    @property
    def start_ids(self) -> Sequence[int]:
        """What stands before every text: the start token, or nothing."""
        ...

    @property
    def max_tokens(self) -> int:
        """Its longest context."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without the start token; nothing in it is special."""
        ...

    def score(self, contexts: Sequence[list[int]], targets: Sequence[list[int]]) -> list[list[float]]:
        """Natural logarithms of the probability of each target's tokens behind its context, which is not empty."""
        ...


@dataclass(frozen=True)
class Window:
    """size: tokens of a window with the start token. stride: tokens that are new in each; None: all that fit."""

    size: int = 2048
    stride: int | None = None


@dataclass(frozen=True)
class Span:
    """One window of a text: tokens from `start` to `end`, of which those from `first` on are scored."""

    start: int
    first: int
    end: int


@dataclass(frozen=True)
class Likelihood:
    """How likely a text is. nats: the negative sum of natural logarithms over its scored tokens.

    num_tokens: those that were scored. num_unscored: the first token, where the model has no start token before it.
    num_words, num_bytes: of the text, in UTF-8. num_windows: in which it was read.
    """

    nats: float
    num_tokens: int
    num_words: int
    num_bytes: int
    num_unscored: int
    num_windows: int

    @property
    def token_perplexity(self) -> float:
        """Per token: for models of one tokenizer."""
        return _exp(self.nats, self.num_tokens)

    @property
    def word_perplexity(self) -> float:
        """Per word between blanks."""
        return _exp(self.nats, self.num_words)

    @property
    def byte_perplexity(self) -> float:
        """Per UTF-8 byte."""
        return _exp(self.nats, self.num_bytes)

    @property
    def bits_per_byte(self) -> float:
        """The same in bits; what an ideal compressor with this model would need."""
        return self.nats / math.log(2) / self.num_bytes


@dataclass(frozen=True)
class Perplexity:
    """Of several texts. total: all of them as one. by_position: the mean loss in nats of tokens whose context is at
    least so many tokens, and less than twice as many: the curve over the context."""

    window: Window
    texts: Mapping[str, Likelihood]
    total: Likelihood
    by_position: Mapping[int, float]


def spans(num_tokens: int, window: Window, *, num_start: int) -> Iterator[Span]:
    """The windows over a text of `num_tokens`, in order. Each token is scored once, in the first window that has it.

    num_start: tokens that stand before each window. Without any, the first token of the text has nothing before it and
    is not scored; later windows keep at least one older token. Raises EvalError for a window that is too small.
    """
    room = window.size - num_start
    stride = window.stride if window.stride is not None else room - (0 if num_start else 1)
    if room < 1 or not 1 <= stride <= room - (0 if num_start else 1):
        raise EvalError(
            f"The window is {window.size} tokens and its stride {window.stride}. The stride must be at least 1 and "
            f"smaller than the window."
        )
    first = 0 if num_start else 1
    end = min(num_tokens, room)
    while first < num_tokens:
        yield Span(max(0, end - room), first, end)
        first, end = end, min(num_tokens, end + stride)


def measure(scorer: TokenScorer, texts: Iterable[tuple[str, str]], window: Window) -> Perplexity:
    """The perplexity of texts, each a name and its content.

    Raises EvalError for a window that the model has no room for, names that occur twice, and texts without a token to
    score.
    """
    if window.size > scorer.max_tokens:
        raise EvalError(
            f"The window is {window.size} tokens, but the model has room for {scorer.max_tokens}. Choose a smaller "
            "one, or give the model a larger max_model_len."
        )
    found: dict[str, Likelihood] = {}
    losses: dict[int, list[float]] = {}
    for name, text in texts:
        if name in found:
            raise EvalError(f"There are two texts named {name!r}. Give each its own name.")
        found[name] = _measure_text(scorer, name, text, window, losses)
    if not found:
        raise EvalError("No text is given.")
    names = ("nats", "num_tokens", "num_words", "num_bytes", "num_unscored", "num_windows")
    total = Likelihood(*(sum(getattr(one, name) for one in found.values()) for name in names))
    return Perplexity(
        window, found, total, {at: math.fsum(own) / len(own) for at, own in sorted(losses.items())}
    )


def _measure_text(
    scorer: TokenScorer, name: str, text: str, window: Window, losses: dict[int, list[float]]
) -> Likelihood:
    ids = scorer.encode(text)
    start_ids = list(scorer.start_ids)
    windows = list(spans(len(ids), window, num_start=len(start_ids)))
    if not windows:
        raise EvalError(f"{name} has no token whose probability could be asked. Leave it out.")
    values: list[float] = []
    per_batch = max(1, BATCH_TOKENS // window.size)
    for n in range(0, len(windows), per_batch):
        batch = windows[n : n + per_batch]
        contexts = [start_ids + ids[span.start : span.first] for span in batch]
        scored = scorer.score(contexts, [ids[span.first : span.end] for span in batch])
        for context, span, own in zip(contexts, batch, scored, strict=True):
            if len(own) != span.end - span.first or any(math.isnan(value) for value in own):
                raise EvalError(
                    f"The model gave no number for some tokens of {name}. Check its weights and dtype."
                )
            for offset, value in enumerate(own):
                losses.setdefault(1 << (len(context) + offset).bit_length() - 1, []).append(-value)
            values += own
    return Likelihood(
        nats=-math.fsum(values),
        num_tokens=len(values),
        num_words=len(text.split()),
        num_bytes=len(text.encode()),
        num_unscored=len(ids) - len(values),
        num_windows=len(windows),
    )


def _exp(nats: float, count: int) -> float:
    try:
        return math.exp(nats / count) if count else math.nan
    except OverflowError:
        return math.inf
