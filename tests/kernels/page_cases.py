"""Random keys and values in scattered pages, with the queries of a mixed batch."""

from dataclasses import dataclass

import torch

from internlm2.kernels.attention import Pages, PageTable

PAGE = 16
PAIRS = [  # dtypes of queries, and of keys and values
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8),
]
SHAPES = [(2, 3, 64), (1, 2, 128), (3, 1, 80), (2, 2, 20), (1, 5, 6), (2, 1, 34), (1, 13, 96)]  # K, G, D
MIXED = [(1, 700), (33, 0), (1, 0), (5, 300), (70, 250), (1, 63), (2, 63)]  # rows, first position


@dataclass(frozen=True)
class Case:
    """pages and q of a batch. sequences: first row, rows, first position and all slots of each."""

    pages: Pages
    table: PageTable
    q: torch.Tensor
    sequences: list[tuple[int, int, int, list[int]]]

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def part(self, index: int, first: int, count: int) -> "tuple[PageTable, torch.Tensor]":
        """Rows [first, first + count) of one sequence as a batch of their own."""
        start, _, position, slots = self.sequences[index]
        seen = position + first + count
        table = PageTable(
            self.pages,
            [(0, count, position + first, runs_of(slots[:seen]))],
            torch.tensor(slots[seen - count : seen]),
        )
        return table, self.q[start + first : start + first + count]


def runs_of(slots: list[int]) -> list[tuple[int, int]]:
    """Slots as (first, count), joined where they follow each other."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and sum(runs[-1]) == slot:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return runs


def random_pages(kv_dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Pages:
    """Pages full of normal values; shape: (layers, slots, K, D)."""
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    if kv_dtype != torch.int8:
        return Pages(keys.to(kv_dtype), values.to(kv_dtype))
    scales = [x.abs().amax(-1) / 127 for x in (keys, values)]
    packed = [(x / s[..., None]).round().to(torch.int8) for x, s in zip((keys, values), scales, strict=True)]
    return Pages(*packed, *scales)


def random_case(
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, int, int],
    rows: list[tuple[int, int]],
    *,
    seed: int = 0,
) -> Case:
    """dtypes: of queries and of keys and values. shape: K, G, D. rows: (rows, first position) of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads, group, head_dim = shape
    counts = [-(-(first + num) // PAGE) for num, first in rows]
    num_pages = sum(counts) + 3
    pages = random_pages(dtypes[1], (2, num_pages * PAGE, num_kv_heads, head_dim), generator)
    ids = torch.randperm(num_pages, generator=generator).tolist()
    sequences: list[tuple[int, int, int, list[int]]] = []
    start = 0
    for (num, first), count in zip(rows, counts, strict=True):
        own = [ids.pop() for _ in range(count)]
        slots = [own[p // PAGE] * PAGE + p % PAGE for p in range(first + num)]
        sequences.append((start, num, first, slots))
        start += num
    spans = [(start, num, first, runs_of(slots)) for start, num, first, slots in sequences]
    new = torch.tensor([slot for _, _, first, slots in sequences for slot in slots[first:]])
    q = torch.randn(start, num_kv_heads * group, head_dim, generator=generator).to(dtypes[0])
    return Case(pages, PageTable(pages, spans, new), q, sequences)
