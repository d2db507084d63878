"""What a way of speaking has to do: offer the tools, read what the model said, write what the tools brought."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from internlm2.agent.calling import CallResult
from internlm2.agent.model import Ask, Message, Model, Reply, ToolCall
from internlm2.agent.tool_type import Tool


@dataclass(frozen=True)
class Move:
    """What the model does. message: its words, for the conversation. calls: what it wants done. answer: to the user,
    where it is done. problem: what is wrong with what it said, where it has to say it again.
    """

    message: Message
    calls: tuple[ToolCall, ...] = ()
    answer: str | None = None
    problem: str | None = None


class Dialect(Protocol):
    """A way of speaking about tools."""

    @property
    def name(self) -> str:
        """As the command line calls it."""
        ...

    def system(self, given: str | None, tools: Sequence[Tool]) -> str | None:
        """The system message: what the user gave, and what the model has to know of the tools."""
        ...

    def respond(self, model: Model, ask: Ask) -> Reply:
        """One answer of the model. ask: the conversation, with all tools; some ways take it apart."""
        ...

    def read(self, reply: Reply, tools: Sequence[Tool], first_id: int) -> Move:
        """What an answer means. first_id: number of its first call, for ids that are the same in every run."""
        ...

    def results(self, results: Sequence[CallResult]) -> list[Message]:
        """What the tools brought, for the model to read."""
        ...

    def problem(self, text: str) -> list[Message]:
        """What is wrong with the model's last answer, for the model to read."""
        ...


def result_text(result: CallResult) -> str:
    """A result in words."""
    text = result.text if result.status == "ok" else f"Error: {result.text}"
    if result.pictures:
        text += f"\n[{len(result.pictures)} pictures, shown to the user]"
    return text.removeprefix("\n") or "(no output)"
