"""Calls as the model was trained to write them: `<|plugin|>` and `<|interpreter|>`, or an endpoint's `tool_calls`."""

import json
from collections.abc import Sequence
from dataclasses import replace

from internlm2.agent.calling import CallResult, read_arguments
from internlm2.agent.dialects.dialect import Move, result_text
from internlm2.agent.model import Ask, Message, Model, Reply, ToolCall
from internlm2.agent.tool_type import NAME, Tool, ToolError


class NativeDialect:
    """The model is offered the tools, and answers with calls."""

    def __init__(self, name: str = "native") -> None:
        self.name = name

    def system(self, given: str | None, tools: Sequence[Tool]) -> str | None:
        """Nothing is added: the model is told of the tools in its own way."""
        return given

    def respond(self, model: Model, ask: Ask) -> Reply:
        """As it is."""
        return model.respond(ask)

    def read(self, reply: Reply, tools: Sequence[Tool], first_id: int) -> Move:
        """Calls where there are any, else what is wrong, else the answer."""
        calls = tuple(replace(call, id=f"call_{first_id + n}") for n, call in enumerate(reply.calls))
        message: dict[str, object] = {"role": "assistant", "content": reply.text}
        if calls:
            message["tool_calls"] = [_as_openai(call) for call in calls]
        if reply.problems:
            problem = "A call could not be read: " + "; ".join(reply.problems) + "."
            return Move(message, calls, problem=problem)
        return Move(message, calls) if calls else Move(message, answer=reply.text)

    def results(self, results: Sequence[CallResult]) -> list[Message]:
        """One message for each call, in the role that never speaks for a person."""
        return [{"role": "tool", "tool_call_id": one.call.id, "content": result_text(one)} for one in results]

    def problem(self, text: str) -> list[Message]:
        """A word from the environment."""
        return [{"role": "environment", "content": json.dumps({"error": text}, ensure_ascii=False)}]


def _as_openai(call: ToolCall) -> dict[str, object]:
    """A call for the conversation. Arguments that are no object cannot stand in it; the result says what was wrong."""
    try:
        arguments = json.dumps(read_arguments(call.arguments), ensure_ascii=False)
    except ToolError:
        arguments = "{}"
    name = call.name if NAME.fullmatch(call.name) else "unknown"  # servers refuse other names
    return {"id": call.id, "type": "function", "function": {"name": name, "arguments": arguments}}
