"""Weights as the kernels read them: blocks of 32 rows, interleaved word by word (the picture is in cpu/layout.h).

Packing is a transposition of 32-bit words, so one way serves all kinds: a word holds 2 bf16, 4 int8 or 8 int4 columns
of a row. The memory lies on 2 MiB pages where the system gives them: with 4 KiB pages, reading is about 15 % slower.
"""

import ctypes
import mmap
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from internlm2.kernels.library import CWeight

Kind = Literal["bfloat16", "int8", "int4"]
KINDS: tuple[Kind, ...] = ("bfloat16", "int8", "int4")  # numbered as in layout.h
BLOCK_ROWS = 32
COLUMN_MULTIPLE = 32
MAX_GROUP = 256
HUGE_PAGE_BYTES = 2 << 20
_COLUMNS_PER_WORD = {"bfloat16": 2, "int8": 4, "int4": 8}
_ROWS_AT_ONCE = 4096  # of packing and unpacking, so that copies stay small


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight matrix ready for `linear`. Immutable; a copy of it shares the memory.

    rows, columns: of the matrix; a gated one holds twice the rows (w1 and w3 in turns, 16 by 16). group: columns that
    share a scale; 0 for bfloat16. data: (bytes,) uint8. scales: (blocks, groups, 32) bfloat16. zeros: the same shape,
    uint8, in sixteenths; None: int4 means q - 8. bias: (rows,) float32. activation_bits: 8, or 15 (two products for
    each weight, which costs nothing as long as the memory is the limit); 16 for bfloat16.
    """

    kind: Kind
    rows: int
    columns: int
    group: int
    is_gated: bool
    data: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    activation_bits: int
    c_struct: CWeight = field(init=False, repr=False)
    pointer: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        struct = CWeight(
            data=self.data.data_ptr(),
            scales=_pointer(self.scales),
            zeros=_pointer(self.zeros),
            bias=_pointer(self.bias),
            rows=self.rows,
            columns=self.columns,
            padded_columns=self.padded_columns,
            group=self.group,
            kind=KINDS.index(self.kind),
            is_gated=self.is_gated,
            num_parts=2 if self.activation_bits == 15 else 1,
        )
        object.__setattr__(self, "c_struct", struct)
        object.__setattr__(self, "pointer", ctypes.addressof(struct))

    def __deepcopy__(self, memo: dict[int, object]) -> "PackedWeight":
        return self

    @property
    def padded_columns(self) -> int:
        """Columns with the zeros behind them."""
        return _round_up(self.columns, self.group or COLUMN_MULTIPLE)

    @property
    def num_bytes(self) -> int:
        """What one product reads."""
        tensors = (self.data, self.scales, self.zeros, self.bias)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def pack_bfloat16(
    weight: torch.Tensor, *, gate: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> PackedWeight:
    """weight: (N, C), rounded to bfloat16. gate: (N, C), whose silu multiplies the product with `weight`."""
    rows, columns = weight.shape
    weight = _join(weight.to(torch.bfloat16), None if gate is None else gate.to(torch.bfloat16))
    return PackedWeight(
        kind="bfloat16",
        rows=rows,
        columns=columns,
        group=0,
        is_gated=gate is not None,
        data=_interleave("bfloat16", weight, _round_up(columns, COLUMN_MULTIPLE)),
        scales=None,
        zeros=None,
        bias=_as_bias(bias, rows),
        activation_bits=16,
    )


def pack_int8(
    q: torch.Tensor,
    scales: torch.Tensor,
    *,
    group: int,
    gate: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    activation_bits: int = 8,
) -> PackedWeight:
    """q: (N, C) int8 in [-127, 127]. scales: (N, ceil(C / group)). gate: the same two of the gate."""
    assert q.dtype == torch.int8
    rows, columns = q.shape
    _check_group(group)
    joined = _join(q, None if gate is None else gate[0])
    return PackedWeight(
        kind="int8",
        rows=rows,
        columns=columns,
        group=group,
        is_gated=gate is not None,
        data=_interleave("int8", joined, _round_up(columns, group)),
        scales=_by_block(_join(scales, None if gate is None else gate[1]).to(torch.bfloat16)),
        zeros=None,
        bias=_as_bias(bias, rows),
        activation_bits=_check_bits(activation_bits),
    )


def pack_int4(
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    group: int,
    gate: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
    bias: torch.Tensor | None = None,
    activation_bits: int = 8,
) -> PackedWeight:
    """q: (N, C) uint8 in [0, 15], meaning scale * (q - zero). zeros: (N, ceil(C / group)) uint8 in sixteenths, or
    None where the zero is 8. scales and gate: as in `pack_int8`.
    """
    assert q.dtype == torch.uint8
    rows, columns = q.shape
    _check_group(group)
    gate_q, gate_scales, gate_zeros = (None, None, None) if gate is None else gate
    assert gate is None or (zeros is None) == (gate_zeros is None)
    return PackedWeight(
        kind="int4",
        rows=rows,
        columns=columns,
        group=group,
        is_gated=gate is not None,
        data=_interleave("int4", _join(q, gate_q), _round_up(columns, group)),
        scales=_by_block(_join(scales, gate_scales).to(torch.bfloat16)),
        zeros=None if zeros is None else _by_block(_join(zeros, gate_zeros)),
        bias=_as_bias(bias, rows),
        activation_bits=_check_bits(activation_bits),
    )


def unpack(weight: PackedWeight, first: int = 0, end: int | None = None) -> torch.Tensor:
    """The stored rows [first, end) as float32: (end - first, C). A gated weight has twice `rows` stored rows.

    first: a multiple of 32. What quantisation and rounding left of the matrix that was packed; for tests and the twin.
    """
    stored = _stored_rows(weight)
    end = stored if end is None else min(end, stored)
    assert first % BLOCK_ROWS == 0
    columns, num_groups = weight.padded_columns, weight.padded_columns // (weight.group or COLUMN_MULTIPLE)
    num_words = columns // _COLUMNS_PER_WORD[weight.kind]
    words = weight.data.view(torch.int32).view(-1, num_words, BLOCK_ROWS)
    blocks = slice(first // BLOCK_ROWS, -(-end // BLOCK_ROWS))
    rows = words[blocks].transpose(1, 2).contiguous().view(-1, num_words)[: end - first]
    if weight.kind == "bfloat16":
        return rows.view(torch.bfloat16).float()[:, : weight.columns]
    if weight.kind == "int8":
        values = rows.view(torch.uint8).float() - 128
    else:
        both = rows.view(torch.uint8).view(len(rows), num_words, 1, 4)
        values = torch.cat((both & 15, both >> 4), dim=2).view(len(rows), columns).float()
        zeros = 8.0 if weight.zeros is None else _by_row(weight.zeros[blocks])[: end - first].float() / 16
        values = (values.view(len(rows), num_groups, weight.group) - zeros).view(len(rows), columns)
    assert weight.scales is not None
    scales = _by_row(weight.scales[blocks])[: end - first].float()
    return (values.view(len(rows), num_groups, weight.group) * scales).view(len(rows), columns)[
        :, : weight.columns
    ]


def stored_halves(weight: PackedWeight, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split what was computed for the stored rows of a gated weight, (M, stored), into gate and value, (M, rows)."""
    both = stored.view(len(stored), -1, 2, BLOCK_ROWS // 2)
    gate, value = (both[:, :, i].flatten(1)[:, : weight.rows] for i in range(2))
    return gate, value


def allocate(num_bytes: int) -> torch.Tensor:
    """Zeros, (num_bytes,) uint8, aligned to 64 bytes and on huge pages where they help and the system has them."""
    whole = _round_up(num_bytes, HUGE_PAGE_BYTES)
    if num_bytes < HUGE_PAGE_BYTES // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = torch.zeros(num_bytes + 64, dtype=torch.uint8)
        return memory[-memory.data_ptr() % 64 :][:num_bytes]
    mapped = mmap.mmap(-1, whole + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)  # NOTE: keeps `mapped` alive
    start = -memory.data_ptr() % HUGE_PAGE_BYTES
    mapped.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return memory[start : start + num_bytes]


def _stored_rows(weight: PackedWeight) -> int:
    return _round_up(weight.rows, BLOCK_ROWS // 2) * 2 if weight.is_gated else weight.rows


def _interleave(kind: Kind, weight: torch.Tensor, padded_columns: int) -> torch.Tensor:
    """(rows, columns) -> bytes, in blocks of 32 rows whose words alternate."""
    num_rows = _round_up(len(weight), BLOCK_ROWS)
    num_words = padded_columns // _COLUMNS_PER_WORD[kind]
    data = allocate(num_rows * num_words * 4)
    words = data.view(torch.int32).view(-1, num_words, BLOCK_ROWS)
    for first in range(0, num_rows, _ROWS_AT_ONCE):
        part = weight[first : first + _ROWS_AT_ONCE]
        part = F.pad(part, (0, padded_columns - part.shape[1], 0, -len(part) % BLOCK_ROWS))
        target = words[first // BLOCK_ROWS :][: len(part) // BLOCK_ROWS]
        rows = _words_of_rows(kind, part.contiguous())  # (rows, words) int32
        target.copy_(rows.view(-1, BLOCK_ROWS, num_words).transpose(1, 2))
    return data


def _words_of_rows(kind: Kind, rows: torch.Tensor) -> torch.Tensor:
    if kind == "bfloat16":
        return rows.view(torch.int32)
    if kind == "int8":
        return (rows.view(torch.uint8) ^ 128).view(torch.int32)  # two's complement + 128
    pairs = rows.view(len(rows), -1, 2, 4)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).view(len(rows), -1).view(torch.int32)


def _join(weight: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Rows in the order of storage: with a gate, 16 rows of it and 16 of the weight in turns."""
    if gate is None:
        return weight
    assert gate.shape == weight.shape
    half = BLOCK_ROWS // 2
    both = torch.stack(
        [F.pad(x, (0, 0, 0, -len(x) % half)).view(-1, half, x.shape[1]) for x in (gate, weight)], 1
    )
    return both.flatten(0, 2)


def _by_block(values: torch.Tensor) -> torch.Tensor:
    """(rows, groups) -> (blocks, groups, 32)."""
    padded = F.pad(values, (0, 0, 0, -len(values) % BLOCK_ROWS))
    return padded.view(-1, BLOCK_ROWS, values.shape[1]).transpose(1, 2).contiguous()


def _by_row(values: torch.Tensor) -> torch.Tensor:
    """(blocks, groups, 32) -> (rows, groups, 1)."""
    return values.transpose(1, 2).flatten(0, 1)[..., None]


def _as_bias(bias: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    assert bias is None or bias.shape == (rows,)
    return None if bias is None else bias.detach().float().contiguous()


def _check_group(group: int) -> None:
    assert group % COLUMN_MULTIPLE == 0, group
    assert 0 < group <= MAX_GROUP, group


def _check_bits(activation_bits: int) -> int:
    assert activation_bits in (8, 15), activation_bits
    return activation_bits


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
