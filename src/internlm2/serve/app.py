"""The application: routes, errors in OpenAI's shape, the description of the API, and the guard around all of it."""

import asyncio
import html
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from internlm2 import __version__
from internlm2.engine.async_llm import AsyncLLM
from internlm2.engine.sampling.params import SamplingParams
from internlm2.errors import InternLM2Error
from internlm2.serve import errors
from internlm2.serve.api.body import BodyError
from internlm2.serve.api.chat import chat_routes
from internlm2.serve.api.completions import completion_routes
from internlm2.serve.api.misc import model_routes, state_routes, token_routes
from internlm2.serve.api.responses import response_routes
from internlm2.serve.api.schema import Json
from internlm2.serve.api.vectors import reward_routes, vector_routes
from internlm2.serve.errors import ApiError
from internlm2.serve.guard import Guard
from internlm2.serve.page import WEB_FOLDER, add_page
from internlm2.serve.service import Service

_log = logging.getLogger(__name__)
_NUM_THREADS = 32
_STATUSES = {
    "400": "The request is wrong; the message says how.",
    "401": "The API key is missing or unknown.",
    "404": "There is no such model or path.",
    "413": "The body is too large.",
    "429": "Too many open requests; retry-after says when to try again.",
    "500": "A fault of the server.",
    "503": "The server is shutting down.",
    "504": "The answer took too long.",
}


def create_app(service: Service, *, web_folder: Path = WEB_FOLDER) -> ASGIApp:
    """The whole server as an ASGI application. web_folder: a page for `/` with its files, served when it is there."""
    app = FastAPI(
        title="InternLM2",
        version=__version__,
        description="The OpenAI-compatible API of the internlm2 package. docs/serving.md says what differs.",
        lifespan=_lifespan(service),
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
    )
    families = (
        chat_routes, completion_routes, response_routes, vector_routes, reward_routes, model_routes, token_routes,
        state_routes,
    )  # fmt: skip
    for routes in families:
        app.include_router(routes(service))
    _describe(app)
    add_page(app, web_folder)
    _answer_errors(app)
    guarded: ASGIApp = Guard(app, service)
    if service.settings.cors_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type"),
            expose_headers=("x-request-id", "retry-after"),
        )
    return guarded


def _lifespan(service: Service) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Threads that prepare requests; the few that asyncio takes on a small machine could all wait for schemas.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_NUM_THREADS, "internlm2-serve"))
        if service.llm is not None:
            await _warm_up(service.llm)
        yield
        if service.llm is not None:
            await service.llm.close()

    return lifespan


async def _warm_up(llm: AsyncLLM) -> None:
    """One token in a fixed form: the grammar's copy of the vocabulary takes a second that no client should wait."""
    bos_id = llm.llm.tokenizer.bos_id
    try:
        await llm.generate([[bos_id or 0]], SamplingParams(max_tokens=1, choice=("a", "b")))
    except InternLM2Error as error:
        _log.warning("Answers in a fixed form will not work: %s", error)


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(InternLM2Error)
    async def user_error(_: Request, error: InternLM2Error) -> Response:
        return ApiError(errors.BAD_REQUEST, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        route = request.scope.get("route")
        known: list[str] = []
        if isinstance(route, APIRoute) and route.body_field is not None:
            kind = route.body_field.field_info.annotation
            known = list(getattr(kind, "model_fields", {}))
        return errors.from_validation(error.errors(), known).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return errors.failed().response()  # the guard writes the log

    @app.exception_handler(BodyError)
    async def unreadable(_: Request, error: BodyError) -> Response:
        return error.told.response()

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return errors.from_status(error.status_code, error.headers).response()


def _describe(app: FastAPI) -> None:
    """Errors as they really are in /openapi.json, and a page of it that needs no other host."""
    inner = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = inner()
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas["Error"] = _ERROR_SCHEMA
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                for status, text in _STATUSES.items():
                    operation["responses"].setdefault(status, {"description": text, "content": content})
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}, {}]
        return schema

    app.openapi = openapi

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_page(openapi()))


_ERROR_SCHEMA: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _page(schema: Json) -> str:
    """The API as a page without scripts."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>InternLM2 API</title><h1>InternLM2 API {__version__}</h1>"
    ]
    parts.append('<p>For programs: <a href="/openapi.json">/openapi.json</a>.</p>')
    paths, components = schema["paths"], schema["components"]
    assert isinstance(paths, dict)
    assert isinstance(components, dict)
    for path, operations in paths.items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation.get('summary', ''))}</p>")
            body = (
                operation.get("requestBody", {})
                .get("content", {})
                .get("application/json", {})
                .get("schema", {})
            )
            if "$ref" in body:
                name = body["$ref"].rpartition("/")[2]
                parts.append(f'<p>Body: <a href="#{name}">{name}</a></p>')
    for name, each in components["schemas"].items():
        text = html.escape(json.dumps(each, indent=2, ensure_ascii=False))
        parts.append(f'<h3 id="{name}">{name}</h3><pre>{text}</pre>')
    return "\n".join(parts)
