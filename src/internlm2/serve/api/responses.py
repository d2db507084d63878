"""`/v1/responses`: one answer as items, whole or as the events that OpenAI's clients and agent kits expect."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from internlm2.engine.sampling.params import SamplingParams
from internlm2.serve.api.body import JsonRoute
from internlm2.serve.api.reports import token_logprobs, usage
from internlm2.serve.api.responses_input import ResponsesRequest
from internlm2.serve.api.schema import Json
from internlm2.serve.errors import ApiError
from internlm2.serve.events import ClientLeftError, EventStream, answer, event, nobody
from internlm2.serve.guard import Exchange, exchange_of
from internlm2.serve.service import Service
from internlm2.serve.talk.ask import Ask, ask_chat
from internlm2.serve.talk.reader import Delta, TokenReport, ToolCall
from internlm2.serve.talk.run import Run
from internlm2.tokenizer import Tokenizer


class _Builder:
    """Builds the response item by item. Each step returns its events, as (name, data)."""

    def __init__(self, head: Json, tokenizer: Tokenizer, *, has_logprobs: bool) -> None:
        self.head = head
        self.items: list[Json] = []
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._text: list[str] | None = None  # of the message that is open
        self._tokens: list[TokenReport] = []
        self._number = 0

    def response(self, status: str, **extra: object) -> Json:
        """The response as it stands."""
        return {**self.head, "status": status, "output": list(self.items), **extra}

    def told(self, name: str, /, **data: object) -> bytes:
        """One event."""
        self._number += 1
        return event({"type": name, "sequence_number": self._number - 1, **data}, name)

    def take(self, delta: Delta) -> Iterator[bytes]:
        """What a delta adds."""
        if delta.text or delta.tokens:
            if self._text is None:
                yield from self._open_message()
            assert self._text is not None
            self._text.append(delta.text)
            self._tokens += delta.tokens
            yield self.told(
                "response.output_text.delta",
                **self._place(),
                delta=delta.text,
                logprobs=self._logprobs(list(delta.tokens)),
            )
        if delta.call is not None:
            yield from self.close_message("completed")
            yield from self._add_call(delta.call)

    def end(self, status: str) -> Iterator[bytes]:
        """No more deltas come. An answer without anything is an empty message."""
        if not self.items:
            yield from self._open_message()
        yield from self.close_message(status)

    def _open_message(self) -> Iterator[bytes]:
        self._text, self._tokens = [], []
        item: Json = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self.items.append(item)
        yield self.told("response.output_item.added", output_index=len(self.items) - 1, item=item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self.told("response.content_part.added", **self._place(), part=part)

    def close_message(self, status: str) -> Iterator[bytes]:
        """End the message that is open, if any."""
        if self._text is None:
            return
        text, logprobs = "".join(self._text), self._logprobs(self._tokens)
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
        place, self._text = self._place(), None
        yield self.told("response.output_text.done", **place, text=text, logprobs=logprobs)
        yield self.told("response.content_part.done", **place, part=part)
        self.items[-1] = {**self.items[-1], "status": status, "content": [part]}
        yield self.told("response.output_item.done", output_index=len(self.items) - 1, item=self.items[-1])

    def _add_call(self, call: ToolCall) -> Iterator[bytes]:
        item: Json = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.call_id,
            "name": call.name,
            "arguments": "",
        }
        self.items.append(item)
        index = len(self.items) - 1
        yield self.told("response.output_item.added", output_index=index, item=item)
        place = {"item_id": item["id"], "output_index": index}
        yield self.told("response.function_call_arguments.delta", **place, delta=call.arguments)
        name, arguments = call.name, call.arguments
        yield self.told("response.function_call_arguments.done", **place, name=name, arguments=arguments)
        self.items[-1] = {**item, "status": "completed", "arguments": call.arguments}
        yield self.told("response.output_item.done", output_index=index, item=self.items[-1])

    def _place(self) -> Json:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}

    def _logprobs(self, tokens: list[TokenReport]) -> list[Json]:
        return token_logprobs(self._tokenizer, tokens) if self._has_logprobs else []


def _head(request: ResponsesRequest, service: Service, params: SamplingParams) -> Json:
    """What a response tells of its request."""
    given = request.tool_choice
    choice = given if given is None or isinstance(given, str) else given.model_dump()
    form = request.text.format if request.text is not None else None
    shown = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": request.model or service.settings.model_name,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": params.temperature,
        "text": {"format": shown},
        "tool_choice": choice or "auto",
        "tools": request.tools or [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _ask(request: ResponsesRequest, service: Service) -> Ask:
    request.check()
    adapter = service.adapter_of(request.model)
    return ask_chat(
        service.tokenizer,
        request.messages(),
        request.params(service.settings.defaults),
        tools=request.functions(),
        choice=request.choice_of_tool(),
        allows_parallel=request.parallel_tool_calls is not False,
        adapter=adapter,
    )


def _usage(exchange: Exchange, run: Run) -> Json:
    found = usage(exchange, [run])
    details = found["prompt_tokens_details"]
    assert isinstance(details, dict)
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": {**details, "cache_write_tokens": 0},
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found["total_tokens"],
    }


async def _events(run: Run, builder: _Builder, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    yield builder.told("response.created", response=builder.response("in_progress"))
    yield builder.told("response.in_progress", response=builder.response("in_progress"))
    reason = None
    async with aclosing(run.deltas()) as deltas:
        async for delta in deltas:
            reason = delta.finish_reason or reason
            for each in builder.take(delta):
                yield each
    status = "incomplete" if reason == "length" else "completed"
    for each in builder.end(status):
        yield each
    report: Json = {"usage": _usage(exchange, run)}
    if status == "incomplete":
        report["incomplete_details"] = {"reason": "max_output_tokens"}
    yield builder.told(f"response.{status}", response=builder.response(status, **report))


def response_routes(service: Service) -> APIRouter:
    """The router of this family."""
    router = APIRouter(tags=["responses"], route_class=JsonRoute)

    @router.post("/v1/responses", summary="Answer items; the stateless part of the Responses API.")
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        exchange, llm = exchange_of(request.scope), service.language_model
        exchange.slots.append(service.gate.enter(exchange.key))

        async def started() -> tuple[Run, _Builder]:
            run = Run(llm, await asyncio.to_thread(_ask, body, service), exchange)
            head = _head(body, service, run.ask.params)
            builder = _Builder(head, service.tokenizer, has_logprobs=body.wants_logprobs)
            await run.start()
            return run, builder

        async def whole() -> Json:
            run, builder = await started()
            status, report = "completed", {}
            async with aclosing(run.deltas()) as deltas:
                async for delta in deltas:
                    for _ in builder.take(delta):
                        pass
                    if delta.finish_reason == "length":
                        status = "incomplete"
                        report = {"incomplete_details": {"reason": "max_output_tokens"}}
            for _ in builder.end(status):
                pass
            return builder.response(status, usage=_usage(exchange, run), **report)

        try:
            if body.stream:
                run, builder = await answer(request, service.gate, started())

                def failure(error: ApiError) -> bytes:
                    told = {"code": error.code or error.kind, "message": error.message}
                    return builder.told("response.failed", response=builder.response("failed", error=told))

                return EventStream(_events(run, builder, exchange), service.gate, failure)
            return JSONResponse(await answer(request, service.gate, whole()))
        except ClientLeftError:
            return nobody()

    return router
