"""InternLM2's chat format: a conversation as pieces of plain text and control tokens.

Source: InternLM chat/chat_format.md. The words of people stay in plain pieces, which are encoded without
special tokens, so nobody can forge a turn. A header and its content are one piece, because the official
template encodes them as one text and merges may cross the line break. Only the assistant's header stands
alone: at generation it is the prompt's end and the answer's ids follow it, and history must look the same.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from internlm2.errors import ChatError
from internlm2.tokenizer.chat.message import (
    INTERPRETER_NAME,
    PLUGIN_NAME,
    CodeCall,
    Message,
    PluginCall,
    Tool,
    Turn,
    json_text,
    read_messages,
    read_tools,
)
from internlm2.tokenizer.special import ACTION_END, ACTION_START, IM_END, IM_START, INTERPRETER, PLUGIN

# Our own words: the official usage text is not published with the format.
INTERPRETER_USAGE = (
    "You can run Python code in a Jupyter-like environment. Send one complete ```python block; it is "
    "executed, and what it prints, the value of its last expression or its error comes back to you. Use it "
    "for calculations, data and files. Variables live on between blocks."
)
_MARKER_OF_NAME = {PLUGIN_NAME: PLUGIN, INTERPRETER_NAME: INTERPRETER}


@dataclass(frozen=True, slots=True)
class Segment:
    """A control token, by name, or a piece of plain text. has_loss: whether training learns it."""

    text: str
    is_special: bool = False
    has_loss: bool = False


@dataclass(frozen=True)
class ChatTokens:
    """A conversation for training: ids, and for each whether it is a target of the loss."""

    ids: list[int]
    loss_mask: list[bool]


def render(
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    *,
    default_system: str | None = None,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
    whole_turns: bool = False,
) -> list[Segment]:
    """The segments of a conversation, without the start id.

    whole_turns: make the assistant's header and words one text too, as the official code does where nothing is
    generated (reward models). default_system: the system message of models that put one where the user gives none.
    Raises ChatError for messages or tools that do not form a conversation.
    """
    toolset = read_tools(tools)
    turns = read_messages(messages, has_interpreter=toolset.has_interpreter)
    if default_system is not None and turns[0].role != "system":
        turns.insert(0, _system(None, default_system))
    tool_turns: list[Turn] = []
    if toolset.has_interpreter:
        tool_turns.append(_system(INTERPRETER_NAME, INTERPRETER_USAGE))
    if toolset.plugins:
        try:
            body = json.dumps(toolset.plugins, ensure_ascii=False, default=dict)
        except (TypeError, ValueError) as error:
            raise ChatError(
                f"tools cannot be written as JSON: {error}. Give plain dicts, lists and texts."
            ) from error
        tool_turns.append(_system(PLUGIN_NAME, body))
    place = 1 if turns[0].role == "system" else 0
    turns[place:place] = tool_turns
    if continue_final and turns[-1].role != "assistant":
        raise ChatError(
            f"continue_final continues the assistant, but the last message is of {turns[-1].role!r}."
        )
    segments: list[Segment] = []
    for n, turn in enumerate(turns):
        is_open = continue_final and n == len(turns) - 1
        segments.extend(_turn_segments(turn, is_open=is_open, whole_turns=whole_turns))
    if add_generation_prompt and not continue_final:
        segments += [Segment(IM_START, is_special=True), Segment("assistant\n")]
    return segments


def _system(name: str | None, content: str) -> Turn:
    return Turn(role="system", name=name, content=content, calls=(), has_loss=False)


def _turn_segments(turn: Turn, *, is_open: bool, whole_turns: bool) -> list[Segment]:
    segments = [Segment(IM_START, is_special=True)]
    header = turn.role
    # The name of a user comes from outside and stays text, whatever it spells.
    if turn.role in ("system", "environment") and turn.name in _MARKER_OF_NAME:
        segments += [Segment(f"{header} name="), Segment(_MARKER_OF_NAME[turn.name], is_special=True)]
        header = ""
    elif turn.name is not None:
        header = f"{header} name={turn.name}"
    if turn.role != "assistant" or whole_turns:
        segments.append(Segment(f"{header}\n{turn.content}"))
    else:
        segments.append(Segment(f"{header}\n"))
        if turn.content:
            segments.append(Segment(turn.content, has_loss=turn.has_loss))
    for call in turn.calls:
        segments.extend(_call_segments(call, has_loss=turn.has_loss))
    if not is_open:
        segments += [Segment(IM_END, is_special=True, has_loss=turn.has_loss), Segment("\n")]
    return segments


def _call_segments(call: PluginCall | CodeCall, *, has_loss: bool) -> list[Segment]:
    if isinstance(call, CodeCall):
        marker, payload = INTERPRETER, f"\n```python\n{call.code}\n```"
    else:
        body = {"name": call.name, "parameters": call.parameters}
        marker, payload = PLUGIN, "\n" + json_text(body)
    return [
        Segment(ACTION_START, is_special=True, has_loss=has_loss),
        Segment(marker, is_special=True, has_loss=has_loss),
        Segment(payload, has_loss=has_loss),
        Segment(ACTION_END, is_special=True, has_loss=has_loss),
    ]
