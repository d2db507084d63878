"""Running a transcript again: model, tools, or both are taken from it, and what comes out differently is told.

Each step is compared by itself: after a difference the recorded words and results go on, so that the next steps are
asked under the same conditions as then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from internlm2.agent.agent import Agent
from internlm2.agent.calling import CallResult, Executor, ToolRunner
from internlm2.agent.dialects.choose import DialectName
from internlm2.agent.limits import Limits
from internlm2.agent.model import Ask, ContextFullError, Model, ModelError, Reply, ToolCall
from internlm2.agent.record.events import Listener, TranscriptError, reply_of, result_of
from internlm2.agent.record.transcript import Transcript
from internlm2.agent.tool_type import Tool
from internlm2.config import from_dict

_FOREVER_SECONDS = 1e9
_KEPT = ("seconds", "context")  # ended by what a replay has not, with the conversation kept
_NOT_REPEATED = (*_KEPT, "cancelled", "interrupted", "error")


@dataclass(frozen=True)
class Difference:
    """What came out differently. place: such as "reply 3" or "result of call_2". recorded, now: both, as text."""

    place: str
    recorded: str
    now: str


@dataclass(frozen=True)
class Replay:
    """What a replay found. num_replies, num_results: how much was gone through. is_whole: whether the run had ended."""

    differences: tuple[Difference, ...]
    num_replies: int
    num_results: int
    is_whole: bool


def replay(
    transcript: Transcript,
    *,
    model: Model | None = None,
    tools: Sequence[Tool] | None = None,
    listeners: Sequence[Listener] = (),
) -> Replay:
    """Run a transcript again. model, tools: the live ones; None: what was recorded is taken.

    Raises TranscriptError for a transcript that is damaged, or tools that are not those of the transcript.
    """
    differences: list[Difference] = []
    described = transcript.tools()
    rounds = _rounds(transcript)
    recorded = _RecordedModel(transcript, model, differences)
    agent = Agent(
        recorded,
        described if tools is None else _matched(described, tools),
        dialect=_dialect(transcript),
        system=_system(transcript),
        limits=_limits(transcript),
        constrain=transcript.start.get("constrain") is True,
    )
    breaks_markers = model is not None and not model.keeps_text_plain
    live = None if tools is None else ToolRunner(agent.tools, agent.limits, breaks_markers=breaks_markers)
    executor = _RecordedTools(transcript, live, differences)
    with agent.session(listeners=listeners, executor=executor) as session:
        for n, each in enumerate(rounds):
            recorded.begin(each)
            try:
                outcome = session.ask(each.question)
            except _EndOfRecordError:
                if each.ending in _NOT_REPEATED:
                    continue
                if each.ending is None:
                    break
                raise
            if each.ending not in _NOT_REPEATED:
                was, now = f"{each.ending}: {each.answer}", f"{outcome.ending}: {outcome.answer}"
                _compare(differences, f"end of question {n + 1}", was, now)
    is_whole = transcript.is_whole and all(each.ending is not None for each in rounds)
    return Replay(tuple(differences), recorded.num_replies, executor.num_results, is_whole)


@dataclass
class _Round:
    """One question of a transcript. ending: None where the run was killed."""

    question: str
    replies: list[Reply]
    ending: str | None = None
    answer: str = ""


def _rounds(transcript: Transcript) -> list[_Round]:
    rounds: list[_Round] = []
    for event in transcript.events:
        kind = event["event"]
        if kind == "question":
            rounds.append(_Round(str(event.get("text")), []))
        elif not rounds:
            raise TranscriptError(f"The transcript has a {kind} before the first question.")
        elif kind == "reply":
            rounds[-1].replies.append(reply_of(event))
        elif kind == "end":
            rounds[-1].ending, rounds[-1].answer = str(event.get("ending")), str(event.get("answer"))
    return rounds


class _EndOfRecordError(ModelError):
    """The run was ended here: killed, interrupted, or by an error."""


class _RecordedModel:
    """Gives the recorded replies; a live model is asked as well, and compared."""

    keeps_text_plain = True  # what was broken up stands broken up in the record

    def __init__(self, transcript: Transcript, live: Model | None, differences: list[Difference]) -> None:
        self.name = transcript.text("model")
        self.calls_tools = transcript.start.get("calls_tools") is True
        self.num_replies = 0
        self._live = live
        self._differences = differences
        self._round = _Round("", [])
        self._next = 0

    def begin(self, round_: _Round) -> None:
        """A question comes."""
        self._round, self._next = round_, 0

    def respond(self, ask: Ask) -> Reply:
        """The next reply of the record. Raises _EndOfRecordError or ContextFullError behind the last one."""
        if self._next == len(self._round.replies):
            if self._round.ending in _KEPT:
                raise ContextFullError("The question was given up here.")
            raise _EndOfRecordError(
                f"The transcript has {self._next} replies to {self._round.question!r:.80}, and one more is asked for. "
                "It was changed, or written by another version."
            )
        recorded = self._round.replies[self._next]
        self._next += 1
        self.num_replies += 1
        if self._live is not None:
            now = self._live.respond(replace(ask, deadline=None))
            _compare(self._differences, f"reply {self.num_replies}", _shown(recorded), _shown(now))
        return recorded


class _RecordedTools:
    """Gives the recorded results; live tools are called as well, and compared."""

    def __init__(self, transcript: Transcript, live: Executor | None, differences: list[Difference]) -> None:
        self.num_results = 0
        self._results = {str(event.get("id")): result_of(event) for event in transcript.of("result")}
        self._live = live
        self._differences = differences

    def run_all(
        self,
        calls: Sequence[ToolCall],
        *,
        deadline: float | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[CallResult]:
        """See `Executor.run_all`."""
        recorded = []
        for call in calls:
            result = self._results.get(call.id)
            if result is None:
                raise _EndOfRecordError(f"The transcript has no result of {call.id}.")
            if result.call != call:
                _compare(self._differences, f"call {call.id}", str(result.call), str(call))
            recorded.append(replace(result, call=call))
        self.num_results += len(recorded)
        if self._live is not None:
            for was, now in zip(recorded, self._live.run_all(calls, is_cancelled=is_cancelled), strict=True):
                _compare(self._differences, f"result of {was.call.id}", _told(was), _told(now))
        return recorded

    def close(self) -> None:
        """End the live tools' thread."""
        if self._live is not None:
            self._live.close()


