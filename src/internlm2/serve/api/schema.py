"""What requests may hold. Unknown fields are refused, as OpenAI does, so that a misspelt one is never ignored.

Fields of OpenAI's that mean nothing here are named: `IGNORED` ones change nothing that a client could see, all others
are refused where they ask for something (`refuse`).
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from internlm2.serve.errors import BAD_REQUEST, ApiError

Json = dict[str, object]
_MAX_SEED = (1 << 63) - 1
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Strict(BaseModel):
    """A body whose fields are all known and of the right type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Sampling(Strict):
    """How tokens are chosen. What is not given is as the server was started with."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None

    def chosen(self) -> Json:
        """The fields by the engine's names."""
        return {name: getattr(self, name) for name in Sampling.model_fields}


class StreamOptions(Strict):
    """include_usage: end a stream with a report of its tokens."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(Sampling):
    """What chat and text completion have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=10_000)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    length_limit: Annotated[int, Field(ge=1)] | None = None
    regex: Annotated[str, Field(max_length=100_000)] | None = None
    choice: Annotated[list[_Stop], Field(min_length=1, max_length=10_000)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def chosen(self) -> Json:
        """The fields by the engine's names."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        return super().chosen() | {
            "n": self.n,
            "seed": None if self.seed is None else self.seed & _MAX_SEED,  # OpenAI takes negative ones
            "stop": None if stop is None else tuple(stop),
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "logit_bias": None if self.logit_bias is None else _biases(self.logit_bias),
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "length_limit": self.length_limit,
            "regex": self.regex,
            "choice": None if self.choice is None else tuple(self.choice),
        }

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a report of its tokens. Raises ApiError for options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                BAD_REQUEST,
                "stream_options only goes with stream=true.",
                param="stream_options",
                code="invalid_value",
            )
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Function(Strict):
    """A tool, by name, with the JSON schema of its parameters. strict: calls of the model have to obey it."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class FunctionTool(Strict):
    """A function, or the code interpreter that the model was trained with."""

    type: Literal["function"]
    function: Function


class InterpreterTool(Strict):
    """The Python interpreter: its calls come as calls of the function `python` with {"code"}."""

    type: Literal["code_interpreter"]


Tool = Annotated[FunctionTool | InterpreterTool, Field(discriminator="type")]


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


def refuse(fields: Mapping[str, object], *neutral: object) -> None:
    """Raise ApiError for a field that asks for what this server does not do. neutral: values that ask for nothing."""
    for name, value in fields.items():
        if value is not None and value not in neutral:
            raise ApiError(
                BAD_REQUEST,
                f"{name} is not supported by this server. Leave it out.",
                code="unsupported_parameter",
                param=name,
            )


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ApiError(
                BAD_REQUEST,
                f"logit_bias has the key {token!r}, but keys are token ids such as '1234'.",
                code="invalid_value",
                param="logit_bias",
            )
        found[int(token)] = bias
    return found
