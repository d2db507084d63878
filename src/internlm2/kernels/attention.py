"""Attention over keys and values that lie in pages, and writing them there: one call for all rows of a batch.

The C++ (`cpu/attention.cpp`) reads pages in place; the twin (`attention_twin.py`) gathers them.
"""

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from internlm2.kernels.attention_twin import attend_twin, write_twin
from internlm2.kernels.library import CPages, library

ELEMENTS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}  # numbered as in layout.h
LONGEST_HEAD = 1024
_SPAN_NUMBERS = 5


@dataclass(frozen=True, eq=False)
class Pages:
    """The memory of keys and values, of all layers.

    keys, values: (layers, slots, K, D) bfloat16, float32 or int8 on the CPU, contiguous. key_scales, value_scales:
    (layers, slots, K) float32 for int8, else None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None
    c_struct: CPages = field(init=False, repr=False)
    pointer: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        layers, slots, heads, dim = self.keys.shape
        assert self.values.shape == self.keys.shape
        assert self.values.dtype == self.keys.dtype
        assert self.keys.is_contiguous()
        assert self.values.is_contiguous()
        assert dim <= LONGEST_HEAD
        assert (self.keys.dtype == torch.int8) == (self.key_scales is not None)
        for scales in (self.key_scales, self.value_scales):
            assert scales is None or (scales.shape == (layers, slots, heads) and scales.is_contiguous())
        struct = CPages(
            keys=self.keys.data_ptr(),
            values=self.values.data_ptr(),
            key_scales=None if self.key_scales is None else self.key_scales.data_ptr(),
            value_scales=None if self.value_scales is None else self.value_scales.data_ptr(),
            num_slots=slots,
            num_layers=layers,
            num_kv_heads=heads,
            head_dim=dim,
            element=ELEMENTS[self.keys.dtype],
        )
        object.__setattr__(self, "c_struct", struct)
        object.__setattr__(self, "pointer", ctypes.addressof(struct))

    @staticmethod
    def takes(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
        """Whether keys and values of this kind can be these."""
        return dtype in ELEMENTS and device.type == "cpu" and head_dim <= LONGEST_HEAD


class PageTable:
    """The rows of a batch, and where the keys of each sequence lie; checked once, used by all layers.

    spans: for each sequence its first row, number of rows, the position of the first one, and the pieces of memory
    that hold all its positions up to the last row's, in order, as (first slot, number of tokens). slots: (N,) int64,
    where each row's own key goes.
    """

    def __init__(
        self,
        pages: Pages,
        spans: Iterable[tuple[int, int, int, Sequence[tuple[int, int]]]],
        slots: torch.Tensor,
    ) -> None:
        assert slots.dtype == torch.int64
        assert slots.device.type == "cpu"
        self.slots = slots.contiguous()
        self.num_rows = len(slots)
        numbers, runs = array("q"), array("q")
        num_slots = pages.keys.shape[1]
        next_row = 0
        for start, num_rows, first_position, pieces in spans:
            assert start == next_row, "spans lie side by side"
            assert num_rows >= 1
            assert first_position >= 0
            next_row += num_rows
            numbers.extend((start, num_rows, first_position, len(runs) // 2, len(pieces)))
            position = 0
            for slot, count in pieces:
                assert 0 <= slot <= num_slots - count, f"slots {slot}+{count} of {num_slots}"
                assert count >= 1
                runs.extend((position, slot))
                position += count
            assert position == first_position + num_rows, "the pieces hold every position and no more"
            runs.extend((position, 0))
        assert next_row == self.num_rows
        if self.num_rows:
            low, high = torch.aminmax(self.slots)
            assert int(low) >= 0
            assert int(high) < num_slots
        self.num_spans = len(numbers) // _SPAN_NUMBERS
        self.numbers, self.runs = numbers, runs
        self.spans_pointer, self.runs_pointer = numbers.buffer_info()[0], runs.buffer_info()[0]


def attend(
    pages: Pages,
    table: PageTable,
    layer: int,
    q: torch.Tensor,
    *,
    scale: float,
    num_threads: int | None = None,
) -> torch.Tensor:
    """q: (N, H, D) bfloat16 or float32 -> the same. Row t of a sequence sees its keys up to its own position.

    Softmax and sums are float32. A row of the result does not depend on the other rows, on how the rows of a sequence
    were cut into batches, nor on the number of threads, bit by bit. num_threads: default torch.get_num_threads().
    """
    num_rows, num_heads, head_dim = q.shape
    assert num_rows == table.num_rows
    assert head_dim == pages.keys.shape[3]
    assert num_heads % pages.keys.shape[2] == 0
    assert 0 <= layer < pages.keys.shape[0]
    assert q.dtype in (torch.bfloat16, torch.float32)
    built = library()
    if built is None:
        return attend_twin(pages, table, layer, q, scale=scale)
    q = q.contiguous()
    out = torch.empty_like(q)
    failed = built.attend(
        pages.pointer,
        layer,
        table.spans_pointer,
        table.num_spans,
        table.runs_pointer,
        q.data_ptr(),
        out.data_ptr(),
        ELEMENTS[q.dtype],
        num_heads,
        scale,
        num_threads or torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"No memory for attention of {num_rows} rows.")
    return out


def write(pages: Pages, table: PageTable, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Put keys and values (N, K, D) of every row of `table` into their slots; int8 is rounded as `quant.kv` does."""
    assert k.shape == v.shape == (table.num_rows, *pages.keys.shape[2:]), (k.shape, v.shape)
    assert k.dtype == v.dtype
    assert k.dtype in (torch.bfloat16, torch.float32)
    assert 0 <= layer < pages.keys.shape[0]
    built = library()
    if built is None:
        write_twin(pages, table, layer, k, v)
        return
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    size = k.element_size()
    built.write(
        pages.pointer,
        layer,
        table.slots.data_ptr(),
        table.num_rows,
        k.data_ptr(),
        v.data_ptr(),
        ELEMENTS[k.dtype],
        k.stride(0) * size,
        k.stride(1) * size,
        v.stride(0) * size,
        v.stride(1) * size,
        torch.get_num_threads(),
    )
