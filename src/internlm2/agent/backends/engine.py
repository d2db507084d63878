"""Our engine as an agent's model: calls are read from control tokens, and can be held to the tools' schemas.

A grammar holds a whole answer of the engine. So a bound call is an answer of its own: the model writes freely until it
begins a call, a grammar holds the call, and then the model goes on; the prefix cache keeps what was computed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from internlm2.agent.model import Ask, ContextFullError, FinishReason, Message, Reply, ToolCall
from internlm2.agent.tool_type import Tool, ToolDefinitionError
from internlm2.engine.llm import LLM
from internlm2.engine.sampling.params import SamplingParams
from internlm2.tokenizer.chat.call_schema import schema_of_calls
from internlm2.tokenizer.chat.message import INTERPRETER_CALLS
from internlm2.tokenizer.chat.parse import CodeCall, InvalidCall
from internlm2.tokenizer.special import ACTION_END, ACTION_START, INTERPRETER, PLUGIN

_NEEDED = (ACTION_START, ACTION_END, INTERPRETER, PLUGIN)

_COMPACT = {"x-guidance": {"whitespace_pattern": " ?"}}  # no blank lines, which a weak model writes for long


@dataclass
class _Written:
    """An answer as it grows: its ids, and how the last part ended."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "stop"


class EngineModel:
    """A model that `LLM` runs. params: how it writes. adapter: LoRA. name: for transcripts."""

    keeps_text_plain = True  # the chat format encodes words without control tokens

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        name: str = "engine",
    ) -> None:
        self.name = name
        self._llm = llm
        self._params = params or SamplingParams()
        self._adapter = adapter

    @property
    def calls_tools(self) -> bool:
        """Whether the vocabulary has the tokens of calls; the demo model's has not."""
        return all(marker in self._llm.tokenizer.special_tokens for marker in _NEEDED)

    def respond(self, ask: Ask) -> Reply:
        """See `Model.respond`."""
        ids = self._llm.tokenizer.apply_chat(
            ask.messages,
            tools=_offered(ask.tools) or None,
            add_generation_prompt=not ask.continues,
            continue_final=ask.continues,
        )
        written = _Written()
        params = replace(self._params, stop=(*self._params.stop, *ask.stop))
        if ask.json_schema is not None:
            params = replace(params, json_schema={**_COMPACT, **ask.json_schema})
        plugins = [tool for tool in ask.tools if not _is_interpreter(tool)]
        if ask.constrain and plugins and self.calls_tools:
            self._write_bound(ids, written, params, plugins, ask)
        else:
            self._write(ids, written, params, ask)
        return self._reply(ids, written, ask)

    def _write(self, prompt: Sequence[int], written: _Written, params: SamplingParams, ask: Ask) -> None:
        """Let the model go on, until it ends, `params` end it, or nobody waits any more."""
        so_far = [*prompt, *written.ids]
        if len(so_far) + 1 > self._llm.max_model_len:
            raise ContextFullError(
                f"The conversation has {len(so_far)} tokens, and the model's context {self._llm.max_model_len}. "
                "Begin a new one, or load the model with a larger max_model_len."
            )
        written.finish_reason = "length"
        pieces = self._llm.stream(so_far, params, adapter=self._adapter)
        try:
            for piece in pieces:
                written.ids.extend(piece.token_ids)
                written.text += piece.text
                if piece.finish_reason is not None:
                    written.finish_reason = "length" if piece.finish_reason == "length" else "stop"
                if ask.is_over:
                    return
        finally:
            pieces.close()

    def _write_bound(
        self,
        prompt: Sequence[int],
        written: _Written,
        params: SamplingParams,
        plugins: Sequence[Tool],
        ask: Ask,
    ) -> None:
        """As `_write`, with every plugin call held to the schema of its tool."""
        tokenizer = self._llm.tokenizer
        ids = tokenizer.specials.ids
        free = replace(params, stop_token_ids=(*params.stop_token_ids, ids[PLUGIN]))
        schema = schema_of_calls([tool.function for tool in plugins])
        while True:
            left = self._params.max_tokens - len(written.ids)
            if left < 1:
                written.finish_reason = "length"
                return
            self._write(prompt, written, replace(free, max_tokens=left), ask)
            # The stop token is not handed out; behind the token that begins a call it was the plugin's.
            begins_call = written.finish_reason == "stop" and written.ids[-1:] == [ids[ACTION_START]]
            left = self._params.max_tokens - len(written.ids)
            if not begins_call or left < 1 or ask.is_over:
                return
            written.ids += [ids[PLUGIN], *tokenizer.encode("\n")]
            bound = replace(params, stop=(), json_schema=schema, max_tokens=left)
            self._write(prompt, written, bound, ask)
            if written.finish_reason == "length" or ask.is_over:
                return
            written.ids.append(ids[ACTION_END])

    def _reply(self, prompt: Sequence[int], written: _Written, ask: Ask) -> Reply:
        counts = {"prompt_tokens": len(prompt), "output_tokens": len(written.ids)}
        if not ask.tools:
            return Reply(written.text, finish_reason=written.finish_reason, **counts)
        turn = self._llm.tokenizer.parse_assistant(written.ids)
        text, calls, problems = turn.text, list[ToolCall](), list[str]()
        code_tool = next((tool for tool in ask.tools if _is_interpreter(tool)), None)
        for call in turn.calls:
            number = f"call_{len(calls)}"
            if isinstance(call, InvalidCall):
                text += call.raw
                problems.append(call.reason)
            elif isinstance(call, CodeCall):
                if code_tool is None:
                    problems.append("there is no code interpreter; call one of the tools")
                else:
                    arguments = json.dumps({"code": call.code}, ensure_ascii=False)
                    calls.append(ToolCall(number, code_tool.name, arguments))
            elif not call.name:
                problems.append("its name is empty")
            elif code_tool is not None and call.name in INTERPRETER_CALLS and not _has_code(call.parameters):
                problems.append('the interpreter is called with {"code": "..."}')
            else:
                calls.append(ToolCall(number, call.name, json.dumps(call.parameters, ensure_ascii=False)))
        return Reply(text, tuple(calls), tuple(problems), written.finish_reason, **counts)


def _is_interpreter(tool: Tool) -> bool:
    """Whether a tool is offered as the interpreter that the model was trained with."""
    return tool.is_code and tool.name in INTERPRETER_CALLS


def _offered(tools: Sequence[Tool]) -> list[Message]:
    """The tools as the chat format takes them. Raises ToolDefinitionError for names that it gives a meaning."""
    offered: list[Message] = []
    has_interpreter = any(map(_is_interpreter, tools))
    for tool in tools:
        if _is_interpreter(tool):
            offered.append({"type": "code_interpreter"})
        elif has_interpreter and tool.name in INTERPRETER_CALLS:
            raise ToolDefinitionError(
                f"A tool is named {tool.name!r}, as the model calls the code interpreter, which is offered as well. "
                "Give it another name."
            )
        else:
            offered.append({"type": "function", "function": tool.function})
    return offered


def _has_code(parameters: Mapping[str, object]) -> bool:
    return isinstance(parameters.get("code"), str)
