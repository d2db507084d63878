"""A server whose model answers from a book: the page talks to the real application, at a pace the test chooses."""

import asyncio
import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from internlm2.engine.text import Piece

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from serve_running import Running, running

CHARACTERS = 8  # of a piece
MARKER = re.compile(r"(<\|[a-z_]+\|>)")
TURN = re.compile(r"<\|im_start\|>(\w+)[^\n]*\n(.*?)<\|im_end\|>", re.S)


@dataclass
class Story:
    """The answer to messages that hold `asked`. pause_seconds: before each piece. waits_after: once this has been said,
    nothing comes until the book is told to go on.
    """

    asked: str
    answer: str
    pause_seconds: float = 0.0
    reason: str = "stop"
    waits_after: str | None = None


@dataclass
class Book:
    """As `AsyncLLM`. prompts: what was asked, as text. Later stories win."""

    llm: object
    stories: list[Story] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    params: list[object] = field(default_factory=list)
    num_stopped: int = 0
    may_go_on: threading.Event = field(default_factory=threading.Event)

    def tell(self, asked: str, answer: str, **options) -> None:
        self.stories.insert(0, Story(asked, answer, **options))

    async def open_stream(self, ids, params, *, adapter=None):
        prompt = self.llm.tokenizer.decode(ids)
        self.prompts.append(prompt)
        self.params.append(params)
        turns = TURN.findall(prompt)
        last = turns[-1][1] if turns else prompt
        story = next(
            (each for each in self.stories if each.asked in last), Story("", "I know nothing of it.")
        )
        return _Reading(self, story)

    async def close(self) -> None:
        pass


class _Reading:
    """As `PieceStream`."""

    num_cached_tokens = 0
    prompt_logprobs = ()

    def __init__(self, book: Book, story: Story) -> None:
        self._book, self._story = book, story
        parts = [
            part if MARKER.fullmatch(part) else part[at : at + CHARACTERS]
            for part in MARKER.split(story.answer)
            for at in range(0, 1 if MARKER.fullmatch(part) else len(part), CHARACTERS)
        ]
        self._parts = iter([*parts, None])
        self._said = ""
        self._is_over = False

    def __aiter__(self):
        return self

    async def __anext__(self) -> Piece:
        if self._is_over:
            raise StopAsyncIteration
        await asyncio.sleep(self._story.pause_seconds)
        while (
            self._story.waits_after
            and self._story.waits_after in self._said
            and not self._book.may_go_on.is_set()
        ):
            await asyncio.sleep(0.02)
        part = next(self._parts)
        if part is None:
            self._is_over = True
            return Piece("", (), self._story.reason)
        ids = self._book.llm.tokenizer.encode(part, allow_special=True)
        self._said += part
        return Piece(part, tuple(ids), None)

    async def aclose(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._book.num_stopped += 1


@contextlib.contextmanager
def telling(llm, **options) -> Iterator[tuple[Running, Book]]:
    """A running server, and its book."""
    with running(llm, **{"model_name": "internlm2-chat-7b"} | options) as server:
        real = server.service.llm
        book = Book(llm)
        server.service.llm = book
        try:
            yield server, book
        finally:
            server.service.llm = real
