"""What an answer holds, as it comes: text, calls of tools, their end. Nothing is shown before it is certain.

Calls are found by their control tokens, or by whole spelled markers where the vocabulary has no such tokens, so it does
not matter how the stream is cut into pieces.
"""

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from internlm2.engine.core import FinishReason
from internlm2.engine.sampling.sampler import TokenLogprobs
from internlm2.tokenizer import Tokenizer
from internlm2.tokenizer.chat.message import CodeCall, json_text
from internlm2.tokenizer.chat.parse import AssistantParser, Call, InvalidCall
from internlm2.tokenizer.special import ACTION_END, ACTION_START, IM_END, PLUGIN
from internlm2.tokenizer.stream import StopStrings

CODE_TOOL = "python"  # how a call of the interpreter is named, as in `AssistantTurn.to_message`


@dataclass(frozen=True)
class ToolCall:
    """A call as OpenAI's clients see it. arguments: JSON text."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class TokenReport:
    """A token of the answer and its log-probabilities."""

    token_id: int
    logprobs: TokenLogprobs


@dataclass(frozen=True)
class Delta:
    """What one moment adds to an answer.

    sample: which answer. text, call: what is new. tokens: the tokens behind text, where log-probabilities are asked
    for. num_tokens: how many tokens of the model came. finish_reason: with the last one.
    """

    sample: int
    text: str = ""
    call: ToolCall | None = None
    tokens: tuple[TokenReport, ...] = ()
    num_tokens: int = 0
    finish_reason: FinishReason | None = None


class CallReader:
    """Reads one answer that may call tools.

    stop: texts that end it; they are looked for in its text, never inside a call.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), sample: int = 0) -> None:
        self._parser = AssistantParser(tokenizer)
        ids = tokenizer.special_tokens
        self._markers = {ids[name] for name in (ACTION_START, ACTION_END, IM_END) if name in ids}
        self._stop = tuple(stop)
        self._stops = StopStrings(self._stop)
        self._sample = sample
        self._undecided: list[TokenReport] = []  # of tokens that may spell a marker
        self.num_calls = 0  # that could be read

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found, or the model's own end: what follows is no part of the answer."""
        return self._stops.matched is not None or self._parser.ended

    @property
    def is_in_call(self) -> bool:
        """Whether a call is open."""
        return self._parser.is_in_call

    @property
    def is_in_plugin(self) -> bool:
        """Whether a call of a plugin is open."""
        return self._parser.kind == PLUGIN

    def push(
        self, token_id: int, logprobs: TokenLogprobs | None = None, *, is_payload: bool = False
    ) -> list[Delta]:
        """Take one token. is_payload: a grammar wrote it as a part of a call, so that it cannot end it."""
        if self.is_stopped:
            return []
        was_in_call = self.is_in_call
        deltas = self._deltas(self._parser.read(token_id, is_payload=is_payload))
        if token_id in self._markers or self.is_in_call != was_in_call:
            deltas += self._between()
            self._undecided.clear()
        elif logprobs is not None and not self.is_in_call:
            self._undecided.append(TokenReport(token_id, logprobs))
        if self._undecided and not self._parser.is_holding:
            deltas += self._decided()
        return _joined(deltas)

    def close_call(self) -> list[Delta]:
        """End the call that is open, as `<|action_end|>` does, which the engine does not hand out."""
        return self._deltas(self._parser.read_marker(ACTION_END)) if self.is_in_call else []

    def drop_payload(self) -> str:
        """Forget what stands behind the markers of the open call, and return it."""
        return self._parser.drop_payload()

    def finish(self) -> list[Delta]:
        """No more tokens come. A call that was cut off comes back as text, so that nothing is lost."""
        deltas = self._deltas(self._parser.read_rest())
        if self._undecided:
            deltas += self._decided()
        return _joined(deltas + self._between())

    def _deltas(self, new: Iterable[str | Call]) -> list[Delta]:
        """What the parser found, up to a stop string."""
        deltas: list[Delta] = []
        for each in new:
            if self._stops.matched is not None:
                break
            if isinstance(each, str):
                text = self._stops.push(each)
                deltas += [Delta(self._sample, text=text)] if text else []
            else:
                deltas += [*self._between(), self._delta(each)]
        return deltas

    def _decided(self) -> list[Delta]:
        """The reports of tokens that turned out to be text."""
        tokens, self._undecided = tuple(self._undecided), []
        return [Delta(self._sample, tokens=tokens)]

    def _between(self) -> list[Delta]:
        """Text that was held back for a stop string, which cannot reach over a marker."""
        if self._stops.matched is not None:
            return []
        held, self._stops = self._stops.finish(), StopStrings(self._stop)
        return [Delta(self._sample, text=held)] if held else []

    def _delta(self, call: Call) -> Delta:
        if isinstance(call, InvalidCall):
            return Delta(self._sample, text=call.raw)
        self.num_calls += 1
        if isinstance(call, CodeCall):
            name, arguments = CODE_TOOL, json.dumps({"code": call.code}, ensure_ascii=False)
        else:
            name, arguments = call.name, json_text(call.parameters)
        return Delta(self._sample, call=ToolCall(f"call_{secrets.token_hex(12)}", name, arguments))


def _joined(deltas: Sequence[Delta]) -> list[Delta]:
    """The same with one delta for all text between two calls."""
    joined: list[Delta] = []
    for delta in deltas:
        if joined and joined[-1].call is None and delta.call is None:
            last = joined[-1]
            joined[-1] = replace(last, text=last.text + delta.text, tokens=last.tokens + delta.tokens)
        else:
            joined.append(delta)
    return joined
