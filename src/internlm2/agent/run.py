"""One question on its way to an answer: the conversation so far, what was used of the limits, which calls failed."""

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from internlm2.agent.calling import CallResult, read_arguments
from internlm2.agent.limits import Limits
from internlm2.agent.model import Message, Reply, ToolCall
from internlm2.agent.tool_type import ToolError

Ending = Literal["answered", "cut", "turns", "seconds", "tokens", "context", "repeats", "cancelled"]
_REASONS: dict[str, str] = {
    "cut": "The answer reached the limit of its length.",
    "turns": "The limit of turns is reached.",
    "seconds": "The time is over.",
    "tokens": "The limit of tokens is reached.",
    "context": "The conversation is longer than the model's context.",
    "repeats": "The same call failed again and again.",
    "cancelled": "The run was cancelled.",
}


@dataclass(frozen=True)
class Outcome:
    """How a question ended.

    ending: "answered", or which limit ended it. answer: for the user; where there is none, the model's last words.
    calls: all results, in order. prompt_tokens, output_tokens: of all turns together.
    """

    ending: Ending
    answer: str
    turns: int
    calls: tuple[CallResult, ...]
    prompt_tokens: int
    output_tokens: int
    seconds: float

    @property
    def is_answered(self) -> bool:
        """Whether the model has answered."""
        return self.ending == "answered"

    @property
    def reason(self) -> str:
        """Why there is no answer, in a sentence; "" if there is one."""
        return _REASONS.get(self.ending, "")


class Run:
    """One question on its way: the conversation so far, what was used, which calls failed."""

    def __init__(self, limits: Limits, messages: list[Message]) -> None:
        self.messages = messages
        self.turns = 0
        self.num_refused = 0
        self.is_cut = False
        self.last_words = ""
        self._limits = limits
        self._started = time.monotonic()
        self.deadline = self._started + limits.seconds
        self._prompt_tokens = self._output_tokens = 0
        self._results: list[CallResult] = []
        self._failures: Counter[str] = Counter()

    def limit_met(self) -> Ending | None:
        """Which limit forbids another turn."""
        limits = self._limits
        if time.monotonic() >= self.deadline:
            return "seconds"
        if limits.tokens is not None and self._prompt_tokens + self._output_tokens >= limits.tokens:
            return "tokens"
        return "turns" if self.turns >= limits.turns else None

    def count(self, reply: Reply) -> None:
        """Add an answer to what was used."""
        self._prompt_tokens += reply.prompt_tokens
        self._output_tokens += reply.output_tokens
        self.is_cut = reply.finish_reason == "length"

    def refusal(self, call: ToolCall, number: int) -> str | None:
        """Why a call is not carried out."""
        limits = self._limits
        if number >= limits.calls_per_turn:
            return f"At most {limits.calls_per_turn} calls are carried out at once. Send this one again."
        if self._failures[_same(call)] >= limits.same_failures:
            return (
                f"This call has failed {limits.same_failures} times with these arguments. "
                "Change them, use another tool, or answer without it."
            )
        return None

    def note(self, result: CallResult) -> None:
        """Remember what became of a call."""
        self._results.append(result)
        key = _same(result.call)
        if result.status == "ok":
            self._failures.pop(key, None)
        elif result.status != "refused":
            self._failures[key] += 1
        elif self._failures[key] >= self._limits.same_failures:
            self.num_refused += 1

    def note_problem(self, said: str) -> None:
        """Remember words that could not be read; the same words once more count as a refused call."""
        self._failures[said] += 1
        if self._failures[said] > self._limits.same_failures:
            self.num_refused += 1

    def counts(self) -> dict[str, object]:
        """What was used, for the transcript."""
        return {
            "turns": self.turns,
            "calls": len(self._results),
            "prompt_tokens": self._prompt_tokens,
            "output_tokens": self._output_tokens,
        }

    def outcome(self, ending: Ending) -> Outcome:
        """The question is over."""
        if ending == "cut" and time.monotonic() >= self.deadline:
            ending = "seconds"
        return Outcome(
            ending,
            self.last_words,
            self.turns,
            tuple(self._results),
            self._prompt_tokens,
            self._output_tokens,
            time.monotonic() - self._started,
        )


def _same(call: ToolCall) -> str:
    """What two calls that ask for the same have in common."""
    try:
        arguments = json.dumps(read_arguments(call.arguments), sort_keys=True)
    except ToolError:
        arguments = call.arguments
    return f"{call.name}\n{arguments}"