def _compare(differences: list[Difference], place: str, recorded: str, now: str) -> None:
    if recorded != now:
        differences.append(Difference(place, recorded, now))


def _shown(reply: Reply) -> str:
    """What counts of a reply: its words and calls, not its ids and token counts."""
    calls = [f"{call.name}({call.arguments})" for call in reply.calls]
    return "\n".join([reply.text, *calls, *reply.problems])


def _told(result: CallResult) -> str:
    pictures = f"\n[{len(result.pictures)} pictures]" if result.pictures else ""
    return f"{result.status}: {result.text}{pictures}"


def _matched(described: Sequence[Tool], tools: Sequence[Tool]) -> list[Tool]:
    """The live tools of the transcript, in its order. Raises TranscriptError when one is not there."""
    by_name = {tool.name: tool for tool in tools}
    missing = [tool.name for tool in described if tool.name not in by_name]
    if missing:
        raise TranscriptError(
            f"The transcript's tools {', '.join(missing)} are not among those given. Give the same tools again."
        )
    return [by_name[tool.name] for tool in described]


def _dialect(transcript: Transcript) -> DialectName:
    name = transcript.text("dialect")
    if name not in ("native", "react", "interpreter"):
        raise TranscriptError(f"The transcript's loop is {name!r}, which is not known.")
    return name


def _system(transcript: Transcript) -> str | None:
    return None if transcript.start.get("system") is None else transcript.text("system")


def _limits(transcript: Transcript) -> Limits:
    given = transcript.start.get("limits")
    if not isinstance(given, dict):
        raise TranscriptError("The transcript holds no limits.")
    return replace(from_dict(Limits, given, where="The transcript's limits"), seconds=_FOREVER_SECONDS)
