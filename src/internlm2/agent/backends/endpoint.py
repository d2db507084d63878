"""Any endpoint that speaks OpenAI's chat API as an agent's model, over the standard library.

What may pass is tried again while there is time: refused connections, 429 and 5xx. The rest is a `ModelError`.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message as Headers
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.parse import urlsplit

from internlm2.agent.model import Ask, ContextFullError, Message, ModelError, Reply, ToolCall

NUM_TRIES = 5
MAX_WAIT_SECONDS = 30.0
MAX_REPLY_BYTES = 64 << 20
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_CONTEXT_FULL = ("context_length_exceeded", "maximum context length")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(  # noqa: PLR0917 - the library calls it so
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:  # fmt: skip
        return None


class EndpointModel:
    """A model behind `url`, such as "http://localhost:8000/v1".

    name: of the model, as the endpoint knows it. api_key: sent as a bearer token. options: sent with every question,
    such as {"temperature": 0, "max_tokens": 512}. calls_tools: whether it takes `tools`. timeout_seconds: of one try.
    pause: sleeps; tests give another one. Raises ModelError for a URL that is none.
    """

    keeps_text_plain = False  # many servers read control tokens out of any text

    def __init__(
        self,
        url: str,
        name: str,
        *,
        api_key: str | None = None,
        options: Mapping[str, object] | None = None,
        calls_tools: bool = True,
        timeout_seconds: float = 600.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ModelError(
                f"The endpoint is {url!r}, but must be like http://localhost:8000/v1, without a key in it."
            )
        self.name = name
        self.calls_tools = calls_tools
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._api_key = api_key
        self._options = dict(options or {})
        self._timeout_seconds = timeout_seconds
        self._pause = pause
        self._opener = urllib.request.build_opener(_NoRedirect())

    def respond(self, ask: Ask) -> Reply:
        """See `Model.respond`."""
        body: dict[str, object] = {**self._options, "model": self.name}
        body["messages"] = [_message(message) for message in ask.messages]
        if ask.tools:
            strict = {"strict": True} if ask.constrain else {}
            body["tools"] = [{"type": "function", "function": tool.function | strict} for tool in ask.tools]
        if ask.stop:
            body["stop"] = list(ask.stop)[:4]  # OpenAI takes four
        if ask.json_schema is not None:
            schema = {"name": "arguments", "schema": ask.json_schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if ask.continues:
            body["continue_final_message"] = True  # not OpenAI's; `internlm2 serve` knows it
        return _reply(self._post(json.dumps(body).encode(), ask))

    def _post(self, content: bytes, ask: Ask) -> dict[str, object]:
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        for n in range(NUM_TRIES):
            is_last = n == NUM_TRIES - 1 or ask.is_over
            seconds = min(2.0**n, MAX_WAIT_SECONDS)
            try:
                question = urllib.request.Request(self._url, content, headers)
                with self._opener.open(question, timeout=self._seconds(ask)) as stream:
                    return _parse(stream.read(MAX_REPLY_BYTES + 1))
            except urllib.error.HTTPError as error:
                said = _said(error)
                if any(words in said for words in _CONTEXT_FULL):
                    raise ContextFullError(f"{self._url} answered {error.code}: {said}") from error
                if error.code not in _PASSING or is_last:
                    raise ModelError(
                        f"{self._url} answered {error.code}: {said} Check the address, the model and the key."
                    ) from error
                seconds = max(seconds, _retry_after(error.headers))
            except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
                if is_last:
                    raise ModelError(
                        f"No answer from {self._url}: {error or type(error).__name__}. Check that it is there."
                    ) from error
            left = seconds if ask.deadline is None else min(seconds, ask.deadline - time.monotonic())
            self._pause(max(0.0, left))
        raise AssertionError("the last try returns or raises")

    def _seconds(self, ask: Ask) -> float:
        if ask.deadline is None:
            return self._timeout_seconds
        return max(0.1, min(self._timeout_seconds, ask.deadline - time.monotonic()))


def _message(message: Message) -> Message:
    """OpenAI knows no environment; a user's message takes its place."""
    return {**message, "role": "user"} if message["role"] == "environment" else message


def _parse(content: bytes) -> dict[str, object]:
    if len(content) > MAX_REPLY_BYTES:
        raise ModelError(f"The endpoint's reply is longer than {MAX_REPLY_BYTES >> 20} MiB.")
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"The endpoint's reply is no JSON: {content[:200]!r}.") from error
    if not isinstance(reply, dict):
        raise ModelError(f"The endpoint's reply is no JSON object: {content[:200]!r}.")
    return reply


def _reply(body: Mapping[str, object]) -> Reply:
    """The answer in a reply of the API; a call of a kind that is not a function's is told as a problem."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise ModelError(f"The endpoint's reply holds no message: {json.dumps(body)[:200]}.")
    given = message.get("tool_calls")
    calls, problems = [], []
    for call in given if isinstance(given, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments", "") if isinstance(function, dict) else None
        if isinstance(arguments, dict):  # some servers forget to write JSON
            arguments = json.dumps(arguments)
        if isinstance(name, str) and name and isinstance(arguments, str):
            calls.append(ToolCall(f"call_{len(calls)}", _whole(name), _whole(arguments)))
        else:
            problems.append(f"{json.dumps(call)[:200]} names no function")
    text = message.get("content") or message.get("refusal")
    return Reply(
        _whole(text) if isinstance(text, str) else "",
        tuple(calls),
        tuple(problems),
        "length" if choice.get("finish_reason") == "length" else "stop",
        _usage(body, "prompt_tokens"),
        _usage(body, "completion_tokens"),
    )


def _whole(text: str) -> str:
    """Without lone surrogates, which cannot be sent back."""
    return text.encode("utf-8", "replace").decode()


def _usage(body: Mapping[str, object], name: str) -> int:
    usage = body.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 0


def _said(error: urllib.error.HTTPError) -> str:
    """What the server wrote about an error, in a line."""
    try:
        content = error.read(2000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        content = ""
    return " ".join((content or str(error.reason)).split())[:500].rstrip(".") + "."


def _retry_after(headers: Headers) -> float:
    try:
        return min(max(float(headers.get("Retry-After", "0")), 0.0), MAX_WAIT_SECONDS)
    except ValueError:  # a date
        return 0.0
