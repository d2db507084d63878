"""Weights in int8 or int4 as the GPU reads them: what a block of rows needs next lies side by side.

A tile is one group of columns (int8) or two (int4: the first in the low halves of the bytes, the second in the high
ones, so that unpacking moves nothing between threads). Memory is (tiles, rows, group) bytes; scales are (groups, rows).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

LEAST_GROUP = 32


@dataclass(frozen=True, eq=False)
class GpuWeight:
    """A rounded matrix (rows, columns): scale * (q - zero), for every group of columns.

    data: (tiles, rows, group), int8, or uint8 with two int4 columns each. scales: (groups, rows). zeros: (groups, rows)
    uint8 in sixteenths; None: 0 for int8 and 8 for int4. The groups of the last tile are all there; columns behind the
    matrix have scale 0. group: a power of two from 32 on.
    """

    rows: int
    columns: int
    group: int
    data: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def is_int4(self) -> bool:
        """Two columns a byte."""
        return self.data.dtype == torch.uint8

    @property
    def num_bytes(self) -> int:
        """What one product reads."""
        return sum(x.nbytes for x in (self.data, self.scales, self.zeros) if x is not None)

    def to(self, device: torch.device) -> "GpuWeight":
        """The same on another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, data=self.data.to(device), scales=self.scales.to(device), zeros=zeros)


def pack(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, *, group: int) -> GpuWeight:
    """q: (N, C) int8, or uint8 below 16 for int4. scales: (N, ceil(C / group)). zeros: the same shape, uint8 in
    sixteenths, or None; int8 has none. group: a multiple of 32; where it is no power of two it is cut.
    """
    assert q.dtype in (torch.int8, torch.uint8)
    assert group % LEAST_GROUP == 0
    is_int4 = q.dtype == torch.uint8
    assert is_int4 or zeros is None
    rows, columns = q.shape
    own = group & -group  # its largest divisor that is a power of two
    tile = own * (2 if is_int4 else 1)
    num_tiles = -(-columns // tile)
    num_groups = num_tiles * tile // own
    padded = F.pad(q, (0, num_tiles * tile - columns)).view(rows, num_tiles, tile // own, own)
    data = padded[:, :, 0] | (padded[:, :, 1] << 4) if is_int4 else padded[:, :, 0]  # (N, tiles, group)
    return GpuWeight(
        rows=rows,
        columns=columns,
        group=own,
        data=data.transpose(0, 1).contiguous(),
        scales=_by_group(scales, group // own, num_groups, -(-columns // own)),
        zeros=None if zeros is None else _by_group(zeros, group // own, num_groups, -(-columns // own)),
    )


def join(one: GpuWeight, other: GpuWeight) -> GpuWeight:
    """The rows of `one`, then those of `other`. Both of one kind, with the same columns and groups."""
    assert is_like(one, other)
    zeros = None
    if one.zeros is not None and other.zeros is not None:
        zeros = torch.cat((one.zeros, other.zeros), dim=1)
    return replace(
        one,
        rows=one.rows + other.rows,
        data=torch.cat((one.data, other.data), dim=1),
        scales=torch.cat((one.scales, other.scales), dim=1),
        zeros=zeros,
    )


def is_like(one: GpuWeight, other: GpuWeight) -> bool:
    """Whether `join` takes them."""
    return (one.columns, one.group, one.data.dtype, one.zeros is None) == (
        other.columns,
        other.group,
        other.data.dtype,
        other.zeros is None,
    )


def unpack(weight: GpuWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix again, (N, C): computed in float32, then rounded to `dtype`."""
    if weight.is_int4:
        halves = torch.stack((weight.data & 15, weight.data >> 4), dim=1)
        q = halves.flatten(0, 1).float()  # (groups, N, group)
        q = q - (8.0 if weight.zeros is None else weight.zeros.float()[..., None] / 16)
    else:
        q = weight.data.float()
    values = (q * weight.scales.float()[..., None]).to(dtype)
    return values.transpose(0, 1).reshape(weight.rows, -1)[:, : weight.columns].contiguous()


def _by_group(values: torch.Tensor, times: int, num_groups: int, used: int) -> torch.Tensor:
    """(N, groups) -> (num_groups, N), each group cut into `times`, what is beyond `used` being zero."""
    cut = values.repeat_interleave(times, dim=1)[:, :used]
    return F.pad(cut, (0, num_groups - used)).t().contiguous()
