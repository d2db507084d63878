"""Has a model seen a benchmark? The mean loss on its test rows, its training rows and fresh rows of the same kind.

A test set that was not trained on costs as much as fresh text of its kind; training rows that were trained on cost
less. Source: InternLM2 report (arXiv 2403.17297) section 5.4 and table 20; the method: Skywork (arXiv 2310.19341)
section 5.2. The loss is OpenCompass' (configs/datasets/gsm8k_contamination at 3f66a88e): that of question, space and
answer, summed over tokens 2 to n, divided by n with the start id counted, then the mean over rows.
"""

import json
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm2.engine.frontend import Job
from internlm2.engine.llm import LLM
from internlm2.engine.text import Score
from internlm2.errors import RequestError
from internlm2.eval.data.folder import DataError, DataFolder
from internlm2.eval.task import EvalError
from internlm2.log import progress

_WINDOW = 256  # rows in the engine at a time: several times what it runs at once


@dataclass(frozen=True)
class SetLoss:
    """The mean loss on one set of rows, in nats per token. standard_error: None where there is one row only.

    n: rows. file, sha256: where they come from.
    """

    loss: float
    standard_error: float | None
    n: int
    file: str
    sha256: str


@dataclass(frozen=True)
class Difference:
    """Of two mean losses. standard_error: None where one of theirs is."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Contamination:
    """What the check found. reference is None where no reference set was given."""

    model: str
    test: SetLoss
    train: SetLoss
    reference: SetLoss | None

    @property
    def leak(self) -> Difference | None:
        """Test minus reference: clearly below 0, the test rows are known."""
        return None if self.reference is None else _difference(self.test, self.reference)

    @property
    def overfit(self) -> Difference:
        """Test minus train: clearly above 0, the training rows are known."""
        return _difference(self.test, self.train)


@dataclass(frozen=True)
class PublishedLoss:
    """A row of table 20 of the report, whose reference set was written by GPT-4 (Skywork/mock_gsm8k_test)."""

    model: str
    test: float
    train: float
    reference: float


PUBLISHED = (
    PublishedLoss("InternLM2-7B-Base", 1.73, 1.75, 1.64),
    PublishedLoss("InternLM2-7B", 1.48, 1.14, 1.46),
    PublishedLoss("InternLM2-20B-Base", 1.66, 1.67, 1.58),
    PublishedLoss("InternLM2-20B", 1.52, 1.17, 1.48),
)


@dataclass(frozen=True)
class TextSet:
    """The texts of a file of rows."""

    texts: tuple[str, ...]
    file: str
    sha256: str


def read_texts(path: Path, *, limit: int | None = None, seed: int = 0) -> TextSet:
    """Read JSON lines with "question" and "answer", as GSM8K has them, or with "text".

    limit: at most so many rows, drawn with `seed`. Raises DataError for missing or damaged files and other rows.
    """
    if limit is not None and limit < 1:
        raise EvalError(f"limit is {limit}, but must be at least 1, or left out for all rows.")
    folder = DataFolder(path.parent)
    content = folder.text(path.name) if path.is_file() else None
    if content is None:
        raise DataError(
            f"There is no file {path}. Give a file of JSON lines with question and answer, or text."
        )
    texts = tuple(_text(path, n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip())
    if not texts:
        raise DataError(f"{path} is empty. Give a file of JSON lines with question and answer, or text.")
    if limit is not None and limit < len(texts):
        chosen = sorted(random.Random(seed).sample(range(len(texts)), limit))
        texts = tuple(texts[n] for n in chosen)
    return TextSet(texts, str(path), folder.sha256[path.name])


def _text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged at line {number}: {error}. Get it again.") from error
    fields = row if isinstance(row, dict) else {}
    values = [fields.get("text")] if "text" in fields else [fields.get("question"), fields.get("answer")]
    parts = [value for value in values if isinstance(value, str) and value]
    if len(parts) != len(values):
        raise DataError(
            f"{path}, line {number}: the row has neither question and answer nor text. Rename its fields."
        )
    return " ".join(parts)


def check_contamination(
    llm: LLM,
    *,
    name: str,
    test: TextSet,
    train: TextSet,
    reference: TextSet | None = None,
    adapter: str | None = None,
) -> Contamination:
    """Measure the losses. name: of the model. Raises EvalError for a row that is longer than the model takes."""
    sets = [test, train, *([] if reference is None else [reference])]
    with progress("Reading", total=sum(len(one.texts) for one in sets), unit="rows") as bar:
        found: list[SetLoss] = []
        for one in sets:
            losses: list[float] = []
            for loss in text_losses(llm, one, adapter=adapter):
                losses.append(loss)
                bar.advance(1)
            found.append(_mean(losses, one))
    return Contamination(name, found[0], found[1], found[2] if reference is not None else None)


def text_losses(llm: LLM, texts: TextSet, *, adapter: str | None = None) -> Iterator[float]:
    """The loss of each text, in order."""
    begun: deque[tuple[int, Job[list[Score]]]] = deque()

    def read() -> float:
        num_tokens, job = begun.popleft()
        (score,) = llm.frontend.finish(job)
        return -score.logprob / num_tokens

    try:
        for number, text in enumerate(texts.texts, 1):
            ids = llm.encode(text)
            if len(ids) < 2:
                raise EvalError(
                    f"Text {number} of {texts.file} has one token only, which has no loss. Remove it."
                )
            try:
                begun.append((len(ids), llm.begin_score([ids[:1]], [ids[1:]], adapter=adapter)))
            except RequestError as error:
                raise EvalError(f"Text {number} of {texts.file}: {error}") from error
            if len(begun) >= _WINDOW:
                yield read()
        while begun:
            yield read()
    finally:
        for _, job in begun:
            for ticket in job.tickets:
                llm.frontend.abort(ticket)


def _mean(losses: Sequence[float], texts: TextSet) -> SetLoss:
    n = len(losses)
    mean = math.fsum(losses) / n
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / (n - 1) if n > 1 else None
    error = None if variance is None else math.sqrt(variance / n)
    return SetLoss(mean, error, n, texts.file, texts.sha256)


def _difference(first: SetLoss, second: SetLoss) -> Difference:
    errors = (first.standard_error, second.standard_error)
    if errors[0] is None or errors[1] is None:
        return Difference(first.loss - second.loss, None)
    return Difference(first.loss - second.loss, math.hypot(errors[0], errors[1]))


def as_text(found: Contamination) -> str:
    """The table of the report, with what was found in its first row and the published rows behind it."""
    head = ["model", "test", "train", "reference", "test - reference", "test - train"]
    own = [
        found.model,
        *(_cell(one.loss, one.standard_error) for one in (found.test, found.train)),
        "-" if found.reference is None else _cell(found.reference.loss, found.reference.standard_error),
        "-" if found.leak is None else _cell(found.leak.value, found.leak.standard_error),
        _cell(found.overfit.value, found.overfit.standard_error),
    ]
    rows = [
        [
            f"report: {one.model}", f"{one.test:.2f}", f"{one.train:.2f}", f"{one.reference:.2f}",
            f"{one.test - one.reference:.2f}", f"{one.test - one.train:.2f}",
        ]
        for one in PUBLISHED
    ]  # fmt: skip
    widths = [max(len(row[n]) for row in (head, own, *rows)) for n in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, own, *rows)
    ]
    sets = (("test", found.test), ("train", found.train), ("reference", found.reference))
    files = [f"{name}: {one.n} rows of {one.file}" for name, one in sets if one is not None]
    meaning = [
        "Loss in nats per token, mean over rows ± standard error. test - reference clearly below 0: the test rows are "
        "known.",
        "test - train clearly above 0: the training rows are known. The report's rows are of GSM8K.",
    ]
    return "\n".join([*lines, "", *files, *meaning])


def _cell(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
