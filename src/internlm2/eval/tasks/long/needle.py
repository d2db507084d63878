"""A needle in a haystack: one sentence hidden in up to 200,000 tokens of other text, and a question about it.

A subset is a cell of the grid, "LENGTH-DEPTH" (NeedleBench: "LANGUAGE-LENGTH-DEPTH"), as OpenCompass has it; an item is
a repeat. Prompts are written when they are asked: planning all 40,000 of them takes seconds and no room.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

from internlm2.eval import overlap
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.data.published import published_files
from internlm2.eval.profile import Profile
from internlm2.eval.task import (
    Average,
    ChatPrompt,
    Item,
    LongPrompt,
    ProgramRunner,
    TextPrompt,
    Turn,
    Verdict,
)
from internlm2.eval.tasks.long.haystack import (
    Haystack,
    Placed,
    place_at,
    place_behind_sentence,
    place_several,
)
from internlm2.eval.tasks.long.needle_forms import ESSAYS, FORMS, NEEDLES, Form, Language, Needle, guided
from internlm2.eval.tasks.long.tokens import GPT4, Counter, GPT4Counter, ModelCounter
from internlm2.eval.template import ASSISTANT, USER, chat_prompt, text_prompt

MAX_TOKENS = 512
MAX_TOKENS_EN = 300
_EN_SYSTEM = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct"
_EN_QUESTION = "{question} Don't give information outside the document or repeat your findings"


@dataclass(frozen=True)
class Cell:
    """A place in the grid. language: "" where a test has one only."""

    length: int
    depth: int
    language: str = ""

    @property
    def name(self) -> str:
        """As the subset is called."""
        return "-".join(part for part in (self.language, str(self.length), str(self.depth)) if part)

    @staticmethod
    def of(name: str) -> "Cell":
        """The cell that a subset's name means."""
        *language, length, depth = name.split("-")
        return Cell(int(length), int(depth), "".join(language))


@dataclass(frozen=True)
class _Hidden:
    """A needle and its tokens."""

    needle: Needle
    tokens: list[list[int]]


@dataclass(frozen=True)
class _Loaded:
    """What a data folder holds for a test, read once; by language, and needles by repeat."""

    data: DataFolder
    haystacks: dict[str, Haystack]
    hidden: dict[str, list[_Hidden]]
    digest: str


