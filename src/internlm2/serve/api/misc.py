"""Models, tokens, and what a supervisor asks: health, readiness, metrics, version."""

import asyncio
from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from internlm2 import __version__
from internlm2.serve import errors
from internlm2.serve.api.body import JsonRoute
from internlm2.serve.api.chat import ChatMessage
from internlm2.serve.api.schema import Json, Strict, Tool
from internlm2.serve.errors import BAD_REQUEST, UNAVAILABLE, ApiError
from internlm2.serve.metrics import CONTENT_TYPE
from internlm2.serve.service import Service


class TokenizeRequest(Strict):
    """A text (`prompt`), or a conversation (`messages`). allow_special: read `<|im_start|>` and the like as tokens."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_bos: bool = True
    allow_special: bool = False
    add_generation_prompt: bool = True


class DetokenizeRequest(Strict):
    """Ids to write as text. skip_special: leave control tokens out."""

    model: str | None = None
    tokens: list[int]
    skip_special: bool = False


def _tokenize(body: TokenizeRequest, service: Service) -> Json:
    tokenizer = service.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(BAD_REQUEST, "Give one of prompt and messages.", param="prompt", code="invalid_value")
    if body.messages is not None:
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        messages = [message.plain() for message in body.messages]
        ids = tokenizer.apply_chat(messages, tools=tools, add_generation_prompt=body.add_generation_prompt)
    else:
        ids = tokenizer.encode(body.prompt or "", bos=body.add_bos, allow_special=body.allow_special)
    longest = None if service.llm is None else service.llm.llm.max_model_len
    return {"tokens": ids, "count": len(ids), "max_model_len": longest}


def token_routes(service: Service) -> APIRouter:
    """Text to ids and back."""
    router = APIRouter(tags=["tokens"], route_class=JsonRoute)

    @router.post("/tokenize", summary="Ids of a text or a conversation.")
    async def tokenize(body: TokenizeRequest) -> Response:
        service.adapter_of(body.model)
        return JSONResponse(await asyncio.to_thread(_tokenize, body, service))

    @router.post("/detokenize", summary="Text of ids.")
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.adapter_of(body.model)
        decode = service.tokenizer.decode
        text = await asyncio.to_thread(decode, body.tokens, skip_special=body.skip_special)
        return JSONResponse({"prompt": text})

    return router


def model_routes(service: Service) -> APIRouter:
    """Which models are served."""
    router = APIRouter(tags=["models"], route_class=JsonRoute)

    def described(name: str) -> Json:
        longest = None if service.llm is None else service.llm.llm.max_model_len
        parent = None if name == service.settings.model_name else service.settings.model_name
        kind = "reward" if service.llm is None else "language"
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "internlm2",
            "kind": kind,
            "max_model_len": longest,
            "parent": parent,
        }

    @router.get("/v1/models", summary="The served model and its adapters.")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [described(name) for name in service.models]})

    @router.get("/v1/models/{model:path}", summary="One of them.")
    async def retrieve_model(model: str) -> Response:
        if model not in service.models:
            raise errors.not_found(model, service.models)
        return JSONResponse(described(model))

    return router


def state_routes(service: Service) -> APIRouter:
    """How the server is."""
    router = APIRouter(tags=["state"], route_class=JsonRoute)

    @router.get("/health", summary="200 as long as the process answers.")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @router.get("/ready", summary="200 while requests are taken, 503 before the end.")
    async def ready() -> Response:
        if service.gate.is_draining:
            return JSONResponse({"status": "draining"}, status_code=UNAVAILABLE)
        return JSONResponse({"status": "ready"})

    @router.get("/version", summary="The version of the package.")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @router.get("/metrics", summary="Counters for Prometheus.", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    return router
