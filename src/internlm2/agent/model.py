"""The seam between an agent and whatever thinks for it: a conversation goes in, words and calls come out.

Messages are OpenAI-style dicts. A `Model` is our engine, an OpenAI endpoint (`backends/`), a recording
(`record/rerun.py`) or a script; all run in the same loop.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from internlm2.agent.tool_type import Schema, Tool
from internlm2.errors import InternLM2Error

Message = Mapping[str, object]
FinishReason = Literal["stop", "length"]


class ContextFullError(InternLM2Error):
    """A conversation that has become longer than the model's context."""


class ModelError(InternLM2Error):
    """A model that gives no answer: an endpoint that is gone, or a question that it refuses."""


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for. arguments: JSON text, as the model wrote it; it may be anything."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Ask:
    """One question to a model.

    tools: offered for native calls. stop: texts that end the answer and are not part of it. constrain: calls must obey
    the schemas of their tools. json_schema: the whole answer is JSON of this form. continues: the last message is the
    assistant's, and goes on. deadline: `time.monotonic()` when the answer has to be there. is_cancelled: asked now and
    then; when it says yes, the answer ends.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    stop: tuple[str, ...] = ()
    constrain: bool = False
    json_schema: Schema | None = None
    continues: bool = False
    deadline: float | None = None
    is_cancelled: Callable[[], bool] = field(default=lambda: False, compare=False)

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.is_cancelled() or (self.deadline is not None and time.monotonic() >= self.deadline)


@dataclass(frozen=True)
class Reply:
    """What a model said. problems: calls that cannot be read, each with what is wrong; their text is in `text`."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    problems: tuple[str, ...] = ()
    finish_reason: FinishReason = "stop"
    prompt_tokens: int = 0
    output_tokens: int = 0


class Model(Protocol):
    """Whatever thinks."""

    @property
    def name(self) -> str:
        """For transcripts."""
        ...

    @property
    def calls_tools(self) -> bool:
        """Whether it can be offered tools, and calls them in its own way."""
        ...

    @property
    def keeps_text_plain(self) -> bool:
        """Whether text that spells a control token stays text. If not, the agent breaks such spellings up."""
        ...

    def respond(self, ask: Ask) -> Reply:
        """Answer a conversation.

        Raises ContextFullError when it is too long, and other InternLM2Errors when there is no answer to be had.
        """
        ...


class ScriptedModel:
    """Says what it was given, in order; for tests and examples. asks: what it was asked.

    script: replies, or texts of replies, or a function from the question to one.

    >>> ScriptedModel(["The answer is 18."])
    """

    keeps_text_plain = True

    def __init__(
        self,
        script: Sequence[Reply | str] | Callable[[Ask], Reply | str],
        *,
        calls_tools: bool = True,
        name: str = "script",
    ) -> None:
        self.name = name
        self.calls_tools = calls_tools
        self.asks: list[Ask] = []
        self._script = script

    def respond(self, ask: Ask) -> Reply:
        """See `Model.respond`. Raises ModelError at the end of the script."""
        self.asks.append(ask)
        if callable(self._script):
            said = self._script(ask)
        elif len(self.asks) <= len(self._script):
            said = self._script[len(self.asks) - 1]
        else:
            raise ModelError(f"The script has {len(self._script)} replies, and one more is asked for.")
        return Reply(said) if isinstance(said, str) else said
