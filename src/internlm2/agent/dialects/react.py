"""ReAct (arXiv 2210.03629): Thought, Action, Action Input, Observation, as text, for models that know no calls.

Only what the model itself wrote is searched for actions; observations are messages of another role, so a tool that
prints "Final Answer:" decides nothing.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from internlm2.agent.calling import CallResult
from internlm2.agent.dialects.dialect import Move, result_text
from internlm2.agent.dialects.fence import strip_fence
from internlm2.agent.model import Ask, Message, Model, Reply, ToolCall
from internlm2.agent.tool_type import Tool

STOP = ("\nObservation:", "\nObservation :")
_ACTION = re.compile(r"^[ \t*]*Action[ \t*]*:[ \t*]*(?P<name>[^\n]*)$", re.M)
_INPUT = re.compile(r"^[ \t*]*Action Input[ \t*]*:[ \t*]*", re.M)
_FINAL = re.compile(r"^[ \t*]*Final Answer[ \t*]*:[ \t*]*", re.M)
_LABEL = re.compile(r"^[ \t*]*(?:Thought|Action|Observation|Final Answer)[ \t*]*:", re.M)

_FORM = """Use this form, and nothing else:

Thought: what you think about the next step
Action: the name of one tool, one of {names}
Action Input: its arguments as one JSON object

Then stop. The tool's result comes back to you as

Observation: the result

Repeat this as often as you need. When you know the answer, write

Thought: I know the answer.
Final Answer: the answer to the question"""


class ReactDialect:
    """The model is told of the tools in words, and its words are searched for actions."""

    name = "react"

    def system(self, given: str | None, tools: Sequence[Tool]) -> str | None:
        """The tools with their schemas, and the form."""
        if not tools:
            return given
        lines = [
            f"{tool.name}: {' '.join(tool.description.split()) or 'no description'} "
            f"Arguments (JSON schema): {json.dumps(tool.parameters, ensure_ascii=False)}"
            for tool in tools
        ]
        words = ["You can use these tools:", *lines, "", _FORM.format(names=", ".join(t.name for t in tools))]
        return "\n".join([given, "", *words] if given else words)

    def respond(self, model: Model, ask: Ask) -> Reply:
        """One answer; with `ask.constrain` the arguments are asked for separately, bound to the tool's schema."""
        plain = replace(ask, tools=(), constrain=False, stop=(*ask.stop, *STOP))
        if not ask.constrain:
            return model.respond(plain)
        first = model.respond(replace(plain, stop=(*plain.stop, "\nAction Input:", "\nAction Input :")))
        action, final = _ACTION.search(first.text), _FINAL.search(first.text)
        is_action = action is not None and (final is None or action.start() < final.start())
        tool = next((t for t in ask.tools if action and t.name == _name(action["name"])), None)
        if action is None or not is_action or tool is None or first.finish_reason == "length":
            return first
        opened = first.text[: action.end()] + "\nAction Input:\n"
        message = {"role": "assistant", "content": opened}
        rest = model.respond(
            replace(
                plain,
                messages=[*ask.messages, message],
                stop=(),
                json_schema=tool.parameters,
                continues=True,
            )
        )
        return replace(
            rest,
            text=opened + rest.text,
            prompt_tokens=first.prompt_tokens + rest.prompt_tokens,
            output_tokens=first.output_tokens + rest.output_tokens,
        )

    def read(self, reply: Reply, tools: Sequence[Tool], first_id: int) -> Move:
        """The first action or final answer; what follows an action is invented, and dropped."""
        text = reply.text
        for stop in STOP:
            text = text.partition(stop)[0]
        action, final = _ACTION.search(text), _FINAL.search(text)
        if final is not None and (action is None or final.start() < action.start()):
            return Move(_said(text), answer=text[final.end() :].strip())
        if action is None:
            return _without_action(text, has_tools=bool(tools))
        given = _INPUT.search(text, action.end())
        following = _ACTION.search(text, action.end())
        if given is None or (following is not None and following.start() < given.start()):
            if reply.finish_reason == "length":
                return Move(
                    _said(text), problem="Your answer was cut off before its Action Input. Be shorter."
                )
            return Move(
                _said(text), problem="After `Action:` comes a line `Action Input:` with a JSON object."
            )
        name = _name(action["name"])
        tool = next((each for each in tools if each.name == name), None)
        arguments, end = _arguments(text, given.end(), tool)
        if end == len(text) and reply.finish_reason == "length":
            return Move(_said(text), problem="Your answer was cut off within its Action Input. Be shorter.")
        call = ToolCall(f"call_{first_id}", name, arguments)
        return Move(_said(text[:end].rstrip()), (call,))

    def results(self, results: Sequence[CallResult]) -> list[Message]:
        """An observation, in the role of the user, whose words are never read as the model's."""
        return [{"role": "user", "content": f"Observation: {result_text(one)}"} for one in results]

    def problem(self, text: str) -> list[Message]:
        """An observation as well."""
        return [{"role": "user", "content": f"Observation: Error: {text}"}]


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _name(written: str) -> str:
    """A tool's name as models write it: in quotes, with brackets, or with words behind it."""
    found = re.match(r"[\s`\"'*\[(]*([A-Za-z_][A-Za-z0-9_-]*)", written)
    return found[1] if found else written.strip()


def _without_action(text: str, *, has_tools: bool) -> Move:
    """Words without a label are an answer; a thought alone is not."""
    if has_tools and _LABEL.search(text):
        return Move(
            _said(text),
            problem="Go on with `Action:` and `Action Input:`, or with `Final Answer:` and the answer.",
        )
    return Move(_said(text), answer=text.strip())


def _arguments(text: str, start: int, tool: Tool | None) -> tuple[str, int]:
    """The arguments that stand at `start` as JSON text, and where they end.

    A JSON object is taken as it is. For a tool with one text to give, such as code, the bare text will do.
    """
    while start < len(text) and text[start].isspace():
        start += 1
    label = _LABEL.search(text, start)
    limit = label.start() if label else len(text)
    begin = text.find("{", start)
    lead = text[start:begin].strip() if begin >= 0 else "no"
    if lead in ("", "```", "```json"):
        try:
            _, end = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError):
            pass
        else:
            return text[begin:end], end
    bare = text[start:limit].strip()
    only = _only_text(tool)
    if only is None or bare.startswith("{"):
        return bare, limit
    return json.dumps({only: strip_fence(bare).strip('"')}, ensure_ascii=False), limit


def _only_text(tool: Tool | None) -> str | None:
    """The name of the one argument that has to be given, where it is a text."""
    if tool is None:
        return None
    required, properties = tool.parameters.get("required"), tool.parameters.get("properties")
    if not isinstance(required, list) or len(required) != 1 or not isinstance(properties, dict):
        return None
    schema = properties.get(required[0])
    return required[0] if isinstance(schema, dict) and schema.get("type") == "string" else None
