"""The JSON of a body, read strictly: what is accepted can be sent back.

Python's reader also takes NaN, numbers beyond every float, lone surrogates and UTF-16, which JSON (RFC 8259) has not;
an answer that repeats such a value could not be written.
"""

import json
import math
from collections.abc import Callable, Coroutine

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from internlm2.serve.errors import BAD_REQUEST, ApiError

MAX_DEPTH = 200  # what works on schemas goes down by calling itself
_TOO_DEEP = (
    f"The body is nested too deeply: at most {MAX_DEPTH} lists and objects may stand within each other."
)


class BodyError(HTTPException):
    """A body that is refused, in the family that the framework lets through. told: what the client gets."""

    def __init__(self, message: str) -> None:
        super().__init__(BAD_REQUEST, message)
        self.told = ApiError(BAD_REQUEST, message, code="invalid_json")


def read_json(body: bytes) -> object:
    """What a body says. Raises JSONDecodeError for broken JSON, BodyError for all else that JSON has not."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BodyError(f"The body is not UTF-8: {error.reason}, at byte {error.start}.") from error
    try:
        found = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except UnicodeEncodeError as error:
        lone = error.object[error.start]
        raise BodyError(
            f"The body holds the lone surrogate {lone!r}, which no UTF-8 text can hold."
        ) from error
    except RecursionError as error:
        raise BodyError(_TOO_DEEP) from error
    except ValueError as error:  # Python's limit on the digits of a number
        raise BodyError("The body holds a number of too many digits.") from error
    if _is_deeper(found, MAX_DEPTH):
        raise BodyError(_TOO_DEEP)
    return found


def _is_deeper(found: object, limit: int) -> bool:
    """Whether lists and objects stand within each other more than `limit` times."""
    level = [found] if isinstance(found, dict | list) else []
    for _ in range(limit):
        if not level:
            return False
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, (dict, list))
        ]
    return bool(level)


def _refuse(name: str) -> None:
    raise BodyError(f"The body holds {name}, which JSON has not.")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise BodyError(f"The body holds the number {text[:40]}, which is beyond every float.")
    return number


class _StrictRequest(Request):
    async def json(self) -> object:
        return read_json(await self.body())


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[object, object, Response]]:
        """As the framework asks for it."""
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await inner(_StrictRequest(request.scope, request.receive))

        return handler
