"""The numbers of a run with all that they depend on."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from internlm2 import __version__
from internlm2.config import from_dict
from internlm2.errors import ConfigError
from internlm2.eval.metrics import Score, summarise
from internlm2.eval.questions import Part, RunSettings
from internlm2.eval.run_folder import RESULTS, Sample, read_json
from internlm2.eval.task import EvalError

NUM_NAMED = 3  # questions in a sentence


@dataclass(frozen=True)
class Row:
    """A mean in percent. standard_error: as `metrics.Score` has it; None where a single question tells nothing."""

    percent: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class TaskResult:
    """What one benchmark gave.

    rows: averages over subsets, the card's number under the name of the task; those are left out that need a subset
    without any verdict. subsets: each of them.

    num_errors: questions without a verdict, which no mean counts. num_dropped_shots, num_cut_prompts: questions that
    lost examples, or a part of their text, to the context limit; dropped_shots, cut_prompts: their keys.
    num_cut_answers: answers that reached their longest length. seconds: of work, without loading the model.
    """

    name: str
    rows: Mapping[str, Row]
    subsets: Mapping[str, Row]
    num_questions: int
    num_errors: int
    num_dropped_shots: int
    num_cut_prompts: int
    num_cut_answers: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    prompt_sha256: str
    data_sha256: Mapping[str, str]
    dropped_shots: tuple[str, ...] = ()
    cut_prompts: tuple[str, ...] = ()

    @property
    def shortenings(self) -> list[str]:
        """How many prompts were shortened, and which, in words."""
        told = (
            (self.num_dropped_shots, "lost worked examples", self.dropped_shots),
            (self.num_cut_prompts, "lost a part of their prompt", self.cut_prompts),
        )
        return [
            f"{self.name}: {count} of {self.num_questions} questions {what} to the context limit{_named(keys)}"
            for count, what, keys in told
            if count
        ]


@dataclass(frozen=True)
class Results:
    """A finished run. keeps_context_limit: False where the profile has a limit that the model could not keep."""

    model: Mapping[str, str]
    profile: str
    is_chat: bool
    limit: int | None
    seed: int
    early_stop: bool
    keeps_context_limit: bool
    versions: Mapping[str, str]
    tasks: Mapping[str, TaskResult]
    task_limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def which(self) -> str:
        """Which questions were asked, in words."""
        if self.limit is None and not self.task_limits:
            return "all questions"
        told = "all questions" if self.limit is None else f"{self.limit} of each subset"
        told += "".join(f", {count} of {name}" for name, count in self.task_limits.items())
        return f"{told}, seed {self.seed}"

    @property
    def num_errors(self) -> int:
        """Questions without a verdict."""
        return sum(task.num_errors for task in self.tasks.values())

    def as_json(self) -> str:
        """As `load` reads it."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def load(folder: Path) -> "Results":
        """The results of a finished run. Raises EvalError where there are none."""
        path = folder / RESULTS
        try:
            return from_dict(Results, read_json(path), where=str(path))
        except ConfigError as error:
            raise EvalError(f"{path} is damaged: {error} Remove it and start the run again.") from error


def collect(
    model: Mapping[str, str],
    settings: RunSettings,
    parts: Sequence[Part],
    samples: Mapping[str, Sample],
    *,
    keeps_context_limit: bool,
) -> Results:
    """The results of a run whose questions all have a sample."""
    versions = {"internlm2": __version__, "python": platform.python_version()}
    return Results(
        model=model,
        profile=settings.profile,
        is_chat=settings.is_chat,
        limit=settings.limit,
        seed=settings.seed,
        early_stop=settings.early_stop,
        keeps_context_limit=keeps_context_limit,
        versions=versions | {name: version(name) for name in ("torch", "numpy")},
        tasks={part.facts.name: _task_result(part, samples) for part in parts},
        task_limits=settings.task_limits,
    )


def _task_result(part: Part, samples: Mapping[str, Sample]) -> TaskResult:
    own = {subset: [samples[item.key] for item in items] for subset, items in part.subsets.items()}
    everything = [sample for group in own.values() for sample in group]
    rows, subsets = summarise(
        part.task.averages,
        {subset: [sample.score for sample in group if not sample.error] for subset, group in own.items()},
    )
    dropped_shots = tuple(sample.key for sample in everything if sample.dropped_shots)
    cut_prompts = tuple(sample.key for sample in everything if sample.cut_tokens)
    return TaskResult(
        name=part.facts.name,
        rows={name: _row(score) for name, score in rows.items()},
        subsets={name: _row(score) for name, score in subsets.items()},
        num_questions=len(everything),
        num_errors=sum(bool(sample.error) for sample in everything),
        num_dropped_shots=len(dropped_shots),
        num_cut_prompts=len(cut_prompts),
        num_cut_answers=sum(sample.finish_reason == "length" for sample in everything),
        prompt_tokens=sum(sample.prompt_tokens for sample in everything),
        output_tokens=sum(sample.output_tokens for sample in everything),
        seconds=round(math.fsum(sample.seconds for sample in everything), 3),
        prompt_sha256=part.facts.prompt_sha256,
        data_sha256=part.facts.data_sha256,
        dropped_shots=dropped_shots,
        cut_prompts=cut_prompts,
    )


def _row(score: Score) -> Row:
    error = score.standard_error
    return Row(score.percent, None if math.isnan(error) else error, score.n)


def _named(keys: Sequence[str]) -> str:
    """The first of some keys in words."""
    if not keys:
        return ""
    more = ", and others, which results.json lists" if len(keys) > NUM_NAMED else ""
    return f": {', '.join(keys[:NUM_NAMED])}{more}"
