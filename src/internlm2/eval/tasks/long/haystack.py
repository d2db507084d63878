"""Texts of an exact number of tokens with sentences hidden at exact depths.

A haystack is tokenised once. Its texts are shuffled by seeds, so that a repeat is one row of tokens, of which each
length is a beginning; a prompt of 200,000 tokens is two slices and a decoding.
"""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from internlm2.eval.task import EvalError
from internlm2.eval.tasks.long.tokens import Counter


@dataclass(frozen=True)
class Placed:
    """A haystack with its needles. points: where each begins, in tokens of the result."""

    tokens: "array[int]"
    points: tuple[int, ...]


class Haystack:
    """Texts as tokens.

    name: of their file, for messages. max_tokens: the longest row that will be asked for; more is not kept.
    num_tokens: of all texts.
    """

    def __init__(self, name: str, texts: Sequence[str], counter: Counter, *, max_tokens: int) -> None:
        self.name = name
        self.counter = counter
        self._texts = [array("i", counter.encode(text)) for text in texts]
        self._max_tokens = max_tokens
        self._rows: dict[int, array[int]] = {}
        self._order = list(range(len(texts)))
        self._num_shuffles = 0
        self.num_tokens = sum(map(len, self._texts))

    def row(self, repeat: int) -> "array[int]":
        """The tokens of all texts in the order of a repeat, up to `max_tokens`.

        NOTE: as OpenCompass does it, repeat n is shuffled with seed n from the order of repeat n - 1.
        """
        while repeat not in self._rows:
            random.Random(self._num_shuffles).shuffle(self._order)
            self._rows[self._num_shuffles] = self._joined(self._order)
            self._num_shuffles += 1
        return self._rows[repeat]

    def repeated(self) -> "array[int]":
        """The tokens of all texts in their own order, over and over, up to `max_tokens`."""
        if -1 not in self._rows:
            tokens = self._joined(range(len(self._texts)))
            while tokens and len(tokens) < self._max_tokens:
                tokens.extend(tokens[: self._max_tokens - len(tokens)])
            self._rows[-1] = tokens
        return self._rows[-1]

    def _joined(self, order: Sequence[int]) -> "array[int]":
        tokens: array[int] = array("i")
        for n in order:
            tokens.extend(self._texts[n])
            if len(tokens) >= self._max_tokens:
                break
        return tokens[: self._max_tokens]

    def check(self, count: int) -> None:
        """Raise EvalError where a row has less than `count` tokens: lengths are promises."""
        if count > self.num_tokens:
            raise EvalError(
                f"{self.name} has {self.num_tokens} tokens, but a text of {count} is asked for. Choose shorter "
                "lengths, such as --tasks needle_8k, or get the whole file (see `internlm2 eval data`)."
            )


def place_at(tokens: "array[int]", needle: Sequence[int], depth: int) -> Placed:
    """The needle at `depth` percent of the tokens, whatever stands there: OpenCompass' way."""
    point = int(len(tokens) * (depth / 100))
    return Placed(tokens[:point] + array("i", needle) + tokens[point:], (point,))


def place_several(tokens: "array[int]", needles: Sequence[Sequence[int]], depth: int, step: int) -> Placed:
    """Needles from `depth` percent on, `step` percent apart; those beyond the end stand at it.

    NOTE: as OpenCompass' multi-needle test does it, each point counts the needles before it twice: once where it is
    computed, once where they are put in. Needles therefore lie their own length deeper than asked.
    """
    total = len(tokens)
    points: list[int] = []
    num_before = 0
    for n, needle in enumerate(needles):
        point = points[-1] + len(needles[n - 1]) + total * (step / 100) if points else total * (depth / 100)
        points.append(min(int(point), total + num_before))
        num_before += len(needle)
    placed: list[int] = []
    num_before = 0
    for point, needle in zip(points, needles, strict=True):
        start = min(point + num_before, len(tokens))
        tokens = tokens[:start] + array("i", needle) + tokens[start:]
        placed.append(start)
        num_before += len(needle)
    return Placed(tokens, tuple(placed))


def place_behind_sentence(
    tokens: "array[int]", needle: Sequence[int], depth: int, full_stops: frozenset[int]
) -> Placed:
    """The needle behind the last full stop before `depth` percent; at 100 percent at the end. G. Kamradt's way.

    full_stops: the tokens that end a sentence. Without any before that depth the needle stands at the beginning.
    """
    point = len(tokens)
    if depth != 100:
        point = int(len(tokens) * (depth / 100))
        while point and tokens[point - 1] not in full_stops:
            point -= 1
    return Placed(tokens[:point] + array("i", needle) + tokens[point:], (point,))
