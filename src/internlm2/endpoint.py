"""An address that speaks OpenAI's API, over the standard library: a question out, a JSON object back.

What may pass is tried again while there is time: refused connections, time-outs, 408, 429, 5xx and their like.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.parse import urlsplit

from internlm2.errors import InternLM2Error

MAX_REPLY_BYTES = 64 << 20
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class EndpointError(InternLM2Error):
    """A question without a usable answer. status: the HTTP status; None when no answer came. said: what came with it.

    num_tries: how often it was asked.
    """

    def __init__(
        self, message: str, *, status: int | None = None, said: str = "", num_tries: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.said = said
        self.num_tries = num_tries


class ReplyError(EndpointError):
    """An answer that cannot be read."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(  # noqa: PLR0917 - the library calls it so
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:  # fmt: skip
        return None


class Endpoint:
    """What stands at `url`, such as "http://localhost:8000/v1".

    api_key: sent as a bearer token. num_tries: of each question; max_wait_seconds: between two; timeout_seconds: of
    one. pause: sleeps; tests give another one. Raises EndpointError for a URL that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        num_tries: int = 6,
        max_wait_seconds: float = 60.0,
        timeout_seconds: float = 600.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise EndpointError(
                f"The endpoint is {url!r}, but must be like http://localhost:8000/v1, without a key in it."
            )
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._num_tries = num_tries
        self._max_wait_seconds = max_wait_seconds
        self._timeout_seconds = timeout_seconds
        self._pause = pause
        self._opener = urllib.request.build_opener(_NoRedirect())

    def post(
        self,
        path: str,
        body: Mapping[str, object],
        *,
        deadline: float | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> dict[str, object]:
        """The reply to a question. No try begins after `deadline`, on time.monotonic(), or once it is cancelled.

        Raises EndpointError without an answer, and ReplyError for one that cannot be read.
        """
        url = f"{self.url}/{path}"
        question = urllib.request.Request(url, json.dumps(body).encode(), self._headers)
        for n in range(1, self._num_tries + 1):
            is_late = deadline is not None and time.monotonic() >= deadline
            is_last = n == self._num_tries or is_late or is_cancelled()
            seconds = min(2.0 ** (n - 1), self._max_wait_seconds)
            try:
                with self._opener.open(question, timeout=self._seconds(deadline)) as stream:
                    return _parse(stream.read(MAX_REPLY_BYTES + 1))
            except urllib.error.HTTPError as error:
                if error.code not in _PASSING or is_last:
                    said = _said(error)
                    raise EndpointError(
                        f"{url} answered {error.code}: {said} Check the address, the model and the key.",
                        status=error.code,
                        said=said,
                        num_tries=n,
                    ) from error
                seconds = max(seconds, self._retry_after(error.headers))
            except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
                if is_last:
                    said = str(error) or type(error).__name__
                    raise EndpointError(
                        f"No answer from {url} in {n} tries: {said}. Check that it is there.",
                        said=said,
                        num_tries=n,
                    ) from error
            left = seconds if deadline is None else min(seconds, deadline - time.monotonic())
            self._pause(max(0.0, left))
        raise AssertionError("the last try returns or raises")

    def _seconds(self, deadline: float | None) -> float:
        if deadline is None:
            return self._timeout_seconds
        return max(0.1, min(self._timeout_seconds, deadline - time.monotonic()))

    def _retry_after(self, headers: Message) -> float:
        try:
            return min(max(float(headers.get("Retry-After", "0")), 0.0), self._max_wait_seconds)
        except ValueError:  # a date
            return 0.0


def usage(reply: Mapping[str, object], name: str) -> int | None:
    """A count of tokens that a reply states, such as "prompt_tokens"."""
    found = reply.get("usage")
    count = found.get(name) if isinstance(found, dict) else None
    return count if isinstance(count, int) else None


def whole(text: str) -> str:
    """Without lone surrogates, which can be neither sent nor written to a file."""
    return text.encode("utf-8", "replace").decode()


def _parse(content: bytes) -> dict[str, object]:
    if len(content) > MAX_REPLY_BYTES:
        raise ReplyError(f"The endpoint's reply is longer than {MAX_REPLY_BYTES >> 20} MiB.")
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"The endpoint's reply is no JSON: {content[:200]!r}.") from error
    if not isinstance(reply, dict):
        raise ReplyError(f"The endpoint's reply is no JSON object: {content[:200]!r}.")
    return reply


def _said(error: urllib.error.HTTPError) -> str:
    """What the server wrote about an error, in a line."""
    try:
        content = error.read(2000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        content = ""
    return " ".join((content or str(error.reason)).split())[:500].rstrip(".") + "."