@dataclass(frozen=True)
class NeedleTest:
    """One of `FORMS`. See `Task`."""

    name: str
    profile: Profile
    is_chat: bool
    needs_programs: bool = False
    _loaded: list[_Loaded] = field(default_factory=list, compare=False, repr=False)

    @property
    def form(self) -> Form:
        """Its grid and its words."""
        return FORMS[self.name]

    @property
    def _is_mended(self) -> bool:
        return "needle" in self.profile.mends

    @cached_property
    def subsets(self) -> Sequence[str]:
        """The cells: every length at every depth."""
        form = self.form
        return tuple(
            Cell(length, depth, language).name
            for language in form.languages
            for length in form.lengths
            for depth in form.depths
        )

    @cached_property
    def averages(self) -> Sequence[Average]:
        """All cells alike, then each language and each length."""
        form = self.form
        rows = [Average(self.name, tuple(self.subsets))]
        for language in form.languages:
            label = f"{self.name}-{language}" if language else self.name
            if language:
                own = tuple(name for name in self.subsets if name.startswith(f"{language}-"))
                rows.append(Average(label, own))
            for length in form.lengths:
                cells = tuple(Cell(length, depth, language).name for depth in form.depths)
                rows.append(Average(f"{label}-{length}", cells))
        return rows

    def files(self, subset: str) -> Sequence[str]:
        """The haystack; with the card's profiles the vocabulary of GPT-4; NeedleBench's needles.

        A model's tokenizer may be either of two files: its hash is part of that of the prompts instead.
        """
        haystack = self.form.languages[Cell.of(subset).language].haystack
        names = [*_essays()] if haystack == ESSAYS else [haystack]
        names += [] if self._is_mended else [GPT4]
        return (*names, *([NEEDLES] if self.form.needle is None else []))

    # -- prompts ------------------------------------------------------------------------------------------------

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`. fields: length, depth and keyword. Raises EvalError for a haystack that is too short."""
        cell, form, loaded = Cell.of(subset), self.form, self._load(data)
        haystack = loaded.haystacks[cell.language]
        shared = {"length": str(cell.length), "depth": str(cell.depth)}
        for repeat, hidden in enumerate(loaded.hidden[cell.language]):
            needle = hidden.needle
            if form.kind != "words":  # those essays are repeated
                haystack.check(self._count(hidden, cell))
            recipe = f"{self.name} {subset}:{repeat} of {loaded.digest}"
            write = partial(self._write, haystack, hidden, cell, repeat)
            fields = shared | {"keyword": needle.keyword} if needle.keyword else shared
            yield Item(
                self.name, subset, repeat, needle.answer, LongPrompt(write, recipe),
                max_tokens=MAX_TOKENS_EN if form.kind == "words" else MAX_TOKENS, fields=fields, is_long=True,
            )  # fmt: skip

    def _load(self, data: DataFolder) -> _Loaded:
        if not self._loaded or self._loaded[0].data is not data:
            counter: Counter = ModelCounter(data) if self._is_mended else GPT4Counter(data)
            longest = max(self.form.lengths)
            haystacks: dict[str, Haystack] = {}
            hidden: dict[str, list[_Hidden]] = {}
            digest = hashlib.sha256(
                f"{counter.name}\0{self.form}\0{self.is_chat}\0{self._is_mended}".encode()
            )
            for key, language in self.form.languages.items():
                texts = _texts(data, language.haystack)
                for text in texts:
                    digest.update(f"{len(text)}\0{text}".encode())
                haystacks[key] = Haystack(language.haystack, texts, counter, max_tokens=longest)
                needles = self._needles(data, language)
                digest.update(repr(needles).encode())
                hidden[key] = [_Hidden(one, [counter.encode(text) for text in one.texts]) for one in needles]
            self._loaded[:] = [_Loaded(data, haystacks, hidden, digest.hexdigest()[:16])]
        return self._loaded[0]

    def _needles(self, data: DataFolder, language: Language) -> list[Needle]:
        """The needle of each repeat; NeedleBench draws it with the repeat as seed."""
        form = self.form
        if form.needle is not None:
            return [form.needle] * form.num_repeats
        names = ("language", "needle", "retrieval_question", "arg2")
        rows = [row for row in data.rows(NEEDLES, names) if row["language"] == language.language]
        if not rows:
            raise data.damaged(NEEDLES, f"it holds no needle in {language.language}")
        drawn = [random.Random(repeat).choice(rows) for repeat in range(form.num_repeats)]
        return [
            Needle((text := f"\n{row['needle']}\n",), str(row["retrieval_question"]), text, str(row["arg2"]))
            for row in drawn
        ]

    def _count(self, hidden: _Hidden, cell: Cell) -> int:
        """How many tokens of the haystack a cell has."""
        buffer = self.form.languages[cell.language].buffer
        return max(0, cell.length - buffer - sum(map(len, hidden.tokens)))

    def _place(self, haystack: Haystack, hidden: _Hidden, cell: Cell, repeat: int) -> Placed:
        count = self._count(hidden, cell)
        if self.form.kind == "words":
            # a tokenizer may spell a full stop behind a word otherwise than one that stands alone
            counter = haystack.counter
            full_stops = frozenset((*counter.encode("."), counter.encode("end.")[-1]))
            tokens = haystack.repeated()[:count]
            return place_behind_sentence(tokens, hidden.tokens[0], cell.depth, full_stops)
        tokens = haystack.row(repeat)[:count]
        if len(hidden.tokens) == 1:
            return place_at(tokens, hidden.tokens[0], cell.depth)
        return place_several(tokens, hidden.tokens, cell.depth, self.form.step)

    def _write(self, haystack: Haystack, hidden: _Hidden, cell: Cell, repeat: int) -> TextPrompt | ChatPrompt:
        needle, language = hidden.needle, self.form.languages[cell.language]
        context = haystack.counter.decode(self._place(haystack, hidden, cell, repeat).tokens)
        if self.form.kind == "words":
            words = (_EN_SYSTEM, context, _EN_QUESTION.replace("{question}", needle.question))
            turns = [Turn(USER, text) for text in words]
            return chat_prompt(turns) if self.is_chat else text_prompt(turns)
        before, after = language.prompt.split("{context}")
        text = before + context + after.replace("{question}", guided(needle.question, language))
        if self.form.needle is None:  # rounds, with an answer that is only begun
            turns = [Turn(USER, text), Turn(ASSISTANT, "\n")]
            return chat_prompt(turns) if self.is_chat else text_prompt(turns)
        # NOTE: in January the prompt was a plain string, which also chat models were given as it is.
        is_turn = self.is_chat and self._is_mended
        return ChatPrompt((), (Turn(USER, text),)) if is_turn else TextPrompt("", text)

    # -- verdicts -----------------------------------------------------------------------------------------------

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`. The model's answer is never cut: words around a right answer cost points in January."""
        keyword = item.fields.get("keyword", "")
        if self.form.kind == "words":
            gold, words = set(overlap.plain_words(item.gold)), set(overlap.plain_words(output))
            return Verdict(len(gold & words) / len(gold), " ".join(sorted(gold & words)))
        similarity = overlap.edit_similarity(output, item.gold)
        detail = f"similarity {100 * similarity:.1f}"
        if self.form.kind == "edit" and not self._is_mended:
            return Verdict(similarity, output.strip(), detail)
        if keyword in output or keyword in "".join(output.split()):
            return Verdict(1.0, keyword, detail)
        return Verdict(0.2 * similarity, "", detail)


def _texts(data: DataFolder, name: str) -> list[str]:
    """The texts of a haystack: the field `text` of each row, or all essays as one text, by name."""
    if name != ESSAYS:
        return [str(row["text"]) for row in data.rows(name, ("text",))]
    return ["".join(data.text(essay) for essay in _essays())]


@cache
def _essays() -> tuple[str, ...]:
    return tuple(sorted(file.name for file in published_files() if file.benchmark == "needle_en"))
