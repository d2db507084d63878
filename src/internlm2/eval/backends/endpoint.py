"""Any endpoint that speaks OpenAI's API as a model to evaluate, over the standard library.

What may pass is tried again: refused connections, time-outs, 429 and 5xx. What concerns one question becomes its error;
what concerns all of them (no server, wrong key, unknown model) ends the run, which can be continued.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from queue import Queue
from threading import Event, Thread

from internlm2.endpoint import Endpoint, EndpointError, ReplyError, usage, whole
from internlm2.errors import RequestError
from internlm2.eval.model import Answer, Request, compare_labels
from internlm2.eval.task import ChatPrompt

NUM_TRIES = 6
_HOPELESS = frozenset({401, 402, 403, 404, 405})


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
        self._endpoint = Endpoint(
            url, api_key=api_key, num_tries=NUM_TRIES, timeout_seconds=timeout_seconds, pause=pause
        )
        if concurrency < 1:
            raise EndpointError(f"concurrency is {concurrency}, but must be at least 1.")
        self._name = name
        self._concurrency = concurrency
        self.description: Mapping[str, str] = {"name": name, "endpoint": self._endpoint.url}

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
            whole(text),
            finish_reason=str(choice.get("finish_reason") or ""),
            prompt_tokens=usage(reply, "prompt_tokens") or 0,
            output_tokens=usage(reply, "completion_tokens") or 0,
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
        count = usage(reply, "prompt_tokens")
        if not isinstance(tokens, list) or not isinstance(logprobs, list) or count is None:
            raise EndpointError(
                f"{self._endpoint.url} does not give log-probabilities of a prompt (`echo` with `logprobs`), which "
                "comparing labels needs. Use --chat, or a server that gives them, such as `internlm2 serve` or vLLM."
            )
        values = logprobs[1:count]  # behind the prompt stands the token that had to be generated
        is_whole = len(tokens) == len(logprobs) and 1 < count <= len(tokens)
        if not is_whole or not all(isinstance(value, int | float) for value in values):
            raise RequestError("The endpoint gave log-probabilities of a part of the prompt only.")
        return [str(token) for token in tokens[:count]], [float(value) for value in values]

    def _post(self, path: str, body: Mapping[str, object]) -> dict[str, object]:
        try:
            return self._endpoint.post(path, {"model": self._name, **body})
        except ReplyError as error:
            raise RequestError(str(error)) from error
        except EndpointError as error:
            if error.status is None:
                raise EndpointError(f"{error} Start the run again then: it goes on where it was.") from error
            if error.status in _HOPELESS or 300 <= error.status < 400:
                raise
            tries = f" after {error.num_tries} tries" if error.num_tries > 1 else ""
            raise RequestError(f"The endpoint answered {error.status}{tries}: {error.said}") from error


def _first_choice(reply: Mapping[str, object]) -> dict[str, object]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise RequestError(f"The endpoint's reply holds no choice: {json.dumps(reply)[:200]}.")
    return choices[0]
