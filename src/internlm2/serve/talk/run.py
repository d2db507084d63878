"""From an ask to an answer: one request of the engine, or several where calls have to obey a schema.

A grammar of the engine holds a whole answer. So an answer that changes between free text and bound calls is written
by several requests, each going on where the last one ended; the prefix cache keeps what was computed.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from enum import Enum, auto
from itertools import zip_longest

from internlm2.engine.async_llm import AsyncLLM, PieceStream
from internlm2.engine.core import FinishReason
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.sampler import TokenLogprobs
from internlm2.engine.text import Piece
from internlm2.serve.guard import Exchange
from internlm2.serve.talk.ask import Ask, check_length
from internlm2.serve.talk.reader import CallReader, Delta, TokenReport
from internlm2.tokenizer import Tokenizer
from internlm2.tokenizer.special import ACTION_END, ACTION_START

_NEXT_SEED = 1_000_003  # a later part of an answer must not repeat the draws of the one before


class _Part(Enum):
    """What the engine writes now."""

    PEEK = auto()  # a token, or a spelled marker, which shows whether it calls a tool or answers in the form
    FORM = auto()  # text in the fixed form of the request
    FREE = auto()  # text and calls as the model likes
    CALL = auto()  # the rest of a call, by its schema


class Run:
    """The answers to one ask, as deltas. `start` submits; errors of the request are raised there."""

    def __init__(self, llm: AsyncLLM, ask: Ask, exchange: Exchange) -> None:
        self.ask = ask
        self._llm = llm
        self._exchange = exchange
        self._streams: list[PieceStream] = []
        self._answers: list[_Answer] = []

    @property
    def stream(self) -> PieceStream:
        """The first request to the engine."""
        return self._streams[0]

    async def start(self) -> None:
        """Hand the requests to the engine. Raises ApiError and RequestError for what cannot be answered."""
        ask, llm = self.ask, self._llm.llm
        check_length(len(ask.ids), llm.max_model_len)
        self._exchange.num_prompt_tokens += len(ask.ids)
        if ask.reads_calls:
            self._answers = [_Answer(ask, llm.tokenizer, sample) for sample in range(ask.params.n)]
            for each in self._answers:
                self._streams.append(await self._open([*ask.ids, *each.ids], each.params()))
        else:
            self._streams.append(await self._open(ask.ids, ask.params))

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """All answers, mixed as they come; each ends with a delta that has a finish_reason."""
        if not self._answers:
            async for piece in self._streams[0]:
                self._exchange.count(len(piece.token_ids))
                self._exchange.note(piece.text)
                yield _plain(piece)
            return
        each = [self._with_calls(*pair) for pair in zip(self._answers, self._streams, strict=True)]
        async with aclosing(merged(each)) as mixed:
            async for delta in mixed:
                yield delta

    async def _open(self, ids: Sequence[int], params: SamplingParams) -> PieceStream:
        stream = await self._llm.open_stream(ids, params, adapter=self.ask.adapter)
        self._exchange.streams.append(stream)
        return stream

    async def _with_calls(self, answer: "_Answer", stream: PieceStream) -> AsyncGenerator[Delta, None]:
        """One answer that may hold calls: its parts, one after the other."""
        while True:
            async for piece in stream:
                self._exchange.count(len(piece.token_ids))
                for delta in answer.take(piece):
                    self._exchange.note(delta.text if delta.call is None else str(delta.call))
                    yield delta
                if answer.is_part_over:
                    break
            await stream.aclose()
            if answer.reason is None and answer.num_left(self._llm.llm.max_model_len) < 1:
                for delta in answer.cut_off():
                    yield delta
            if answer.reason is not None:
                yield Delta(answer.sample, finish_reason=answer.reason)
                return
            stream = await self._open([*self.ask.ids, *answer.ids], answer.params())


class _Answer:
    """One answer that may hold calls. ids: what stands of it, the tokens that were given to the model included."""

    def __init__(self, ask: Ask, tokenizer: Tokenizer, sample: int) -> None:
        self.sample = sample
        self.ids: list[int] = []
        self.is_part_over = False
        self.reason: FinishReason | None = None
        self._ask = ask
        self._tokenizer = tokenizer
        # One control token, or the marker as the vocabulary spells it.
        self._start_ids = tokenizer.encode(ACTION_START, allow_special=True)
        self._end_ids = tokenizer.encode(ACTION_END, allow_special=True)
        self._peeked: list[tuple[int, TokenLogprobs | None]] = []
        self._reader = CallReader(tokenizer, stop=ask.params.stop, sample=sample)
        self._part = _Part.PEEK if ask.has_form else _Part.FREE
        self._num_used = 0
        self._num_parts = 0
        if ask.opening is not None:
            self._part = _Part.CALL
            self._give(ask.opening.ids)

    def num_left(self, max_model_len: int) -> int:
        """How many tokens may still come."""
        room = max_model_len - len(self._ask.ids) - len(self.ids)
        return min(room, self._ask.params.max_tokens - self._num_used)

    def params(self) -> SamplingParams:
        """How the engine writes the part that begins now."""
        self.is_part_over = False
        given, self._num_parts = self._ask.params, self._num_parts + 1
        max_tokens = given.max_tokens - self._num_used
        if self._part is _Part.PEEK:  # a spelled marker has at most a token for each letter
            max_tokens = min(max_tokens, 1 if self._has_control_tokens else len(ACTION_START))
        seed = given.seed
        if seed is not None:
            seed = (seed + self.sample + _NEXT_SEED * (self._num_parts - 1)) % (1 << 63)
        least = 0 if self._part in (_Part.PEEK, _Part.CALL) else given.min_tokens - self._num_used
        params = replace(
            given, n=1, seed=seed, stop=(), max_tokens=max_tokens, min_tokens=max(0, min(least, max_tokens))
        )
        if self._part is not _Part.FORM:
            params = replace(params, json_schema=None, regex=None, choice=())
        if self._part is not _Part.CALL:
            return params
        if self._schema_of_call is not None:
            return replace(params, json_schema=self._schema_of_call, ignore_eos=False)
        if self._has_control_tokens:  # code, to the end of the call
            return replace(params, stop_token_ids=(*params.stop_token_ids, *self._end_ids))
        return params  # the reader finds the spelled end

    @property
    def _schema_of_call(self) -> Mapping[str, object] | None:
        """What holds the call that is being written; None: code, which is free."""
        opened = self._ask.opening
        return self._ask.call_schema if opened is None else opened.json_schema

    @property
    def _has_control_tokens(self) -> bool:
        return ACTION_START in self._tokenizer.specials.ids

    def take(self, piece: Piece) -> list[Delta]:
        """What a piece of the engine brings. Tokens after the end of a part are left out."""
        deltas: list[Delta] = []
        for token, logprobs in zip_longest(piece.token_ids, piece.logprobs):
            if not self.is_part_over:
                deltas += self._take(token, logprobs)
        if piece.finish_reason is not None and not self.is_part_over:
            deltas += self._end(piece.finish_reason)
        return deltas

    def cut_off(self) -> list[Delta]:
        """There is no room to go on."""
        return self._end("length")

    def _take(self, token: int, logprobs: TokenLogprobs | None) -> list[Delta]:
        if self._part is _Part.PEEK:
            return self._peek(token, logprobs)
        self._num_used += 1
        self.ids.append(token)
        was_in_plugin = self._reader.is_in_plugin
        is_payload = self._part is _Part.CALL and self._schema_of_call is not None
        deltas = self._reader.push(token, logprobs, is_payload=is_payload)
        if self._reader.is_stopped or self._has_all_calls:
            self._over("stop")
        elif self._reader.is_in_plugin and not was_in_plugin and self._binds_calls:
            self._begin_bound_call(token)
        return deltas

    def _peek(self, token: int, logprobs: TokenLogprobs | None) -> list[Delta]:
        """Take the beginning of an answer if it begins a call; leave it out if the fixed form decides."""
        self._peeked.append((token, logprobs))
        ids = [each for each, _ in self._peeked]
        text = "" if self._has_control_tokens else self._tokenizer.decode(ids)
        if ids == self._start_ids or text.startswith(ACTION_START):
            self._go(_Part.FREE)
            return [delta for each in self._peeked for delta in self._take(*each)]
        if not text or not ACTION_START.startswith(text):
            self._go(_Part.FORM)
        return []

    @property
    def _binds_calls(self) -> bool:
        return self._part is _Part.FREE and self._ask.call_schema is not None

    def _begin_bound_call(self, token: int) -> None:
        """Go on by the schema, right behind the markers."""
        dropped = self._reader.drop_payload()
        if dropped:  # letters that shared a token with the end of a spelled marker
            written = self._tokenizer.token_bytes[token].decode(errors="ignore").removesuffix(dropped)
            self.ids[-1:] = self._tokenizer.encode(written)
        self._go(_Part.CALL)
        self._give(self._tokenizer.encode("\n"))

    @property
    def _has_all_calls(self) -> bool:
        return self._ask.max_calls is not None and self._reader.num_calls >= self._ask.max_calls

    def _end(self, reason: FinishReason) -> list[Delta]:
        """The engine has ended this part."""
        if self._part is _Part.PEEK and (reason == "stop" or self._peeked):  # the form may not allow that
            self._go(_Part.FORM)
            return []
        if self._part is _Part.CALL and reason == "stop":
            self.ids.extend(self._end_ids)
            deltas = self._reader.close_call()
            if self._ask.opening is not None or self._has_all_calls:
                self._over("stop")
            else:
                self._go(_Part.FREE)
            return deltas
        self._over(reason)
        return self._reader.finish()

    def _give(self, ids: Sequence[int]) -> None:
        """Put tokens into the answer that the model did not choose."""
        for token in ids:
            self._reader.push(token)
        self.ids.extend(ids)

    def _go(self, part: _Part) -> None:
        self._part, self.is_part_over = part, True

    def _over(self, reason: FinishReason) -> None:
        self.reason, self.is_part_over = reason, True


def _plain(piece: Piece) -> Delta:
    tokens = tuple(
        TokenReport(token, logprobs) for token, logprobs in zip(piece.token_ids, piece.logprobs, strict=False)
    )
    return Delta(piece.sample, piece.text, tokens=tokens, finish_reason=piece.finish_reason)


async def merged(sources: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """What several generators yield, as it comes. The first exception of one ends all of them."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for delta in only:
                yield delta
        return
    mail: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(maxsize=4 * len(sources))

    async def pump(source: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(source):
                async for delta in source:
                    await mail.put(delta)
        except Exception as error:
            await mail.put(error)
        else:
            await mail.put(None)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    num_open = len(tasks)
    try:
        while num_open:
            found = await mail.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                num_open -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
