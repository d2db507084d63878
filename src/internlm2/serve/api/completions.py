"""`/v1/completions`: text that is gone on with, several texts at once, and log-probabilities of given text (`echo`)."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from internlm2.serve.api.body import JsonRoute
from internlm2.serve.api.reports import text_logprobs, usage
from internlm2.serve.api.schema import Generation, Json, refuse
from internlm2.serve.errors import BAD_REQUEST, ApiError
from internlm2.serve.events import DONE, ClientLeftError, EventStream, answer, event, nobody
from internlm2.serve.guard import Exchange, exchange_of
from internlm2.serve.service import Service
from internlm2.serve.talk.ask import Ask, ask_text, sampling
from internlm2.serve.talk.reader import Delta
from internlm2.serve.talk.run import Run, merged

_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[int], Field(min_length=1)]
MAX_TEXTS = 2048
Texts = _Text | _Ids | Annotated[list[_Text | _Ids], Field(min_length=1, max_length=MAX_TEXTS)]


class CompletionRequest(Generation):
    """Texts, or ids that are taken as they are. echo: begin the answer with the text itself."""

    prompt: Texts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    json_schema: Json | None = None
    suffix: str | None = None
    best_of: int | None = None

    def check(self) -> None:
        """Raise ApiError for what is understood and cannot be done."""
        refuse({"suffix": self.suffix}, "")
        refuse({"best_of": self.best_of}, 1, self.n)
        _ = self.wants_usage  # refuses options that do not fit
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(
                BAD_REQUEST,
                "max_tokens is 0, which needs echo=true.",
                param="max_tokens",
                code="invalid_value",
            )
        if self.stream and self.echo and self.logprobs is not None:
            raise ApiError(
                BAD_REQUEST,
                "echo with logprobs does not go with stream=true.",
                param="echo",
                code="invalid_value",
            )


def texts_of(given: str | Sequence[object]) -> list[str | list[int]]:
    """One text, one list of ids, or a list of these, as a list of texts or ids."""
    if isinstance(given, str):
        return [given]
    if all(isinstance(each, int) for each in given):
        return [[each for each in given if isinstance(each, int)]]
    return [each if isinstance(each, str) else list(each) for each in given if isinstance(each, str | list)]


def _asks(request: CompletionRequest, service: Service) -> list[Ask]:
    adapter = service.adapter_of(request.model)
    chosen = request.chosen() | {
        "max_tokens": request.max_tokens or (1 if request.max_tokens == 0 else None),
        "logprobs": request.logprobs,
        "prompt_logprobs": request.logprobs if request.echo else None,
        "json_schema": request.json_schema,
    }
    params = sampling(service.settings.defaults, chosen)
    return [ask_text(service.tokenizer, text, params, adapter=adapter) for text in texts_of(request.prompt)]


class _Shape:
    """OpenAI's objects for one request."""

    def __init__(self, request: CompletionRequest, service: Service) -> None:
        self._request = request
        self._tokenizer = service.tokenizer
        self.head: Json = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model or service.settings.model_name,
        }
        self._num_shown: dict[int, int] = {}  # characters, for text_offset

    def chunk(self, delta: Delta) -> bytes:
        """One event of a stream."""
        logprobs = None
        if self._request.logprobs is not None:
            start = self._num_shown.get(delta.sample, 0)
            ids, found = [t.token_id for t in delta.tokens], [t.logprobs for t in delta.tokens]
            logprobs = text_logprobs(self._tokenizer, ids, found, start=start)
            self._num_shown[delta.sample] = start + len(delta.text)
        return self.event([_choice(delta.sample, delta.text, logprobs, delta.finish_reason)])

    def event(self, choices: list[Json], report: Json | None = None) -> bytes:
        """An event with its usage, where asked for."""
        extra: Json = {"usage": report} if self._request.wants_usage else {}
        return event({**self.head, "choices": choices, **extra})

    def echoed(self, run: Run) -> str:
        """The prompt as text, without BOS where the server added it."""
        ids, bos = run.ask.ids, self._tokenizer.bos_id
        return self._tokenizer.decode(ids[1:] if ids[:1] == [bos] else ids)

    def whole(self, run: Run, index: int, deltas: list[Delta]) -> Json:
        """A complete answer."""
        text, tokens = "".join(d.text for d in deltas), [t for d in deltas for t in d.tokens]
        reason = deltas[-1].finish_reason
        if self._request.max_tokens == 0:
            text, tokens, reason = "", [], "length"
        ids, found, start = [t.token_id for t in tokens], [t.logprobs for t in tokens], 0
        if self._request.echo:
            text = self.echoed(run) + text
            ids, found = [*run.ask.ids, *ids], [None, *run.stream.prompt_logprobs, *found]
            bos = self._tokenizer.bos_id
            start = -len(self._tokenizer.id_to_token(bos)) if bos is not None and ids[0] == bos else 0
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = text_logprobs(self._tokenizer, ids, found, start=start)
        return _choice(index, text, logprobs, reason)


def _choice(index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def _numbered(run: Run, first: int) -> AsyncGenerator[Delta, None]:
    """The deltas of one text, numbered among those of all texts."""
    async with aclosing(run.deltas()) as deltas:
        async for delta in deltas:
            yield replace(delta, sample=first + delta.sample) if first else delta


def _mixed(runs: Sequence[Run]) -> AsyncGenerator[Delta, None]:
    return merged([_numbered(run, place * run.ask.params.n) for place, run in enumerate(runs)])


async def _events(
    runs: list[Run], shape: _Shape, exchange: Exchange, request: CompletionRequest
) -> AsyncGenerator[bytes, None]:
    if request.echo:
        for place, run in enumerate(runs):
            for sample in range(run.ask.params.n):
                yield shape.chunk(Delta(place * run.ask.params.n + sample, text=shape.echoed(run)))
    async with aclosing(_mixed(runs)) as deltas:
        async for delta in deltas:
            shown = replace(delta, text="", tokens=()) if request.max_tokens == 0 else delta
            if shown.text or shown.tokens or shown.finish_reason:
                yield shape.chunk(shown)
    if request.wants_usage:
        yield shape.event([], usage(exchange, runs))
    yield DONE


def completion_routes(service: Service) -> APIRouter:
    """The router of this family."""
    router = APIRouter(tags=["completions"], route_class=JsonRoute)

    @router.post("/v1/completions", summary="Go on with texts.")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        exchange, llm = exchange_of(request.scope), service.language_model
        body.check()
        count = (body.n or 1) * len(texts_of(body.prompt))
        exchange.slots.append(service.gate.enter(exchange.key, count))
        shape = _Shape(body, service)

        async def started() -> list[Run]:
            asks = await asyncio.to_thread(_asks, body, service)
            runs = [Run(llm, ask, exchange) for ask in asks]
            for run in runs:
                await run.start()
            return runs

        async def whole() -> Json:
            runs = await started()
            each: dict[int, list[Delta]] = {n: [] for n in range(count)}
            async with aclosing(_mixed(runs)) as deltas:
                async for delta in deltas:
                    each[delta.sample].append(delta)
            choices = [shape.whole(runs[n // runs[0].ask.params.n], n, found) for n, found in each.items()]
            return {**shape.head, "choices": choices, "usage": usage(exchange, runs)}

        try:
            if body.stream:
                runs = await answer(request, service.gate, started())
                return EventStream(_events(runs, shape, exchange, body), service.gate)
            return JSONResponse(await answer(request, service.gate, whole()))
        except ClientLeftError:
            return nobody()

    return router
