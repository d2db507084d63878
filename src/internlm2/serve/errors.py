"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}} and the right status."""

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from starlette.responses import JSONResponse

from internlm2.config import suggest
from internlm2.errors import InternLM2Error

BAD_REQUEST, UNAUTHORIZED, FORBIDDEN, NOT_FOUND = 400, 401, 403, 404
TIMEOUT, TOO_LARGE, UNSUPPORTED_MEDIA, TOO_MANY = 408, 413, 415, 429
SERVER_ERROR, UNAVAILABLE, GATEWAY_TIMEOUT = 500, 503, 504
_MAX_MESSAGE = 1000
_INVALID = "invalid_request_error"
_OBJECT = re.compile(r"valid dictionary or (instance of \w+|object to extract fields from)")
_KINDS = frozenset({"str", "int", "float", "bool", "list", "dict", "code_interpreter"})
_KIND = re.compile(r"^[A-Z]\w+$|[\[(']|^constrained-")


class ApiError(Exception):
    """An answer that is an error. message: for people. code: for programs. param: which field is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """The JSON that is sent. What a client wrote may come back in it, so lone surrogates are replaced."""
        text = self.message if len(self.message) <= _MAX_MESSAGE else self.message[:_MAX_MESSAGE] + "..."
        return {
            "error": {
                "message": _sendable(text),
                "type": self.kind,
                "param": None if self.param is None else _sendable(self.param),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def not_found(model: str, known: Sequence[str]) -> ApiError:
    """A model that is not served."""
    return ApiError(
        NOT_FOUND,
        f"The model {model!r} is not served here. Served: {', '.join(known)}.",
        code="model_not_found",
        param="model",
    )


def failed() -> ApiError:
    """A fault of ours; what it was stands in the log alone."""
    return ApiError(
        SERVER_ERROR,
        "The server failed while it answered. Its log says why, under the id in x-request-id.",
        kind="server_error",
        code="internal_error",
    )


def too_slow(seconds: float) -> ApiError:
    """An answer that took too long. Clients are told not to try again by themselves."""
    return ApiError(
        GATEWAY_TIMEOUT,
        f"The answer was not complete after {seconds:g} s. Ask for fewer tokens, or raise --request-seconds.",
        kind="timeout",
        code="request_timeout",
        headers={"x-should-retry": "false"},
    )


def closing() -> ApiError:
    """A server that is about to end."""
    return ApiError(
        UNAVAILABLE,
        "The server is shutting down. Try again at another one, or in a moment.",
        kind="server_error",
        code="shutting_down",
        headers={"retry-after": "5"},
    )


def from_exception(error: BaseException) -> ApiError | None:
    """What a client is told about an exception; None for a fault of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InternLM2Error):
        return ApiError(BAD_REQUEST, str(error))
    return None


def from_validation(problems: Sequence[Mapping[str, object]], known: Sequence[str] = ()) -> ApiError:
    """The first thing that is wrong with a body. known: the fields that the endpoint takes."""
    problem = problems[0]
    kind, param = str(problem.get("type")), _place(problem)
    text = str(problem.get("msg"))
    if kind == "json_invalid":
        reason = problem.get("ctx")
        reason = reason.get("error") if isinstance(reason, Mapping) else text
        return ApiError(
            BAD_REQUEST, f"The body is not JSON: {reason}, at character {param}.", code="invalid_json"
        )
    if kind == "extra_forbidden":
        near = f" {suggest(str(param), list(known))}" if known and "." not in str(param) else ""
        return ApiError(
            BAD_REQUEST,
            f"Unrecognized request argument supplied: {param}.{near}",
            code="unknown_parameter",
            param=param,
        )
    if param is None:
        message = f"The body must be a JSON object sent as content-type: application/json ({text})."
        return ApiError(BAD_REQUEST, message, code="invalid_body")
    code = "missing_required_parameter" if kind == "missing" else "invalid_value"
    # Where a field may be of several kinds, there is a problem for each.
    texts = dict.fromkeys(
        _OBJECT.sub("JSON object", str(each.get("msg"))) for each in problems if _place(each) == param
    )
    return ApiError(
        BAD_REQUEST, f"Invalid value for {param!r}: {', or: '.join(texts)}.", code=code, param=param
    )


def _place(problem: Mapping[str, object]) -> str | None:
    """Which field a problem is about, without the names of kinds that pydantic puts between."""
    where = problem.get("loc", ())
    parts = [str(part) for part in where] if isinstance(where, tuple) else []
    if parts and parts[0] in ("body", "query", "path"):
        parts = parts[1:]
    fields = [part for part in parts if not (part in _KINDS or _KIND.search(part))]
    single = [
        part for n, part in enumerate(fields) if n == 0 or part != fields[n - 1]
    ]  # "function", by kind and name
    return ".".join(single or parts[:1]) or None


def crowded(num_connections: int) -> ApiError:
    """More connections than the server takes."""
    return ApiError(
        UNAVAILABLE,
        f"This server has its {num_connections} connections open already. Try again in a moment.",
        kind="server_error",
        code="too_many_connections",
        headers={"retry-after": "1", "connection": "close"},
    )


def not_http() -> ApiError:
    """Bytes that are no request."""
    return ApiError(
        BAD_REQUEST,
        "This is not a valid HTTP/1.1 request.",
        code="invalid_http",
        headers={"connection": "close"},
    )


def from_status(status: int, headers: Mapping[str, str] | None = None) -> ApiError:
    """What the framework refuses by itself: unknown paths, wrong methods, bodies that cannot be read."""
    phrase = HTTPStatus(status).phrase
    hints = {
        BAD_REQUEST: "The body could not be read.",
        NOT_FOUND: "There is no such path. /openapi.json lists all of them.",
        405: "This path takes another method. /openapi.json lists them.",
    }
    message, code = hints.get(status, f"{phrase}."), phrase.lower().replace(" ", "_")
    return ApiError(status, message, code=code, headers=headers)
