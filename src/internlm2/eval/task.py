"""What a benchmark is to whoever runs it: items with prompts, and a verdict on what a model made of each.

A `Task` is bound to a profile and to base or chat mode when it is built (`internlm2.eval.tasks.build`). It reads data
files and does arithmetic; asking a model and running programs are the caller's part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from internlm2.errors import InternLM2Error
from internlm2.eval.data.folder import DataFolder
from internlm2.tokenizer.special import IM_END, IM_START


class EvalError(InternLM2Error):
    """An evaluation that cannot be done as asked: unknown task, subset or item, or a setting that does not fit."""


@dataclass(frozen=True)
class TextPrompt:
    """What a base model continues: `head`, the worked examples, `tail`, with nothing between them.

    shots: examples that a context limit may drop, the last one first; examples that are part of the protocol's text
    stand in `head`.
    """

    head: str
    tail: str
    shots: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.head + "".join(self.shots) + self.tail

    @property
    def identity(self) -> str:
        """What tells it from every other prompt: the text itself."""
        return self.text

    @property
    def record(self) -> str:
        """What a sample keeps of it: all."""
        return self.text

    def written(self) -> "TextPrompt":
        """As a model is given it."""
        return self

    def with_shots(self, count: int) -> "TextPrompt":
        """The same question after the first `count` examples."""
        return replace(self, shots=self.shots[:count])


@dataclass(frozen=True)
class Turn:
    """One message: role is "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatPrompt:
    """What a chat model answers; each shot is a question and its answer. Fields as in `TextPrompt`."""

    head: tuple[Turn, ...]
    tail: tuple[Turn, ...]
    shots: tuple[tuple[Turn, ...], ...] = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns in order."""
        return (*self.head, *(turn for shot in self.shots for turn in shot), *self.tail)

    @property
    def messages(self) -> list[dict[str, object]]:
        """The turns as `LLM.chat` takes them. There is no system message."""
        return [{"role": turn.role, "content": turn.content} for turn in self.turns]

    @property
    def text(self) -> str:
        """The whole prompt with the control tokens spelled out, up to the header of the answer."""
        turns = "".join(f"{IM_START}{turn.role}\n{turn.content}{IM_END}\n" for turn in self.turns)
        return f"{turns}{IM_START}assistant\n"

    @property
    def identity(self) -> str:
        """What tells it from every other prompt: the text itself."""
        return self.text

    @property
    def record(self) -> str:
        """What a sample keeps of it: all."""
        return self.text

    def written(self) -> "ChatPrompt":
        """As a model is given it."""
        return self

    def with_shots(self, count: int) -> "ChatPrompt":
        """The same question after the first `count` examples."""
        return replace(self, shots=self.shots[:count])


RECORD_CHARACTERS = 400


@dataclass(frozen=True)
class LongPrompt:
    """A prompt that is written only when it is asked, and then again each time: thousands of them need no room.

    write: gives the prompt, the same at every call. recipe: what it is made of, where that tells it from every other
    prompt; "": the text does. A prompt with a recipe is kept in samples by its ends only.
    """

    write: Callable[[], TextPrompt | ChatPrompt] = field(compare=False)
    recipe: str = ""
    shots: tuple[()] = ()

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.write().text

    @property
    def identity(self) -> str:
        """What tells it from every other prompt."""
        return self.recipe or self.text

    @property
    def record(self) -> str:
        """What a sample keeps of it; `internlm2 eval prompt` writes the whole again."""
        text = self.text
        left_out = len(text) - 2 * RECORD_CHARACTERS
        if not self.recipe or left_out <= 0:
            return text
        start, end = text[:RECORD_CHARACTERS], text[-RECORD_CHARACTERS:]
        return f"{start}\n[{left_out} characters are not kept; {self.recipe}]\n{end}"

    def with_shots(self, count: int) -> "LongPrompt":
        """Itself: there are no examples to drop."""
        return self

    def written(self) -> TextPrompt | ChatPrompt:
        """As a model is given it."""
        return self.write()


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    task, subset, index: where it stands; index counts the rows of the data file from 0, subset is "" for benchmarks
    that have none. gold: the right answer as the scorer compares it.

    labels: for perplexity, the continuations of the prompt, one of which is the answer; empty for generation.
    max_tokens: longest answer in tokens. stop: texts that end an answer without any effect on its score. early_stop:
    texts that end an answer earlier, and change the score only of answers that go astray; for whoever is in a hurry.

    fields: what else the scorer needs, such as the tests of a program.

    is_long: long texts are what is tested, so that only the model's own context limit counts, not the profile's.
    cuts_middle: a prompt that is too long loses its middle, not its beginning.
    """

    task: str
    subset: str
    index: int
    gold: str
    prompt: TextPrompt | ChatPrompt | LongPrompt
    labels: tuple[str, ...] = ()
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    early_stop: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    is_long: bool = False
    cuts_middle: bool = False

    @property
    def key(self) -> str:
        """The item as the command line names it, such as "mmlu.anatomy:3" or "gsm8k:0"."""
        return f"{self.task}.{self.subset}:{self.index}" if self.subset else f"{self.task}:{self.index}"

    def text(self, label: str | None = None) -> str:
        """The prompt as one text, with `label` behind it. Raises EvalError for a label that is none of the item's."""
        if label is None:
            return self.prompt.text
        if label not in self.labels:
            allowed = (
                f"one of {', '.join(self.labels)}" if self.labels else "left out: the answer is generated"
            )
            raise EvalError(f"The label of {self.key} is {label!r}, but must be {allowed}.")
        return self.prompt.text + label


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth. score: from 0 to 1. extracted: what was read as the answer. detail: why, in words."""

    score: float
    extracted: str
    detail: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the answer is fully right."""
        return self.score == 1.0


