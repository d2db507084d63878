"""Which questions a run asks: whole benchmarks or single subsets, all of their rows or a draw."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from internlm2.config import suggest
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.profile import Profile
from internlm2.eval.task import EvalError, Item, Task
from internlm2.eval.tasks import CARD_TASKS, build


@dataclass(frozen=True)
class RunSettings:
    """What is run.

    tasks: benchmarks, or single subsets such as "mmlu.anatomy". limit: at most so many questions of each subset, drawn
    with `seed`; None: all. early_stop: end answers at texts that change the score only of answers that go astray.
    """

    tasks: tuple[str, ...] = CARD_TASKS
    profile: str = "card-2024-02"
    is_chat: bool = False
    limit: int | None = None
    seed: int = 0
    early_stop: bool = False


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
    if settings.limit is not None and settings.limit < 1:
        raise EvalError(f"limit is {settings.limit}, but must be at least 1, or left out for all questions.")
    wanted: dict[str, list[str]] = {}
    for name in settings.tasks:
        task, _, subset = name.partition(".")
        wanted.setdefault(task, []).append(subset)
    if not wanted:
        raise EvalError(f"No task is given. Known: {', '.join(CARD_TASKS)}.")
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
        if settings.limit is not None and len(items) > settings.limit:
            draw = random.Random(f"{settings.seed}:{name}.{subset}")
            items = [items[n] for n in sorted(draw.sample(range(len(items)), settings.limit))]
        for item in items:
            identity = item.prompt.identity
            for label in item.labels or ("",):
                text = identity + label
                digest.update(f"{item.key}\0{len(text)}\0{text}".encode())
        subsets[subset] = items
    paths = sorted({path for subset in names for path in task.files(subset)})
    facts = TaskFacts(name, digest.hexdigest(), {path: data.sha256[path] for path in paths})
    return Part(task, subsets, facts)
