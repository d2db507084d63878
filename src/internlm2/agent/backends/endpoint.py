"""Any endpoint that speaks OpenAI's chat API as an agent's model, over the standard library.

What may pass is tried again while there is time: refused connections, 429 and 5xx. The rest is a `ModelError`.
"""

import json
import time
from collections.abc import Callable, Mapping

from internlm2.agent.model import Ask, ContextFullError, Message, ModelError, Reply, ToolCall
from internlm2.endpoint import Endpoint, EndpointError, usage, whole

NUM_TRIES = 5
MAX_WAIT_SECONDS = 30.0
_CONTEXT_FULL = ("context_length_exceeded", "maximum context length")


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
        try:
            self._endpoint = Endpoint(
                url,
                api_key=api_key,
                num_tries=NUM_TRIES,
                max_wait_seconds=MAX_WAIT_SECONDS,
                timeout_seconds=timeout_seconds,
                pause=pause,
            )
        except EndpointError as error:
            raise ModelError(str(error)) from error
        self.name = name
        self.calls_tools = calls_tools
        self._options = dict(options or {})

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
        return _reply(self._post(body, ask))

    def _post(self, body: Mapping[str, object], ask: Ask) -> dict[str, object]:
        try:
            return self._endpoint.post(
                "chat/completions", body, deadline=ask.deadline, is_cancelled=ask.is_cancelled
            )
        except EndpointError as error:
            is_full = any(words in error.said for words in _CONTEXT_FULL)
            raise (ContextFullError if is_full else ModelError)(str(error)) from error


def _message(message: Message) -> Message:
    """OpenAI knows no environment; a user's message takes its place."""
    return {**message, "role": "user"} if message["role"] == "environment" else message


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
            calls.append(ToolCall(f"call_{len(calls)}", whole(name), whole(arguments)))
        else:
            problems.append(f"{json.dumps(call)[:200]} names no function")
    text = message.get("content") or message.get("refusal")
    return Reply(
        whole(text) if isinstance(text, str) else "",
        tuple(calls),
        tuple(problems),
        "length" if choice.get("finish_reason") == "length" else "stop",
        usage(body, "prompt_tokens") or 0,
        usage(body, "completion_tokens") or 0,
    )
