"""Which conversation a request belongs to, and which replica should answer it: the one that has the prefix computed.

A conversation is known by how it begins, which every later turn repeats. Replicas are ranked for it by rendezvous
hashing (Thaler and Ravishankar 1998), so that one which comes or goes moves only its own share; a replica with clearly
more to do than another is passed over. Ray's proxy loads this file: it must stay free of the model.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-internlm2-conversation"
_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
_MOST_BYTES = 1 << 20  # a larger body is not looked into: parsing it would hold up every other request
_MOST_SECONDS = 1.0  # nor one that comes slowly: the replica waits for it, and tells of it
_NUM_TEXT = 256  # characters or ids by which a prompt without messages is known
_ALLOWANCE = 4  # requests


def conversation_key(body: bytes) -> str | None:
    """32 hexadecimal digits that all turns of a conversation share; None for a body that has no conversation.

    A client that sends `prompt_cache_key`, OpenAI's field for this, says itself what belongs together. Otherwise it is
    all messages up to the first of a user's, or the head of the prompt; always with the model, which may be an adapter.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the replica says what is wrong with it
    if not isinstance(request, dict):
        return None
    named = request.get("prompt_cache_key")
    start = ["named", named] if isinstance(named, str) else _start(request)
    if start is None:
        return None
    text = json.dumps([request.get("model"), start])  # ASCII: no surrogate can fail
    return blake2b(text.encode(), digest_size=16).hexdigest()


def ranked(key: str, replicas: Sequence[str]) -> list[str]:
    """Names of replicas, the one that a key prefers first."""
    return sorted(replicas, key=lambda name: blake2b(f"{key} {name}".encode(), digest_size=8).digest())


def choose(key: str, loads: Mapping[str, int]) -> str:
    """The replica for a key: the first it prefers that has not clearly more open requests than the least loaded.

    loads: open requests of each replica, at least one. Clearly more: by over 4, and by over a quarter.
    """
    least = min(loads.values())
    most = least + max(_ALLOWANCE, least // 4)
    return next(name for name in ranked(key, list(loads)) if loads[name] <= most)


class ConversationHeader:
    """ASGI around Ray's proxy, whose router sees a request's headers alone: writes the key into HEADER.

    The body is passed on as it came. What a client itself sends under that name is dropped.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if not _is_ours(name)]
        messages: list[Message] = []
        if scope["method"] == "POST" and scope["path"] in _PATHS:
            body = await _read(receive, messages)
            key = conversation_key(body) if body is not None else None
            if key is not None:
                headers.append((HEADER.encode(), key.encode()))
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app({**scope, "headers": headers}, replay, send)


def proxy_middlewares() -> list[Middleware]:
    """What Ray's proxy puts around itself."""
    return [Middleware(ConversationHeader)]


def _is_ours(name: bytes) -> bool:
    return name.lower().replace(b"_", b"-") == HEADER.encode()  # Ray takes either spelling


async def _read(receive: Receive, messages: list[Message]) -> bytes | None:
    """The whole body, or None where it is too large, too slow or broken off. messages: takes all that came."""
    size = 0
    try:
        async with asyncio.timeout(_MOST_SECONDS):
            while size <= _MOST_BYTES:
                message = await receive()
                messages.append(message)
                if message["type"] != "http.request":
                    return None
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        return None
    return b"".join(each.get("body", b"") for each in messages) if size <= _MOST_BYTES else None


def _start(request: Mapping[str, object]) -> list[object] | None:
    """How a conversation or a prompt begins, in one form for all endpoints."""
    turns = request.get("messages", request.get("input"))
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if isinstance(turns, list):
        start: list[object] = [request.get("instructions")]
        for turn in turns:
            if not isinstance(turn, dict):
                return None
            start.append([turn.get("role"), _text(turn.get("content"))])
            if turn.get("role") == "user":
                break
        return start
    prompt = request.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]  # of several texts the first
    return ["prompt", prompt[:_NUM_TEXT]] if isinstance(prompt, str | list) else None


def _text(content: object) -> object:
    """The same for a text and for a list of one part with that text."""
    if isinstance(content, list):
        return "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content
