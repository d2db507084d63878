"""A model that says what the test wants: pieces of given ids, in given cuts, in place of the engine's."""

from collections.abc import Sequence
from itertools import pairwise

from internlm2.engine.text import Piece


class ScriptedStream:
    """As `PieceStream`."""

    num_cached_tokens = 0
    prompt_logprobs = ()

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = iter(pieces)
        self.is_closed = False

    def __aiter__(self):
        return self

    async def __anext__(self) -> Piece:
        piece = None if self.is_closed else next(self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        self.is_closed = True


class ScriptedLLM:
    """As `AsyncLLM`. scripts: the ids of each answer, the later ones for later requests. cuts: where pieces end."""

    def __init__(
        self, llm, scripts: Sequence[Sequence[int]], *, cuts: Sequence[int] = (), reason: str = "stop"
    ) -> None:
        self.llm = llm
        self.requests: list[tuple[list[int], object]] = []
        self._scripts = list(scripts)
        self._cuts = cuts
        self._reason = reason

    async def open_stream(self, ids, params, *, adapter=None) -> ScriptedStream:
        self.requests.append((list(ids), params))
        script = self._scripts.pop(0)
        edges = [0, *sorted({cut % (len(script) + 1) for cut in self._cuts}), len(script)]
        pieces = [Piece("", tuple(script[a:b]), None) for a, b in pairwise(edges)]
        return ScriptedStream([*pieces, Piece("", (), self._reason)])

    async def close(self) -> None:
        pass