class ProgramRunner(Protocol):
    """Runs a Python program that a model wrote against its tests, in a sandbox."""

    def __call__(
        self, program: str, timeout_seconds: float, *, tests: str, entry_points: Sequence[str]
    ) -> bool:
        """Whether the program, and then every test, ran to its end in time without an error.

        tests: Python text that the program must not be able to touch. entry_points: names that it takes from the
        program, whatever else they mean in Python.
        """
        ...


@dataclass(frozen=True)
class Average:
    """A row of the results over several subsets.

    is_weighted: by the items of each subset; else all count alike, or as `weights` says, one for each subset.
    """

    name: str
    subsets: tuple[str, ...]
    is_weighted: bool = False
    weights: tuple[float, ...] = ()


class Task(Protocol):
    """A benchmark under one profile, in one mode."""

    @property
    def name(self) -> str:
        """As on the command line, such as "mmlu"."""
        ...

    @property
    def subsets(self) -> Sequence[str]:
        """In the order of the results; ("",) where there are none."""
        ...

    @property
    def averages(self) -> Sequence[Average]:
        """The rows above the subsets; the first is the number of the model card."""
        ...

    @property
    def needs_programs(self) -> bool:
        """Whether scoring runs what the model wrote."""
        ...

    def files(self, subset: str) -> Sequence[str]:
        """The data files that a subset is made of, relative to the data folder."""
        ...

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """The items of a subset in the order of the file. Raises DataError for missing or damaged files."""
        ...

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """The verdict on what a model generated, or on the label it chose.

        run: needed where `needs_programs`, or EvalError is raised.
        """
        ...


def choose(logprobs: Mapping[str, float]) -> str:
    """The most likely label; on a tie the first one, as OpenCompass has it.

    logprobs: natural logarithms of whole prompts or of the labels alone, per label. NOTE: OpenCompass compares means
    over tokens, which is the same where all labels are equally many tokens.
    """
    return max(logprobs, key=lambda label: logprobs[label])


def require_runner(item: Item, run: ProgramRunner | None) -> ProgramRunner:
    """The runner, or EvalError where none was given."""
    if run is None:
        raise EvalError(
            f"{item.key} is scored by running a program. Give `run`, such as that of the sandbox."
        )
    return run
