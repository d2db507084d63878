"""`/v1/chat/completions`: what comes in, and how deltas become OpenAI's objects."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from internlm2.engine.sampling.params import SamplingParams
from internlm2.serve.api.body import JsonRoute
from internlm2.serve.api.reports import chat_logprobs, usage
from internlm2.serve.api.schema import (
    Generation,
    Json,
    NamedTool,
    Strict,
    Tool,
    refuse,
)
from internlm2.serve.errors import BAD_REQUEST, ApiError
from internlm2.serve.events import DONE, ClientLeftError, EventStream, answer, event, nobody
from internlm2.serve.guard import Exchange, exchange_of
from internlm2.serve.service import Service
from internlm2.serve.talk.ask import Ask, ask_chat, sampling
from internlm2.serve.talk.calls import ToolChoice
from internlm2.serve.talk.reader import Delta, ToolCall
from internlm2.serve.talk.run import Run


class ChatMessage(Strict):
    """A message. The fields after `loss` are what OpenAI's answers carry besides; they are not read."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function", "environment"]
    content: str | list[Json] | None = None
    name: str | None = None
    tool_calls: list[Json] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Json] | None = None
    audio: None = None
    function_call: None = None
    reasoning_content: str | None = None

    def plain(self) -> Json:
        """As the chat format takes it."""
        names = ("role", "content", "name", "tool_calls", "tool_call_id")
        found: Json = {name: getattr(self, name) for name in names}
        if not self.tool_calls:
            del found["tool_calls"]
            if self.role == "assistant" and self.content is None:
                found["content"] = self.refusal or ""
        return found


class SchemaForm(Strict):
    """A JSON schema and its name. strict: taken as true, whatever it says."""

    name: str
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaForm | None = None

    @property
    def schema_or_none(self) -> Json | None:
        """What the answer has to obey. Raises ApiError when the schema is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise ApiError(
                BAD_REQUEST,
                "response_format is json_schema, but has no schema: {'name': ..., 'schema': {...}}.",
                code="missing_required_parameter",
                param="response_format.json_schema.schema",
            )
        return self.json_schema.schema_


class ChatRequest(Generation):
    """A conversation to go on with."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=1000)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    # Without meaning here, and without harm:
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: Json | None = None
    # Refused where they ask for something:
    modalities: list[str] | None = None
    audio: Json | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Json | None = None
    functions: list[Json] | None = None
    function_call: str | Json | None = None

    def check(self) -> None:
        """Raise ApiError for what is understood and cannot be done."""
        refuse({"modalities": self.modalities}, ["text"])
        refuse({"reasoning_effort": self.reasoning_effort}, "none")
        refuse({"verbosity": self.verbosity}, "medium")
        names = ("audio", "web_search_options", "functions", "function_call")
        refuse({name: getattr(self, name) for name in names})
        if self.top_logprobs and not self.logprobs:
            raise ApiError(
                BAD_REQUEST, "top_logprobs needs logprobs=true.", param="top_logprobs", code="invalid_value"
            )

    def choice_of_tool(self) -> ToolChoice:
        """What `tool_choice` says. Raises ApiError where it needs tools and there are none."""
        given = self.tool_choice
        if given is None or isinstance(given, str):
            choice = ToolChoice(given or "auto")
        else:
            choice = ToolChoice("named", given.function.name)
        if choice.kind in ("required", "named") and not self.tools:
            raise ApiError(
                BAD_REQUEST,
                "tool_choice asks for a call, but there are no tools.",
                param="tool_choice",
                code="invalid_value",
            )
        return choice


def params_of(request: ChatRequest, defaults: SamplingParams) -> SamplingParams:
    """The sampling of a request. Raises RequestError for values outside their range."""
    form = request.response_format
    chosen = request.chosen() | {
        "max_tokens": request.max_completion_tokens or request.max_tokens,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        "json_schema": None if form is None else form.schema_or_none,
    }
    return sampling(defaults, chosen)


def _ask(request: ChatRequest, service: Service) -> Ask:
    request.check()
    adapter = service.adapter_of(request.model)
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    return ask_chat(
        service.tokenizer,
        [message.plain() for message in request.messages],
        params_of(request, service.settings.defaults),
        tools=tools,
        choice=request.choice_of_tool(),
        allows_parallel=request.parallel_tool_calls is not False,
        continue_final=bool(request.continue_final_message),
        adapter=adapter,
    )


