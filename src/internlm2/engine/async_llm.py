"""The asyncio twin of `LLM`: the same answers, awaited.

The engine's thread computes for all coroutines, and for synchronous callers in other threads beside them.
"""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import torch

from internlm2.engine.frontend import Ticket
from internlm2.engine.llm import LLM, Message, Prompt
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.sampler import TokenLogprobs
from internlm2.engine.text import Output, Piece, Score
from internlm2.engine.waiters import Waiter, Waiters

T = TypeVar("T")
P = ParamSpec("P")


def _like_llm(
    _: Callable[Concatenate[LLM, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate["AsyncLLM", P], None]]:
    """For type checkers: the decorated constructor takes the arguments of LLM, whatever they are."""
    return lambda function: function


class AsyncLLM:
    """A language model for coroutines. Arguments as of `LLM`; `AsyncLLM.of(llm)` wraps one that is loaded.

    Requests of all coroutines, event loops and threads run together. A task that is cancelled, and a loop over a
    stream that is left, let their request go. An exception of the engine reaches every request that is open; the next
    request starts afresh.

    >>> async with AsyncLLM("demo") as llm:
    ...     async for piece in llm.stream("The capital of France is"):
    ...         print(piece.text, end="")
    """

    @_like_llm(LLM.__init__)
    def __init__(self, *args: object, **options: object) -> None:
        self._wrap(LLM(*args, **options), is_own=True)  # pyrefly: ignore - `_like_llm` has checked them

    @classmethod
    def of(cls, llm: LLM) -> Self:
        """Around a model that is loaded already. Closing leaves `llm` in working order."""
        self = cls.__new__(cls)
        self._wrap(llm, is_own=False)
        return self

    def _wrap(self, llm: LLM, *, is_own: bool) -> None:
        self.llm = llm
        self._is_own = is_own
        self._waiters = Waiters(llm.frontend)

    # -- answers ------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Output]:
        """Complete prompts together; as `LLM.generate`."""
        return await self._waiters.run(
            lambda on_mail: self.llm.begin_generate(prompts, params, adapter=adapter, on_mail=on_mail)
        )

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Message] | None = None,
        adapter: str | None = None,
    ) -> Output:
        """Answer a conversation; as `LLM.chat`."""
        ids = self.llm.tokenizer.apply_chat(messages, tools=tools)
        return (await self.generate([ids], params, adapter=adapter))[0]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> "PieceStream":
        """Complete one prompt, piece by piece; must be called inside a running event loop.

        Raises RequestError at once, before the first piece is asked for.
        """
        return PieceStream(
            self._waiters, self._waiters.open(lambda on_mail: self._begin(prompt, params, adapter, on_mail))
        )

    async def open_stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> "PieceStream":
        """As `stream`, prepared in another thread: a large text or schema does not hold up the event loop."""
        waiter = await self._waiters.open_in_thread(
            lambda on_mail: self._begin(prompt, params, adapter, on_mail)
        )
        return PieceStream(self._waiters, waiter)

    def _begin(
        self, prompt: Prompt, params: SamplingParams | None, adapter: str | None, on_mail: Callable[[], None]
    ) -> list[Ticket]:
        return [self.llm.begin_stream(prompt, params, adapter=adapter, on_mail=on_mail)]

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Message] | None = None,
        adapter: str | None = None,
    ) -> "PieceStream":
        """As `chat`, piece by piece. Raises ChatError at once for malformed messages."""
        return self.stream(self.llm.tokenizer.apply_chat(messages, tools=tools), params, adapter=adapter)

    async def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], *, adapter: str | None = None
    ) -> list[Score]:
        """Log-likelihood of each continuation after its prompt; as `LLM.score`."""
        return await self._waiters.run(
            lambda on_mail: self.llm.begin_score(prompts, continuations, adapter=adapter, on_mail=on_mail)
        )

    async def embed(self, texts: Sequence[Prompt], *, adapter: str | None = None) -> torch.Tensor:
        """The mean of the last hidden states of each text, (texts, C) float32; as `LLM.embed`."""
        return await self._waiters.run(
            lambda on_mail: self.llm.begin_embed(texts, adapter=adapter, on_mail=on_mail)
        )

    # -- the end ------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End it; requests that are open raise RequestError. May be called twice.

        The model is closed with it, unless it was given to `of`.
        """
        self._waiters.close()
        await asyncio.to_thread(self.llm.close if self._is_own else self.llm.frontend.settle)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class PieceStream:
    """The pieces of one request, for `async for`. Dropping it, or `await aclose()`, lets the request go."""

    def __init__(self, waiters: Waiters, waiter: Waiter) -> None:
        self._waiters = waiters
        self._waiter = waiter
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if self._is_over:
            raise StopAsyncIteration
        (ticket,) = self._waiter.tickets
        try:
            while True:
                is_done = ticket.is_done  # first: what is there afterwards is all there is
                if ticket.pieces:
                    return ticket.pieces.popleft()
                if is_done:
                    break
                await self._waiter.wait()
            ticket.raise_error()
        except BaseException:
            self._let_go()
            raise
        self._let_go()
        raise StopAsyncIteration

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were computed before, for another request; known with the first piece."""
        return self._waiter.tickets[0].requests[0].num_cached

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        """One for each prompt id after the first, where asked for; complete when the stream is over."""
        found = [update.prompt_logprobs for update in self._waiter.tickets[0].last_updates]
        return [token for each in found if each is not None for token in each]

    async def aclose(self) -> None:
        """Let the request go before its end."""
        self._let_go()

    def __del__(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._waiters.let_go(self._waiter)
