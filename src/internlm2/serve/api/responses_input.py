"""What `/v1/responses` takes: items instead of messages. The server keeps nothing between requests."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from internlm2.engine.sampling.params import SamplingParams
from internlm2.serve.api.schema import Function, Json, Sampling, Strict, refuse
from internlm2.serve.errors import BAD_REQUEST, ApiError, from_validation
from internlm2.serve.talk.ask import sampling
from internlm2.serve.talk.calls import ToolChoice

_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "refusal"})
_LOGPROBS = "message.output_text.logprobs"
_HARMLESS = frozenset({_LOGPROBS, "reasoning.encrypted_content"})


class TextFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(Strict):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: str | None = None


class NamedChoice(Strict):
    """The one function that is to be called."""

    type: Literal["function"]
    name: str


class StreamConfig(Strict):
    """Taken and not needed: nothing is obfuscated here."""

    include_obfuscation: bool | None = None


class ResponsesRequest(Sampling):
    """A text or items to answer."""

    model: str | None = None
    input: str | Annotated[list[Json], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Json], Field(max_length=1000)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamConfig | None = None
    # Without meaning here, and without harm:
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None
    # Refused where they ask for something:
    previous_response_id: str | None = None
    conversation: str | Json | None = None
    background: bool | None = None
    prompt: Json | None = None
    reasoning: Json | None = None
    truncation: str | None = None

    def check(self) -> None:
        """Raise ApiError for what is understood and cannot be done."""
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise ApiError(
                    BAD_REQUEST,
                    f"{name} is not supported: this server keeps nothing. Send all items again in `input`.",
                    code="unsupported_parameter",
                    param=name,
                )
        refuse({"background": self.background}, False)
        refuse({"prompt": self.prompt})
        refuse({"truncation": self.truncation}, "disabled")
        for name, value in (self.reasoning or {}).items():
            refuse({f"reasoning.{name}": value}, "none", "auto")
        refuse({"text.verbosity": self.text.verbosity if self.text else None}, "medium")
        for name in self.include or ():
            refuse({f"include {name!r}": None if name in _HARMLESS else name})

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return bool(self.top_logprobs) or _LOGPROBS in (self.include or ())

    def choice_of_tool(self) -> ToolChoice:
        """What `tool_choice` says."""
        given = self.tool_choice
        if given is None or isinstance(given, str):
            return ToolChoice(given or "auto")
        return ToolChoice("named", given.name)

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """The sampling. Raises ApiError and RequestError."""
        form = self.text.format if self.text is not None else None
        schema: Json | None = None
        if form is not None and form.type != "text":
            schema = {"type": "object"} if form.type == "json_object" else form.schema_
            if schema is None:
                raise ApiError(
                    BAD_REQUEST,
                    "text.format is json_schema, but has no schema.",
                    code="missing_required_parameter",
                    param="text.format.schema",
                )
        chosen = self.chosen() | {
            "max_tokens": self.max_output_tokens,
            "seed": None if self.seed is None else self.seed & ((1 << 63) - 1),
            "logprobs": (self.top_logprobs or 0) if self.wants_logprobs else None,
            "json_schema": schema,
        }
        return sampling(defaults, chosen)

    def functions(self) -> list[Json]:
        """The tools as chat has them. Raises ApiError for tools that OpenAI's own servers run."""
        found: list[Json] = []
        for n, tool in enumerate(self.tools or ()):
            if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
                raise ApiError(
                    BAD_REQUEST,
                    f"tools[{n}] is {tool.get('type')!r}; this server takes functions alone: "
                    '{"type": "function", "name": ..., "parameters": {...}}.',
                    code="unsupported_tool",
                    param=f"tools.{n}",
                )
            function = {name: value for name, value in tool.items() if name != "type" and value is not None}
            try:
                Function.model_validate(function)
            except ValidationError as error:
                problems = [{**each, "loc": ("body", "tools", n, *each["loc"])} for each in error.errors()]
                raise from_validation(problems) from error
            found.append({"type": "function", "function": function})
        return found

    def messages(self) -> list[Json]:
        """The conversation as chat has it. Raises ApiError for items that are not understood."""
        found: list[Json] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        for n, item in enumerate(self.input):
            _add_item(found, item, f"input.{n}")
        return found


def _add_item(messages: list[Json], item: Mapping[str, object], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": _text(item.get("content"), f"{where}.content")})
    elif kind == "function_call":
        call = {
            "id": item.get("call_id"),
            "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments", "")},
        }
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        calls = messages[-1].setdefault("tool_calls", [])
        assert isinstance(calls, list)
        calls.append(call)
    elif kind == "function_call_output":
        content = _text(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    else:
        raise ApiError(
            BAD_REQUEST,
            f"{where} has the type {kind!r}; this server takes message, function_call and function_call_output.",
            code="unsupported_item",
            param=where,
        )


def _text(content: object, where: str) -> str:
    """A text, or the texts of its parts together."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise ApiError(
                BAD_REQUEST,
                f"{where} holds {part!r:.120}. This model reads text only: "
                "{'type': 'input_text', 'text': '...'}.",
                code="unsupported_content",
                param=where,
            )
        texts.append(text)
    return "".join(texts)
