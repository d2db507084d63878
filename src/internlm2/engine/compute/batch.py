"""One step as the network sees it: the new tokens of several sequences, packed, and where their keys and values lie."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Span:
    """The rows of one sequence in a batch.

    start: its first row. num_rows: how many. first_position: the position of its first row. runs: the pieces of
    memory that hold positions 0 ... first_position + num_rows - 1, in order, as (first slot, number of tokens).
    """

    start: int
    num_rows: int
    first_position: int
    runs: tuple[tuple[int, int], ...]

    @property
    def num_keys(self) -> int:
        """Keys that its last row can see."""
        return self.first_position + self.num_rows


@dataclass(frozen=True)
class Batch:
    """input_ids, positions, limits, slots: (N,) int64 on the device. limits: see `rope.inverse_frequencies`.

    spans: the rows of each sequence, in order. adapters: (first row, end row, name) for rows with a LoRA adapter.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    limits: torch.Tensor
    slots: torch.Tensor
    spans: tuple[Span, ...]
    adapters: tuple[tuple[int, int, str], ...] = ()

    @cached_property
    def first_slot(self) -> int | None:
        """The first slot when a single sequence writes one piece of memory, else None."""
        if len(self.spans) != 1:
            return None
        slots = self.slots.tolist()
        # NOTE: all of them, for pages 5, 9, 2, 8 begin and end as 5, 6, 7, 8 do.
        return slots[0] if slots == list(range(slots[0], slots[0] + len(slots))) else None


@dataclass(frozen=True)
class Part:
    """What a batch needs to know of one sequence. token_ids: the new ones. limits: one for each, or one for all."""

    token_ids: Sequence[int]
    first_position: int
    page_ids: Sequence[int]
    limits: int | Sequence[int]
    adapter: str | None = None


def make_batch(parts: Iterable[Part], *, page_size: int, device: torch.device) -> Batch:
    """Pack the parts of a step."""
    ids: list[int] = []
    positions: list[int] = []
    limits: list[int] = []
    slots: list[int] = []
    spans: list[Span] = []
    adapters: list[tuple[int, int, str]] = []
    for part in parts:
        start, count, first = len(ids), len(part.token_ids), part.first_position
        ids += part.token_ids
        positions += range(first, first + count)
        limits += [part.limits] * count if isinstance(part.limits, int) else part.limits
        pages = part.page_ids
        slots += [pages[p // page_size] * page_size + p % page_size for p in range(first, first + count)]
        spans.append(Span(start, count, first, runs_of(pages, first + count, page_size)))
        if part.adapter is not None:
            adapters.append((start, start + count, part.adapter))
    packed = torch.tensor([ids, positions, limits, slots], dtype=torch.int64).to(device)
    input_ids, position_ids, limit_ids, slot_ids = packed.unbind()
    return Batch(input_ids, position_ids, limit_ids, slot_ids, tuple(spans), tuple(adapters))


def runs_of(page_ids: Sequence[int], num_tokens: int, page_size: int) -> tuple[tuple[int, int], ...]:
    """The pages of the first `num_tokens` tokens as pieces of memory: (first slot, number of tokens)."""
    num_pages = -(-num_tokens // page_size)
    runs: list[tuple[int, int]] = []
    first = 0
    for index in range(1, num_pages + 1):
        if index == num_pages or page_ids[index] != page_ids[index - 1] + 1:
            runs.append((page_ids[first] * page_size, (index - first) * page_size))
            first = index
    slot, count = runs[-1]
    runs[-1] = (slot, count - (num_pages * page_size - num_tokens))
    return tuple(runs)
