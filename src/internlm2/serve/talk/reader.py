"""What an answer holds, as it comes: text, calls of tools, their end. Nothing is shown before it is certain.

Calls are found by their control tokens, so it does not matter how the stream is cut into pieces.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from internlm2.engine.core import FinishReason
from internlm2.engine.sampling.sampler import TokenLogprobs
from internlm2.tokenizer import Tokenizer
from internlm2.tokenizer.chat.message import CodeCall, json_text
from internlm2.tokenizer.chat.parse import AssistantParser, Call, InvalidCall
from internlm2.tokenizer.special import ACTION_END, ACTION_START, IM_END
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
        self._start_id, self._end_id = ids.get(ACTION_START), ids.get(ACTION_END)
        self._markers = {ids[name] for name in (ACTION_START, ACTION_END, IM_END) if name in ids}
        self._stop = tuple(stop)
        self._stops = StopStrings(self._stop)
        self._sample = sample
        self.num_calls = 0  # that could be read
        self._num_seen = 0
        self.is_in_call = False

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found, or the model's own end: what follows is no part of the answer."""
        return self._stops.matched is not None or self._parser.ended

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> list[Delta]:
        """Take one token."""
        if self.is_stopped:
            return []
        text = self._stops.push(self._parser.push(token_id))
        tokens: tuple[TokenReport, ...] = ()
        if logprobs is not None and not self.is_in_call and token_id not in self._markers:
            tokens = (TokenReport(token_id, logprobs),)
        if token_id in self._markers:
            self.is_in_call = token_id == self._start_id
            text += self._between()
        found = [Delta(self._sample, text=text, tokens=tokens)] if text or tokens else []
        return found + (self._calls() if token_id in self._markers else [])

    def close_call(self) -> list[Delta]:
        """End the call that is open, as `<|action_end|>` does, which the engine does not hand out."""
        return [] if self._end_id is None or not self.is_in_call else self.push(self._end_id)

    def finish(self) -> list[Delta]:
        """No more tokens come. A call that was cut off comes back as text, so that nothing is lost."""
        text = self._stops.push(self._parser.finish())
        if self._stops.matched is None:
            text += self._stops.finish()
        self.is_in_call = False
        return ([Delta(self._sample, text=text)] if text else []) + self._calls()

    def _between(self) -> str:
        """Text that was held back for a stop string, which cannot reach over a control token."""
        if self._stops.matched is not None:
            return ""
        held, self._stops = self._stops.finish(), StopStrings(self._stop)
        return held

    def _calls(self) -> list[Delta]:
        """The calls that have ended since the last look."""
        calls = self._parser.turn.calls[self._num_seen :]
        self._num_seen += len(calls)
        return [self._delta(call) for call in calls] if self._stops.matched is None else []

    def _delta(self, call: Call) -> Delta:
        if isinstance(call, InvalidCall):
            return Delta(self._sample, text=call.raw)
        self.num_calls += 1
        if isinstance(call, CodeCall):
            name, arguments = CODE_TOOL, json.dumps({"code": call.code}, ensure_ascii=False)
        else:
            name, arguments = call.name, json_text(call.parameters)
        return Delta(self._sample, call=ToolCall(f"call_{secrets.token_hex(12)}", name, arguments))
