"""What one request wants of the model: a prompt as ids, sampling, rules for calls. Plain work, for any thread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from internlm2.engine.sampling.params import SamplingParams
from internlm2.errors import RequestError
from internlm2.serve.errors import BAD_REQUEST, ApiError
from internlm2.serve.talk.calls import Opening, ToolChoice, opening, schema_of_calls
from internlm2.tokenizer import Tokenizer
from internlm2.tokenizer.chat.message import INTERPRETER_NAME, PLUGIN_NAME, read_tools
from internlm2.tokenizer.special import ACTION_START

_Messages = Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Ask:
    """A prompt and how to answer it.

    ids: the prompt. reads_calls: whether calls of tools are looked for. opening: how a call that must come begins.
    call_schema: what every call that the model begins has to obey; None: as it likes. max_calls: after so many the
    answer is over; None: the model decides. adapter: LoRA.
    """

    ids: list[int]
    params: SamplingParams
    reads_calls: bool = False
    opening: Opening | None = None
    call_schema: Mapping[str, object] | None = None
    max_calls: int | None = None
    adapter: str | None = None

    @property
    def has_form(self) -> bool:
        """Whether the text of the answer has a fixed form."""
        params = self.params
        return params.json_schema is not None or params.regex is not None or bool(params.choice)


def ask_text(
    tokenizer: Tokenizer, prompt: str | Sequence[int], params: SamplingParams, *, adapter: str | None = None
) -> Ask:
    """Complete a text, which gets BOS, or ids as they are."""
    ids = tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else list(prompt)
    return Ask(ids, params, adapter=adapter)


def ask_chat(
    tokenizer: Tokenizer,
    messages: _Messages,
    params: SamplingParams,
    *,
    tools: _Messages = (),
    choice: ToolChoice | None = None,
    allows_parallel: bool = True,
    continue_final: bool = False,
    adapter: str | None = None,
) -> Ask:
    """Answer a conversation. Raises ChatError for malformed messages, RequestError for impossible choices."""
    choice = choice or ToolChoice()
    is_strict = any(_function(tool).get("strict") is True for tool in tools)
    tools = [_without_strict(tool) for tool in tools]
    ids = tokenizer.apply_chat(
        messages, tools=tools or None, add_generation_prompt=not continue_final, continue_final=continue_final
    )
    start_id = tokenizer.specials.ids.get(ACTION_START)
    if choice.kind in ("required", "named"):
        ask = Ask(
            ids, replace(params, json_schema=None, regex=None, choice=()), reads_calls=True, max_calls=1
        )
        return replace(ask, opening=opening(tokenizer, tools, choice), adapter=adapter)
    if choice.kind == "none" or not (tools or _describes_tools(messages)):
        # The model may know tools from its training or from `tools`; without its first token no call can begin.
        banned = () if start_id is None else ((start_id,),)
        params = replace(params, bad_words_ids=(*params.bad_words_ids, *banned))
        return Ask(ids, params, adapter=adapter)
    return Ask(
        ids,
        params,
        reads_calls=True,
        call_schema=schema_of_calls(read_tools(tools).plugins) if is_strict else None,
        max_calls=None if allows_parallel else 1,
        adapter=adapter,
    )


def _function(tool: Mapping[str, object]) -> Mapping[str, object]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else tool


def _without_strict(tool: Mapping[str, object]) -> Mapping[str, object]:
    """A tool as the model is told of it: `strict` is for the server."""
    function = {key: value for key, value in _function(tool).items() if key != "strict" and value is not None}
    return {**tool, "function": function} if isinstance(tool.get("function"), Mapping) else function


def _describes_tools(messages: _Messages) -> bool:
    """Whether the conversation itself holds tools, in the model's own way."""
    return any(
        message.get("role") in ("system", "developer")
        and message.get("name") in (PLUGIN_NAME, INTERPRETER_NAME)
        for message in messages
    )


def check_length(num_prompt: int, max_model_len: int, *, answer_tokens: int = 1) -> None:
    """Raise ApiError, as OpenAI does, for a prompt that leaves no room for so much of an answer."""
    if num_prompt + answer_tokens > max_model_len:
        room = ", which leaves no room for an answer" if answer_tokens else ""
        raise ApiError(
            BAD_REQUEST,
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt has {num_prompt} "
            f"tokens{room}. Shorten it, or start the server with a larger "
            "--max-model-len if memory allows.",
            code="context_length_exceeded",
        )


def sampling(defaults: SamplingParams, given: Mapping[str, object]) -> SamplingParams:
    """The server's defaults with what a request says; None says nothing. Raises RequestError."""
    said = {name: value for name, value in given.items() if value is not None}
    try:
        return replace(defaults, **said)  # pyrefly: ignore - SamplingParams checks them
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"The sampling values cannot be used: {error}.") from error
