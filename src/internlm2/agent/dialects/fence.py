"""Code between fences: a loop in which the model writes a ```python block, and reads what it brought."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from internlm2.agent.calling import CallResult
from internlm2.agent.dialects.dialect import Move, result_text
from internlm2.agent.model import Ask, Message, Model, Reply, ToolCall
from internlm2.agent.tool_type import Tool

STOP = ("\n```output", "\nOutput:\n")
_OPEN = re.compile(r"^[ \t]*```[ \t]*(?:python|py|python3)[ \t]*\n", re.M | re.I)
_CLOSE = re.compile(r"^[ \t]*```[ \t]*$", re.M)

_USAGE = """You can run Python. Write one complete block

```python
print("code")
```

and stop. What it prints, the value of its last expression or its error comes back to you. Variables live on between \
blocks. When you know the answer, write it without a block."""


class FenceDialect:
    """The first ```python block of an answer is run; an answer without one is for the user."""

    name = "interpreter"

    def system(self, given: str | None, tools: Sequence[Tool]) -> str | None:
        """How to run code."""
        return f"{given}\n\n{_USAGE}" if given else _USAGE

    def respond(self, model: Model, ask: Ask) -> Reply:
        """Plain text; there is no schema to hold code to."""
        return model.respond(replace(ask, tools=(), constrain=False, stop=(*ask.stop, *STOP)))

    def read(self, reply: Reply, tools: Sequence[Tool], first_id: int) -> Move:
        """The first block; output that the model invents behind it is dropped."""
        text = reply.text
        opened = _OPEN.search(text)
        if opened is None:
            return Move({"role": "assistant", "content": text}, answer=text.strip())
        closed = _CLOSE.search(text, opened.end())
        if closed is None and reply.finish_reason == "length":
            return Move(
                {"role": "assistant", "content": text},
                problem="Your code was cut off before its end. Write a shorter block.",
            )
        code = text[opened.end() : closed.start() if closed else len(text)].rstrip("\n")
        kept = text[: closed.end()] if closed else text.rstrip("\n") + "\n```"
        tool = next(each for each in tools if each.is_code)
        call = ToolCall(f"call_{first_id}", tool.name, json.dumps({"code": code}, ensure_ascii=False))
        return Move({"role": "assistant", "content": kept}, (call,))

    def results(self, results: Sequence[CallResult]) -> list[Message]:
        """The output, in the role of the user; no fence, which the output could close."""
        return [{"role": "user", "content": f"Output:\n{result_text(one)}"} for one in results]

    def problem(self, text: str) -> list[Message]:
        """A word from the user's side."""
        return [{"role": "user", "content": f"Error: {text}"}]


def strip_fence(text: str) -> str:
    """What stands between the fences, if the whole text is one block."""
    found = re.fullmatch(r"```[\w+-]*[ \t]*\n(.*?)\n?```", text.strip(), re.S)
    return found[1] if found else text