class _Shape:
    """OpenAI's objects for one request."""

    def __init__(self, service: Service, model: str, *, has_logprobs: bool) -> None:
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._tokenizer = service.tokenizer
        self._has_logprobs = has_logprobs
        self._num_calls: dict[int, int] = {}

    def chunk(self, choices: list[Json], *, report: Json | None = None, has_usage: bool = False) -> bytes:
        """One event of a stream. has_usage: whether its events have the field at all, as OpenAI's do where asked."""
        extra: Json = {"usage": report} if has_usage else {}
        return event({**self.head, "object": "chat.completion.chunk", "choices": choices, **extra})

    def choice(self, delta: Delta, *, is_first: bool) -> Json:
        """What a delta adds."""
        content: Json = {"role": "assistant", "content": ""} if is_first else {}
        if delta.text:
            content["content"] = delta.text
        if delta.call is not None:
            number = self._num_calls[delta.sample] = self._num_calls.get(delta.sample, -1) + 1
            content["tool_calls"] = [{"index": number, **_call(delta.call)}]
        return {
            "index": delta.sample,
            "delta": content,
            "logprobs": chat_logprobs(self._tokenizer, delta.tokens) if self._has_logprobs else None,
            "finish_reason": _reason(delta, has_calls=delta.sample in self._num_calls),
        }

    def whole(self, sample: int, deltas: list[Delta]) -> Json:
        """A complete answer."""
        calls = [_call(delta.call) for delta in deltas if delta.call is not None]
        text = "".join(delta.text for delta in deltas)
        message: Json = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        tokens = [token for delta in deltas for token in delta.tokens]
        return {
            "index": sample,
            "message": message,
            "logprobs": chat_logprobs(self._tokenizer, tokens) if self._has_logprobs else None,
            "finish_reason": _reason(deltas[-1], has_calls=bool(calls)),
        }


def _call(call: ToolCall) -> Json:
    return {
        "id": call.call_id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _reason(delta: Delta, *, has_calls: bool) -> str | None:
    return "tool_calls" if delta.finish_reason == "stop" and has_calls else delta.finish_reason


async def _events(
    run: Run, shape: _Shape, exchange: Exchange, *, wants_usage: bool
) -> AsyncGenerator[bytes, None]:
    for sample in range(run.ask.params.n):
        yield shape.chunk([shape.choice(Delta(sample), is_first=True)], has_usage=wants_usage)
    async with aclosing(run.deltas()) as deltas:
        async for delta in deltas:
            if delta.text or delta.call or delta.tokens or delta.finish_reason:
                yield shape.chunk([shape.choice(delta, is_first=False)], has_usage=wants_usage)
    if wants_usage:
        yield shape.chunk([], report=usage(exchange, [run]), has_usage=True)
    yield DONE


def chat_routes(service: Service) -> APIRouter:
    """The router of this family."""
    router = APIRouter(tags=["chat"], route_class=JsonRoute)

    @router.post("/v1/chat/completions", summary="Answer a conversation, with tools where given.")
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        exchange = exchange_of(request.scope)
        llm, wants_usage = service.language_model, body.wants_usage
        exchange.slots.append(service.gate.enter(exchange.key, body.n or 1))
        shape = _Shape(service, body.model or service.settings.model_name, has_logprobs=bool(body.logprobs))

        async def started() -> Run:
            run = Run(llm, await asyncio.to_thread(_ask, body, service), exchange)
            await run.start()
            return run

        async def whole() -> Json:
            run = await started()
            deltas: dict[int, list[Delta]] = {sample: [] for sample in range(run.ask.params.n)}
            async with aclosing(run.deltas()) as found:
                async for delta in found:
                    deltas[delta.sample].append(delta)
            choices = [shape.whole(*item) for item in deltas.items()]
            return {
                **shape.head,
                "object": "chat.completion",
                "choices": choices,
                "usage": usage(exchange, [run]),
            }

        try:
            if body.stream:
                run = await answer(request, service.gate, started())
                return EventStream(_events(run, shape, exchange, wants_usage=wants_usage), service.gate)
            return JSONResponse(await answer(request, service.gate, whole()))
        except ClientLeftError:
            return nobody()

    return router
