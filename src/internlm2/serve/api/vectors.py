"""`/v1/embeddings` of language models, `/v1/score` and `/v1/rank` of reward models."""

import asyncio
import base64
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from internlm2.engine.waiters import Waiters
from internlm2.serve.api.body import JsonRoute
from internlm2.serve.api.chat import ChatMessage
from internlm2.serve.api.completions import MAX_TEXTS, Texts, texts_of
from internlm2.serve.api.schema import Json, Strict
from internlm2.serve.errors import BAD_REQUEST, ApiError
from internlm2.serve.events import ClientLeftError, answer, nobody
from internlm2.serve.guard import exchange_of
from internlm2.serve.service import Service
from internlm2.serve.talk.ask import check_length

_Conversation = Annotated[list[ChatMessage], Field(min_length=1)]


class EmbeddingsRequest(Strict):
    """Texts, or ids as they are. Each becomes the mean of the model's last hidden states over its tokens."""

    model: str | None = None
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class ScoreRequest(Strict):
    """Conversations, each ending with the answer that is to be judged."""

    model: str | None = None
    conversations: Annotated[list[_Conversation], Field(min_length=1, max_length=MAX_TEXTS)]


class RankRequest(Strict):
    """A conversation (`messages`) and answers to it."""

    model: str | None = None
    messages: _Conversation
    answers: Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]


def vector_routes(service: Service) -> APIRouter:
    """The router of embeddings."""
    router = APIRouter(tags=["embeddings"], route_class=JsonRoute)

    @router.post("/v1/embeddings", summary="The mean of the last hidden states of each text.")
    async def create_embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        exchange, llm = exchange_of(request.scope), service.language_model
        adapter, texts = service.adapter_of(body.model), texts_of(body.input)
        exchange.slots.append(service.gate.enter(exchange.key, len(texts)))

        async def whole() -> Json:
            ids = await asyncio.to_thread(lambda: [llm.llm.encode(text) for text in texts])
            for each in ids:
                check_length(len(each), llm.llm.max_model_len, answer_tokens=0)
            exchange.num_prompt_tokens = sum(map(len, ids))
            vectors = await llm.embed(ids, adapter=adapter)
            if body.dimensions not in (None, vectors.shape[1]):
                raise ApiError(
                    BAD_REQUEST,
                    f"dimensions is {body.dimensions}, but the vectors of this model have {vectors.shape[1]}.",
                    param="dimensions",
                    code="invalid_value",
                )
            rows = vectors.cpu().numpy().astype("<f4")
            is_text = body.encoding_format == "base64"
            data = [
                {
                    "object": "embedding",
                    "index": n,
                    "embedding": base64.b64encode(row.tobytes()).decode() if is_text else row.tolist(),
                }
                for n, row in enumerate(rows)
            ]
            return _listed(service, data, exchange.num_prompt_tokens)

        try:
            return JSONResponse(await answer(request, service.gate, whole()))
        except ClientLeftError:
            return nobody()

    return router


def reward_routes(service: Service) -> APIRouter:
    """The router of reward models."""
    router = APIRouter(tags=["rewards"], route_class=JsonRoute)
    waiters = Waiters(service.frontend)

    async def scored(request: Request, model: str | None, conversations: list[list[Json]]) -> list[float]:
        exchange, scorer = exchange_of(request.scope), service.reward_model
        service.adapter_of(model)
        exchange.slots.append(service.gate.enter(exchange.key, len(conversations)))

        async def whole() -> list[float]:
            ids = await asyncio.to_thread(lambda: [scorer.encode(each) for each in conversations])
            exchange.num_prompt_tokens = sum(map(len, ids))
            return await waiters.run(lambda on_mail: scorer.begin_scores(ids, on_mail=on_mail))

        return await answer(request, service.gate, whole())

    @router.post("/v1/score", summary="The reward of each conversation; higher is better.")
    async def score(body: ScoreRequest, request: Request) -> Response:
        conversations = [[message.plain() for message in each] for each in body.conversations]
        try:
            scores = await scored(request, body.model, conversations)
        except ClientLeftError:
            return nobody()
        data: list[Json] = [{"object": "score", "index": n, "score": score} for n, score in enumerate(scores)]
        return JSONResponse(_listed(service, data, exchange_of(request.scope).num_prompt_tokens))

    @router.post("/v1/rank", summary="Answers to one conversation, the best first.")
    async def rank(body: RankRequest, request: Request) -> Response:
        before = [message.plain() for message in body.messages]
        conversations: list[list[Json]] = [
            [*before, {"role": "assistant", "content": text}] for text in body.answers
        ]
        try:
            scores = await scored(request, body.model, conversations)
        except ClientLeftError:
            return nobody()
        order = sorted(range(len(scores)), key=lambda n: -scores[n])
        data: list[Json] = [{"object": "score", "index": n, "score": scores[n]} for n in order]
        return JSONResponse(_listed(service, data, exchange_of(request.scope).num_prompt_tokens))

    return router


def _listed(service: Service, data: list[Json], num_tokens: int) -> Json:
    return {
        "object": "list",
        "model": service.settings.model_name,
        "data": data,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
