"""Which questions a run asks: whole benchmarks or single subsets, all of their rows or a draw."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from internlm2.config import suggest
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.profile import Profile
from internlm2.eval.task import EvalError, Item, Task
from internlm2.eval.tasks import CARD_TASKS, build


@dataclass(frozen=True)
class RunSettings:
    """What is run.

    tasks: benchmarks, or single subsets such as "mmlu.anatomy". limit: at most so many questions of each subset, drawn
    with `seed`; None: all. task_limits: other limits for some benchmarks. early_stop: end answers at texts that change
    the score only of answers that go astray.
    """

    tasks: tuple[str, ...] = CARD_TASKS
    profile: str = "card-2024-02"
    is_chat: bool = False
    limit: int | None = None
    seed: int = 0
    early_stop: bool = False
    task_limits: Mapping[str, int] = field(default_factory=dict)

    def limit_of(self, task: str) -> int | None:
        """How many questions of each subset of a benchmark are asked; None: all."""
        return self.task_limits.get(task, self.limit)


def read_limits(text: str) -> tuple[int | None, dict[str, int]]:
    """`limit` and `task_limits` as they are typed: "20", "mmlu=5", or "20,gsm8k=100"; raises EvalError."""
    limit: int | None = None
    task_limits: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, is_named, number = part.rpartition("=")
        try:
            count = int(number)
        except ValueError:
            raise EvalError(
                f"limit is {text!r}, but must be a number, with TASK=NUMBER for other limits: 20,gsm8k=100."
            ) from None
        if is_named:
            task_limits[name.strip()] = count
        else:
            limit = count
    return limit, task_limits


@dataclass(frozen=True)
class TaskFacts:
    """What decides about the questions of a task. prompt_sha256: of all prompts; data_sha256: of the files, by name."""

    name: str
    prompt_sha256: str
    data_sha256: Mapping[str, str]


@dataclass(frozen=True)
class Part:
    """The questions of one task that are asked. subsets: by name, in the order of the file."""

    task: Task
    subsets: Mapping[str, Sequence[Item]]
    facts: TaskFacts

    @property
    def items(self) -> Iterator[Item]:
        """All of them in order."""
        return (item for items in self.subsets.values() for item in items)


def choose_questions(data: DataFolder, profile: Profile, settings: RunSettings) -> list[Part]:
    """The questions that the settings name, read from the data folder."""
    for limit in (settings.limit, *settings.task_limits.values()):
        if limit is not None and limit < 1:
            raise EvalError(f"limit is {limit}, but must be at least 1, or left out for all questions.")
    wanted: dict[str, list[str]] = {}
    for name in settings.tasks:
        task, _, subset = name.partition(".")
        wanted.setdefault(task, []).append(subset)
    if not wanted:
        raise EvalError(f"No task is given. Known: {', '.join(CARD_TASKS)}.")
    for name in settings.task_limits:
        if name not in wanted:
            raise EvalError(
                f"A limit is given for {name!r}, which is not asked. {suggest(name, list(wanted))}"
            )
    return [_part(name, subsets, data, profile, settings) for name, subsets in wanted.items()]


def _part(
    name: str, wanted: Sequence[str], data: DataFolder, profile: Profile, settings: RunSettings
) -> Part:
    task = build(name, profile, is_chat=settings.is_chat)
    for subset in wanted:
        if subset and subset not in task.subsets:
            raise EvalError(f"{name} has no subset {subset!r}. {suggest(subset, list(task.subsets))}")
    names = [subset for subset in task.subsets if "" in wanted or subset in wanted]
    subsets: dict[str, Sequence[Item]] = {}
    digest = hashlib.sha256()
    for subset in names:
        items = list(task.items(data, subset))
        limit = settings.limit_of(name)
        if limit is not None and len(items) > limit:
            draw = random.Random(f"{settings.seed}:{name}.{subset}")
            order = draw.sample(range(len(items)), len(items))  # a larger limit holds what a smaller one drew
            items = [items[n] for n in sorted(order[:limit])]
        for item in items:
            identity = item.prompt.identity
            for label in item.labels or ("",):
                text = identity + label
                digest.update(f"{item.key}\0{len(text)}\0{text}".encode())
        subsets[subset] = items
    paths = sorted({path for subset in names for path in task.files(subset)})
    facts = TaskFacts(name, digest.hexdigest(), {path: data.sha256[path] for path in paths})
    return Part(task, subsets, facts)
