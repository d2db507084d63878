"""The results of a needle test as a heat map needs them: a score for each length and depth."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from internlm2.eval.tasks.long.needle import Cell
from internlm2.eval.tasks.long.needle_forms import FORMS


class Scored(Protocol):
    """A mean of a subset, such as `results.Row`."""

    @property
    def percent(self) -> float:
        """From 0 to 100."""
        ...

    @property
    def n(self) -> int:
        """Over how many prompts."""
        ...


@dataclass(frozen=True)
class GridRow:
    """One cell. length: in tokens of the protocol. depth: in percent. score: from 0 to 100. n: prompts."""

    language: str
    length: int
    depth: int
    score: float
    n: int


def is_grid(task: str) -> bool:
    """Whether the subsets of a task are the cells of a heat map."""
    return task in FORMS


def grid(subsets: Mapping[str, Scored]) -> list[GridRow]:
    """A row for each cell that has been asked, by language, length and depth.

    subsets: of the results of a needle test, such as `Results.tasks["needle"].subsets`.
    """
    cells = ((Cell.of(name), row) for name, row in subsets.items())
    rows = [GridRow(cell.language, cell.length, cell.depth, row.percent, row.n) for cell, row in cells]
    return sorted(rows, key=lambda row: (row.language, row.length, row.depth))
