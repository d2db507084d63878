"""Any endpoint that speaks OpenAI's API as a model to evaluate, over the standard library.

What may pass is tried again: refused connections, time-outs, 429 and 5xx. What concerns one question becomes its error;
what concerns all of them (no server, wrong key, unknown model) ends the run, which can be continued.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.message import Message
from http.client import HTTPException, HTTPMessage
from queue import Queue
from threading import Event, Thread
from typing import IO
from urllib.parse import urlsplit

from internlm2.errors import InternLM2Error, RequestError
from internlm2.eval.model import Answer, Request, compare_labels
from internlm2.eval.task import ChatPrompt

NUM_TRIES = 6
MAX_WAIT_SECONDS = 60.0
MAX_REPLY_BYTES = 64 << 20
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_HOPELESS = frozenset({401, 402, 403, 404, 405})


class EndpointError(InternLM2Error):
    """An endpoint that answers no question: wrong address, key or model, or it lacks what labels need."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(  # noqa: PLR0917 - the library calls it so
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:  # fmt: skip
        return None


class EndpointModel:
    """A model behind `url`, such as "http://localhost:8000/v1".

    name: of the model, as the endpoint knows it. api_key: sent as a bearer token. concurrency: questions under way at
    the same time. timeout_seconds: of one try. pause: sleeps; tests give another one.
    Raises EndpointError for a URL that is none.
    """

    counts_tokens = False

    def __init__(
        self,
        url: str,
        name: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout_seconds: float = 600.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise EndpointError(
                f"The endpoint is {url!r}, but must be like http://localhost:8000/v1, without a key in it."
            )
        if concurrency < 1:
            raise EndpointError(f"concurrency is {concurrency}, but must be at least 1.")
        self._url = url.rstrip("/")
        self._name = name
        self._api_key = api_key
        self._concurrency = concurrency
        self._timeout_seconds = timeout_seconds
        self._pause = pause
        self._opener = urllib.request.build_opener(_NoRedirect())
        self.description: Mapping[str, str] = {"name": name, "endpoint": self._url}

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """See `LanguageModel.answer`."""
        waiting = iter(requests)
        questions: Queue[Request | None] = Queue()
        answers: Queue[tuple[Request, Answer | Exception]] = Queue()
        stopped = Event()
        for _ in range(self._concurrency):
            # Not a pool: at the end, or on Ctrl-C, nobody is to wait for replies that may take minutes.
            Thread(target=self._work, args=(questions, answers, stopped), daemon=True).start()
        try:
            num_open = 0
            while True:
                while num_open < 2 * self._concurrency and (request := next(waiting, None)) is not None:
                    questions.put(request)
                    num_open += 1
                if not num_open:
                    return
                request, found = answers.get()
                num_open -= 1
                if isinstance(found, Exception):
                    raise found
                yield request, found
        finally:
            stopped.set()
            for _ in range(self._concurrency):
                questions.put(None)

    def _work(
        self,
        questions: Queue[Request | None],
        answers: Queue[tuple[Request, Answer | Exception]],
        stopped: Event,
    ) -> None:
        while (request := questions.get()) is not None and not stopped.is_set():
            try:
                answers.put((request, self._answer(request)))
            except Exception as error:  # raised again where the answers are read
                answers.put((request, error))

    def _answer(self, request: Request) -> Answer:
        try:
            if request.labels:
                return self._compare(request)
            return self._generate(request)
        except RequestError as error:
            return Answer(error=str(error))

    def _generate(self, request: Request) -> Answer:
        body: dict[str, object] = {"max_tokens": request.max_tokens, "temperature": 0}
        if request.stop:
            body["stop"] = list(request.stop)
        if request.min_tokens > 1:
            body["min_tokens"] = request.min_tokens  # not OpenAI's; vLLM and `internlm2 serve` know it
        if isinstance(request.prompt, ChatPrompt):
            reply = self._post("chat/completions", {**body, "messages": request.prompt.messages})
        else:
            reply = self._post("completions", {**body, "prompt": request.prompt.text})
        choice = _first_choice(reply)
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        if text is None and isinstance(message, dict):
            text = ""  # a refusal, or an answer that ended at once
        if not isinstance(text, str):
            raise RequestError(f"The endpoint's reply holds no text: {json.dumps(reply)[:200]}.")
        return Answer(
            text.encode("utf-8", "replace").decode(),  # lone surrogates cannot be written to a file
            finish_reason=str(choice.get("finish_reason") or ""),
            prompt_tokens=_usage(reply, "prompt_tokens") or 0,
            output_tokens=_usage(reply, "completion_tokens") or 0,
        )

    def _compare(self, request: Request) -> Answer:
        texts = [self._echo(request.prompt.text + label) for label in request.labels]
        values = compare_labels([tokens for tokens, _ in texts], [logprobs for _, logprobs in texts])
        return Answer(
            logprobs=dict(zip(request.labels, values, strict=True)),
            prompt_tokens=sum(len(tokens) for tokens, _ in texts),
        )

    def _echo(self, text: str) -> tuple[list[str], list[float]]:
        """The tokens of a text, and the log-probabilities of all but the first."""
        body = {"prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        reply = self._post("completions", body)
        found = _first_choice(reply).get("logprobs")
        tokens = found.get("tokens") if isinstance(found, dict) else None
        logprobs = found.get("token_logprobs") if isinstance(found, dict) else None
        count = _usage(reply, "prompt_tokens")
        if not isinstance(tokens, list) or not isinstance(logprobs, list) or count is None:
            raise EndpointError(
                f"{self._url} does not give log-probabilities of a prompt (`echo` with `logprobs`), which comparing "
                "labels needs. Use --chat, or a server that gives them, such as `internlm2 serve` or vLLM."
            )
        values = logprobs[1:count]  # behind the prompt stands the token that had to be generated
        is_whole = len(tokens) == len(logprobs) and 1 < count <= len(tokens)
        if not is_whole or not all(isinstance(value, int | float) for value in values):
            raise RequestError("The endpoint gave log-probabilities of a part of the prompt only.")
        return [str(token) for token in tokens[:count]], [float(value) for value in values]

    # -- HTTP ---------------------------------------------------------------------------------------------

    def _post(self, path: str, body: Mapping[str, object]) -> dict[str, object]:
        """The reply to a question, tried again while it may pass."""
        url = f"{self._url}/{path}"
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        content = json.dumps({"model": self._name, **body}).encode()
        for n in range(NUM_TRIES):
            is_last = n == NUM_TRIES - 1
            seconds = min(2.0**n, MAX_WAIT_SECONDS)
            try:
                question = urllib.request.Request(url, content, headers)
                with self._opener.open(question, timeout=self._timeout_seconds) as stream:
                    return _parse(stream.read(MAX_REPLY_BYTES + 1))
            except urllib.error.HTTPError as error:
                said = _said(error)
                if error.code in _HOPELESS or 300 <= error.code < 400:
                    raise EndpointError(
                        f"{url} answered {error.code}: {said} Check the address, the model and the key."
                    ) from error
                if error.code not in _PASSING or is_last:
                    tries = f" after {NUM_TRIES} tries" if error.code in _PASSING else ""
                    raise RequestError(f"The endpoint answered {error.code}{tries}: {said}") from error
                seconds = max(seconds, _retry_after(error.headers))
            except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
                if is_last:
                    raise EndpointError(
                        f"No answer from {url} in {NUM_TRIES} tries: {error or type(error).__name__}. Check that it "
                        "is there, then start the run again: it goes on where it was."
                    ) from error
            self._pause(seconds)
        raise AssertionError("the last try returns or raises")


def _parse(content: bytes) -> dict[str, object]:
    if len(content) > MAX_REPLY_BYTES:
        raise RequestError(f"The endpoint's reply is longer than {MAX_REPLY_BYTES >> 20} MiB.")
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The endpoint's reply is no JSON: {content[:200]!r}.") from error
    if not isinstance(reply, dict):
        raise RequestError(f"The endpoint's reply is no JSON object: {content[:200]!r}.")
    return reply


def _first_choice(reply: Mapping[str, object]) -> dict[str, object]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise RequestError(f"The endpoint's reply holds no choice: {json.dumps(reply)[:200]}.")
    return choices[0]


def _usage(reply: Mapping[str, object], name: str) -> int | None:
    usage = reply.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _said(error: urllib.error.HTTPError) -> str:
    """What the server wrote about an error, in a line."""
    try:
        content = error.read(2000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        content = ""
    return " ".join((content or str(error.reason)).split())[:300].rstrip(".") + "."


def _retry_after(headers: Message) -> float:
    try:
        return min(max(float(headers.get("Retry-After", "0")), 0.0), MAX_WAIT_SECONDS)
    except ValueError:  # a date
        return 0.0
