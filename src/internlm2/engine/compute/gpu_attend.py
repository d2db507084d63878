"""Attention over pages on a GPU: rows that decode by their page tables, prompts by torch's kernels on gathered keys."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from internlm2.engine.compute.batch import Batch, Span
from internlm2.engine.compute.page_cache import PageCache
from internlm2.kernels.gpu.attention import LayerPages, attend_rows
from internlm2.kernels.gpu.prefill import Prompt, attend_prompts, method_for
from internlm2.quant import kv

FEW_ROWS = 8  # a sequence with at most so many new rows reads its pages row by row


class AttendLayer(Protocol):
    """Attention of one batch: q (N, H, D) over the pages of a layer, which hold the rows' own keys -> (N, H, D)."""

    def __call__(self, q: torch.Tensor, pages: LayerPages, *, scale: float) -> torch.Tensor: ...


def layer_pages(cache: PageCache, layer: int) -> LayerPages:
    """One layer of the cache as the kernels take it."""
    scales = (cache.key_scales[layer], cache.value_scales[layer]) if cache.is_int8 else ()
    return LayerPages(cache.keys[layer], cache.values[layer], cache.page_size, *scales)


def pages_of(span: Span, page_size: int) -> tuple[tuple[int, int], ...]:
    """The pages of a sequence, as (first page, number of pages)."""
    return tuple((slot // page_size, -(-count // page_size)) for slot, count in span.runs)


def fill_row(row: torch.Tensor, pages: Iterable[tuple[int, int]]) -> None:
    """Write the pages of a sequence into its row of a table. row: (W,) int32 on the CPU."""
    at = 0
    for first, count in pages:
        torch.arange(first, first + count, dtype=torch.int32, out=row[at : at + count])
        at += count


def num_pages_of(spans: Sequence[Span], page_size: int) -> int:
    """The most pages that a sequence has."""
    return max((-(-span.num_keys // page_size) for span in spans), default=0)


class TableAttend:
    """Every row reads the pages of its line of a table. table: (N, W) int32. lengths: (N,) int32."""

    def __init__(self, table: torch.Tensor, lengths: torch.Tensor) -> None:
        self._table, self._lengths = table, lengths

    def __call__(self, q: torch.Tensor, pages: LayerPages, *, scale: float) -> torch.Tensor:
        """See AttendLayer."""
        return attend_rows(q, pages, self._table, self._lengths, scale=scale)


class BatchAttend:
    """Attention of any batch; one object serves all layers of one forward pass."""

    def __init__(self, batch: Batch, *, page_size: int) -> None:
        device = batch.slots.device
        few = [span for span in batch.spans if span.num_rows <= FEW_ROWS]
        self._prompts = _Prompts([span for span in batch.spans if span.num_rows > FEW_ROWS], device)
        self._has_prompts = len(few) < len(batch.spans)
        rows = [row for span in few for row in range(span.start, span.start + span.num_rows)]
        self._rows = torch.tensor(rows, dtype=torch.int64).to(device)
        table = torch.zeros(len(rows), num_pages_of(few, page_size), dtype=torch.int32)
        at = 0
        for span in few:
            fill_row(table[at], pages_of(span, page_size))
            table[at + 1 : at + span.num_rows] = table[at]
            at += span.num_rows
        lengths = (batch.positions[self._rows] + 1).to(torch.int32)
        self._few = TableAttend(table.to(device), lengths) if few else None

    def __call__(self, q: torch.Tensor, pages: LayerPages, *, scale: float) -> torch.Tensor:
        """See AttendLayer."""
        if self._few is not None and not self._has_prompts:
            return self._few(q, pages, scale=scale)
        out = torch.empty_like(q)
        if self._few is not None:
            out[self._rows] = self._few(q[self._rows], pages, scale=scale)
        self._prompts.attend(q, out, pages, scale=scale)
        return out


class _Prompts:
    """The sequences with many new rows: all their keys are brought together, and torch attends."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self._prompts = [Prompt(span.start, span.num_rows, span.num_keys) for span in spans]
        runs = [run for span in spans for run in span.runs]
        # A single piece of memory is read where it lies.
        self._keys: slice | torch.Tensor = slice(0, 0)
        if len(runs) == 1:
            self._keys = slice(runs[0][0], runs[0][0] + runs[0][1])
        elif runs:
            self._keys = torch.cat([torch.arange(slot, slot + count) for slot, count in runs]).to(device)
        rows = [slice(prompt.start, prompt.start + prompt.num_rows) for prompt in self._prompts]
        self._row_slices = rows

    def attend(self, q: torch.Tensor, out: torch.Tensor, pages: LayerPages, *, scale: float) -> None:
        """Fill the rows of the prompts in `out` (N, H, D)."""
        if not self._prompts:
            return
        keys, values = pages.keys[self._keys], pages.values[self._keys]
        if pages.key_scales is not None and pages.value_scales is not None:
            keys = kv.dequantize(keys, pages.key_scales[self._keys], q.dtype)
            values = kv.dequantize(values, pages.value_scales[self._keys], q.dtype)
        own = [q[rows] for rows in self._row_slices]
        joined = own[0] if len(own) == 1 else torch.cat(own)
        found = attend_prompts(joined, keys, values, self._prompts, scale=scale, method=method_for(q))
        for rows, part in zip(self._row_slices, found.split([len(x) for x in own]), strict=True):
            out[rows] = part
