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
    share a scale; 0 for bfloat16. has_zeros: of int4, whose zero is 8 without. data: (bytes,) uint8, with the scales
    (bfloat16) and zeros (uint8, in sixteenths) of each group behind its words. bias: (rows,) float32. activation_bits:
    8, or 15 (two products for each weight, which costs nothing as long as the memory is the limit); 16 for bfloat16.
    uses_hadamard: the matrix is one that `turn` gave, so activations are turned too.
    """

    kind: Kind
    rows: int
    columns: int
    group: int
    is_gated: bool
    has_zeros: bool
    data: torch.Tensor
    bias: torch.Tensor | None
    activation_bits: int
    uses_hadamard: bool = False
    c_struct: CWeight = field(init=False, repr=False)
    pointer: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert not self.uses_hadamard or self.columns % COLUMN_MULTIPLE == 0, self.columns
        struct = CWeight(
            data=self.data.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            rows=self.rows,
            columns=self.columns,
            padded_columns=self.padded_columns,
            group=self.group,
            kind=KINDS.index(self.kind),
            is_gated=self.is_gated,
            num_parts=2 if self.activation_bits == 15 else 1,
            has_zeros=self.has_zeros,
            uses_hadamard=self.uses_hadamard,
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
        return self.data.nbytes + (0 if self.bias is None else self.bias.nbytes)


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
        has_zeros=False,
        data=_interleave("bfloat16", weight, _round_up(columns, COLUMN_MULTIPLE)),
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
    uses_hadamard: bool = False,
) -> PackedWeight:
    """q: (N, C) int8 in [-127, 127]. scales: (N, ceil(C / group)). gate: the same two of the gate."""
    assert q.dtype == torch.int8
    rows, columns = q.shape
    _check_group(group)
    joined = _join(q, None if gate is None else gate[0])
    joined_scales = _join(scales, None if gate is None else gate[1])
    return PackedWeight(
        kind="int8",
        rows=rows,
        columns=columns,
        group=group,
        is_gated=gate is not None,
        has_zeros=False,
        data=_interleave("int8", joined, _round_up(columns, group), joined_scales),
        bias=_as_bias(bias, rows),
        activation_bits=_check_bits(activation_bits),
        uses_hadamard=uses_hadamard,
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
    uses_hadamard: bool = False,
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
        has_zeros=zeros is not None,
        data=_interleave(
            "int4",
            _join(q, gate_q),
            _round_up(columns, group),
            _join(scales, gate_scales),
            None if zeros is None else _join(zeros, gate_zeros),
        ),
        bias=_as_bias(bias, rows),
        activation_bits=_check_bits(activation_bits),
        uses_hadamard=uses_hadamard,
    )


def turn(x: torch.Tensor) -> torch.Tensor:
    """x: (N, C), C a multiple of 32 -> (N, C) float32: each 32 columns times a Hadamard matrix; twice gives x again.

    A matrix and activations that are both turned have the same product, but an outlier is spread over its neighbours,
    so that 8 bits lose little. arXiv 2404.00456.
    """
    groups = x.float().view(len(x), -1, COLUMN_MULTIPLE) * COLUMN_MULTIPLE**-0.5
    for _ in range(COLUMN_MULTIPLE.bit_length() - 1):
        even, odd = groups[..., ::2], groups[..., 1::2]
        groups = torch.cat((even + odd, even - odd), -1)
    return groups.flatten(1)


def unpack(weight: PackedWeight, first: int = 0, end: int | None = None) -> torch.Tensor:
    """The stored rows [first, end) as float32: (end - first, C). A gated weight has twice `rows` stored rows.

    first: a multiple of 32. What quantisation and rounding left of the matrix that was packed; for tests and the twin.
    """
    stored = _stored_rows(weight)
    end = stored if end is None else min(end, stored)
    assert first % BLOCK_ROWS == 0
    blocks = slice(first // BLOCK_ROWS, -(-end // BLOCK_ROWS))
    words, scales, zeros = _parts(
        weight.kind, weight.data, weight.padded_columns, weight.group, weight.has_zeros
    )
    rows = (
        words[blocks].permute(0, 3, 1, 2).contiguous().flatten(2).flatten(0, 1)[: end - first]
    )  # (rows, words)
    if scales is None:
        return rows.view(torch.bfloat16).float()[:, : weight.columns]
    if weight.kind == "int8":
        values, zero = rows.view(torch.uint8).float(), 128.0
    else:
        both = rows.view(torch.uint8).view(*rows.shape, 1, 4)
        values, zero = torch.cat((both & 15, both >> 4), dim=2).flatten(1).float(), 8.0
    groups = values.view(len(rows), weight.padded_columns // weight.group, weight.group)
    groups = groups - (zero if zeros is None else _by_row(zeros[blocks])[: end - first].float() / 16)
    return (groups * _by_row(scales[blocks])[: end - first].float()).flatten(1)[:, : weight.columns]


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


def _interleave(
    kind: Kind,
    weight: torch.Tensor,
    padded_columns: int,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    """(rows, columns) -> bytes, in blocks of 32 rows whose words alternate, with scales and zeros behind each group."""
    num_rows = _round_up(len(weight), BLOCK_ROWS)
    group = 0 if scales is None else padded_columns // scales.shape[1]
    data = allocate(num_rows // BLOCK_ROWS * _block_bytes(kind, padded_columns, group, zeros is not None))
    words, scales_out, zeros_out = _parts(kind, data, padded_columns, group, zeros is not None)
    for first in range(0, num_rows, _ROWS_AT_ONCE):
        part = weight[first : first + _ROWS_AT_ONCE]
        part = F.pad(part, (0, padded_columns - part.shape[1], 0, -len(part) % BLOCK_ROWS))
        rows = _words_of_rows(kind, part.contiguous())  # (rows, words) int32
        blocks = slice(first // BLOCK_ROWS, (first + len(part)) // BLOCK_ROWS)
        words[blocks].copy_(rows.view(-1, BLOCK_ROWS, *words.shape[1:3]).permute(0, 2, 3, 1))
    for values, out in ((scales, scales_out), (zeros, zeros_out)):
        if values is not None and out is not None:
            padded = F.pad(values, (0, 0, 0, num_rows - len(values)))
            out.copy_(padded.view(-1, BLOCK_ROWS, values.shape[1]).transpose(1, 2))
    return data


def _block_bytes(kind: Kind, padded_columns: int, group: int, has_zeros: bool) -> int:
    words = padded_columns // _COLUMNS_PER_WORD[kind] * BLOCK_ROWS * 4
    return words + (padded_columns // group * BLOCK_ROWS * (3 if has_zeros else 2) if group else 0)


def _parts(
    kind: Kind, data: torch.Tensor, padded_columns: int, group: int, has_zeros: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Views of packed bytes: words (blocks, groups, words of each, 32) int32, scales and zeros (blocks, groups, 32)."""
    num_groups = padded_columns // group if group else 1
    num_words = padded_columns // num_groups // _COLUMNS_PER_WORD[kind]
    groups = data.view(-1, num_groups, _block_bytes(kind, padded_columns, group, has_zeros) // num_groups)
    num_bytes = num_words * BLOCK_ROWS * 4
    words = groups[..., :num_bytes].view(torch.int32).unflatten(-1, (num_words, BLOCK_ROWS))
    if not group:
        return words, None, None
    end = num_bytes + 2 * BLOCK_ROWS
    return words, groups[..., num_bytes:end].view(torch.bfloat16), groups[..., end:] if has_zeros else None


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


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
