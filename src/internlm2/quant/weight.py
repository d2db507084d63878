"""Weights in int8 or int4, rounded to the nearest, with one scale for every group of columns.

Scales are bfloat16, and the weights are rounded against the scale as stored, so its own rounding costs nothing. For
int4 a few scales around the obvious one are tried and the one with the smallest squared error is kept, as llama.cpp's
quantiser does (`make_qx_quants`): clipping one outlier is often cheaper than a coarse grid for the rest.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from internlm2.errors import RequestError
from internlm2.kernels import PackedWeight, pack_bfloat16, pack_int4, pack_int8, turn
from internlm2.kernels.packed import COLUMN_MULTIPLE, Kind

_VALUES_AT_ONCE = 1 << 20  # so that intermediate results stay in the cache
_TIMES_ON_GPU = 64  # which has no such cache, and starts every operation anew
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 1.05)  # factors of the obvious scale that are tried for int4
_ROWS_TO_TRY = 256  # of a matrix, to find whether it should be turned
_MUCH_LESS = 0.5  # of the squared error. Else turned: that also spreads what activations meet the error with
_SMALLEST = 1e-30  # of a scale while it divides; stored as zero


@dataclass(frozen=True)
class WeightFormat:
    """How weights are stored, and how activations are rounded before they meet them.

    group: columns that share a scale. has_zeros: int4 with a zero of each group's own. activation_bits: 8, or 15, which
    takes two products for each weight: free while the memory is the limit, half the speed from about 8 rows on.
    uses_hadamard: weights and activations are turned by a Hadamard matrix, 32 columns at a time, before rounding; None:
    unless the matrix was in few bits before and loses much less as it is.
    whole_zeros: zeros are whole numbers, as files hold them, and not sixteenths.
    """

    kind: Kind
    group: int = 0
    has_zeros: bool = False
    activation_bits: int = 8
    whole_zeros: bool = False
    uses_hadamard: bool | None = False

    @property
    def bits(self) -> float:
        """Of a weight, with its share of the scale and the zero."""
        if self.kind == "bfloat16":
            return 16.0
        return {"int8": 8, "int4": 4}[self.kind] + (16 + 8 * self.has_zeros) / self.group


# int8 is for those who want nothing lost: turned, 8 bits of the activations are nearly as good as 15, with half the
# products (docs/kernels.md has the figures). So is int4, but weights from a 4-bit file keep their grid.
FORMATS: dict[str, WeightFormat] = {
    "bfloat16": WeightFormat("bfloat16"),
    "int8": WeightFormat("int8", 32, uses_hadamard=True),
    "int4": WeightFormat("int4", 32, has_zeros=True, uses_hadamard=None),
    "int4-symmetric": WeightFormat("int4", 32, uses_hadamard=None),
}


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded matrix: scale * (q - zero), for every group of columns.

    q: (N, C), int8, or uint8 for int4. scales: (N, groups) of a floating dtype. zeros: (N, groups) whole numbers of
    sixteenths; None: 0 for int8 and 8 for int4.
    """

    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group: int

    @property
    def kind(self) -> Kind:
        """int8 or int4."""
        return "int8" if self.q.dtype == torch.int8 else "int4"

    def values(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix again, (N, C), computed in `dtype`: exact in float32."""
        groups = F.pad(self.q, (0, self.scales.shape[1] * self.group - self.q.shape[1]))
        groups = groups.view(len(self.q), -1, self.group).to(dtype)
        if self.zeros is not None:
            groups = groups - (self.zeros.float() / 16).to(dtype)[..., None]
        elif self.kind == "int4":
            groups = groups - 8
        return (groups * self.scales.to(dtype)[..., None]).flatten(1)[:, : self.q.shape[1]]

    def is_like(self, other: "Rounded") -> bool:
        """Whether both can be one gated weight."""
        return (self.kind, self.group, self.zeros is None) == (other.kind, other.group, other.zeros is None)

    def for_kernels(self) -> "Rounded | None":
        """The same matrix as the kernels take it, or None where they would have to round it again.

        Groups larger than theirs are cut; int8 has no zeros there, and scales are bfloat16.
        """
        group = next((g for g in (256, 192, 128, 96, 64, 32) if self.group % g == 0), None)
        scales = self.scales.to(torch.bfloat16)
        if group is None or (self.kind == "int8" and self.zeros is not None):
            return None
        if not torch.equal(scales.to(self.scales.dtype), self.scales):
            return None
        times, most = self.group // group, -(-self.q.shape[1] // group)
        zeros = None if self.zeros is None else _repeat(self.zeros, times, most).to(torch.uint8)
        return Rounded(self.q, _repeat(scales, times, most), zeros, group)


def _repeat(values: torch.Tensor, times: int, most: int) -> torch.Tensor:
    return values.repeat_interleave(times, dim=1)[:, :most].contiguous()


def pack_rounded(
    weight: Rounded,
    *,
    gate: Rounded | None = None,
    bias: torch.Tensor | None = None,
    activation_bits: int,
    uses_hadamard: bool = False,
) -> PackedWeight:
    """Pack what `Rounded.for_kernels` gave; nothing is rounded. gate: of the same kind, group and zeros or none.

    uses_hadamard: both were turned before they were rounded.
    """
    assert gate is None or gate.is_like(weight)
    if weight.kind == "int8":
        gate_parts = None if gate is None else (gate.q, gate.scales)
        return pack_int8(
            weight.q, weight.scales, group=weight.group, gate=gate_parts, bias=bias,
            activation_bits=activation_bits, uses_hadamard=uses_hadamard,
        )  # fmt: skip
    others = None if gate is None else (gate.q, gate.scales, gate.zeros)
    return pack_int4(
        weight.q, weight.scales, weight.zeros, group=weight.group, gate=others, bias=bias,
        activation_bits=activation_bits, uses_hadamard=uses_hadamard,
    )  # fmt: skip


def parse_format(name: str) -> WeightFormat:
    """The format called so. Raises RequestError."""
    if name not in FORMATS:
        raise RequestError(f"quantization is {name!r}, but must be one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def fitting_group(columns: int, wanted: int) -> int:
    """The largest group up to `wanted` that leaves no rest, so that no zeros are stored; at least 32."""
    return next(
        (group for group in (wanted, wanted // 2, wanted // 4) if group >= 32 and columns % group == 0), 32
    )


@torch.no_grad()
def quantize_weight(
    weight: torch.Tensor,
    fmt: WeightFormat,
    *,
    gate: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> PackedWeight:
    """Round and pack. weight: (N, C) of any floating dtype. gate: (N, C); the product is then silu(gate x) * weight x.

    Raises RequestError when a weight is not finite.
    """
    if fmt.kind == "bfloat16":
        return pack_bfloat16(weight, gate=gate, bias=bias)
    group = fitting_group(weight.shape[1], fmt.group)
    bits, uses_hadamard = fmt.activation_bits, fmt.uses_hadamard
    if uses_hadamard is not False and weight.shape[1] % COLUMN_MULTIPLE:
        bits, uses_hadamard = 15 if uses_hadamard else bits, False
    if uses_hadamard is None:
        uses_hadamard = not _is_on_a_grid(weight, gate, fmt, group)
    if uses_hadamard:
        weight, gate = turn(weight), None if gate is None else turn(gate)
    return pack_rounded(
        Rounded(*round_weight(weight, fmt, group), group),
        gate=None if gate is None else Rounded(*round_weight(gate, fmt, group), group),
        bias=bias,
        activation_bits=bits,
        uses_hadamard=uses_hadamard,
    )


def _is_on_a_grid(weight: torch.Tensor, gate: torch.Tensor | None, fmt: WeightFormat, group: int) -> bool:
    """Whether some rows, from all parts of the matrix, lose much less as they are than turned."""

    def error(rows: torch.Tensor) -> torch.Tensor:
        return (Rounded(*round_weight(rows, fmt, group), group).values() - rows).square().sum()

    parts = [weight] if gate is None else [gate, weight]
    rows = torch.cat([part[:: -(-len(part) // _ROWS_TO_TRY)] for part in parts]).float()
    return bool(error(rows) < _MUCH_LESS * error(turn(rows)))


@torch.no_grad()
def round_weight(
    weight: torch.Tensor, fmt: WeightFormat, group: int, *, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(N, C) -> q (N, C) int8 or uint8; scales (N, groups) bfloat16; zeros (N, groups) uint8 in sixteenths, or None.

    importance: (C,), how much the squared error of each column counts when an int4 scale is chosen; default: equally.
    Raises RequestError when a weight is not finite.
    """
    rows, columns = weight.shape
    num_groups = -(-columns // group)
    is_int8 = fmt.kind == "int8"
    device = weight.device
    q = torch.empty(rows, columns, dtype=torch.int8 if is_int8 else torch.uint8, device=device)
    scales = torch.empty(rows, num_groups, dtype=torch.bfloat16, device=device)
    zeros = torch.empty(rows, num_groups, dtype=torch.uint8, device=device) if fmt.has_zeros else None
    step = max(1, _VALUES_AT_ONCE * (1 if device.type == "cpu" else _TIMES_ON_GPU) // columns)
    counts = torch.ones(columns, device=device) if importance is None else importance.to(device).float()
    counts = F.pad(counts, (0, num_groups * group - columns)).view(num_groups, group)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = F.pad(weight[part].float(), (0, num_groups * group - columns)).view(-1, num_groups, group)
        if not values.isfinite().all():
            raise RequestError(
                "A weight is NaN or infinite, so it cannot be rounded. Is the checkpoint damaged?"
            )
        if is_int8:
            rounded, scale = _int8(values)
        elif zeros is None:
            rounded, scale = _int4(values, counts)
        else:
            rounded, scale, zeros[part] = _int4_with_zeros(values, counts, is_whole=fmt.whole_zeros)
        q[part] = rounded.flatten(1)[:, :columns].to(q.dtype)
        scales[part] = scale.where(scale.abs() > 2 * _SMALLEST, 0)
    return q, scales, zeros


def _int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _stored(values.abs().amax(-1) / 127)
    return (values / scale[..., None]).round_().clamp_(-127, 127), scale


def _int4(values: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scale * (q - 8), q in [0, 15]. The value of largest magnitude takes the longer side, -8, by the scale's sign."""
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))[..., 0]
    best: tuple[torch.Tensor, ...] | None = None
    for factor in _SHRINK:
        scale = _stored(largest / -8 * factor)
        q = (values / scale[..., None]).round_().clamp_(-8, 7)
        # The best scale for these whole numbers is a projection; the numbers are then rounded against it.
        length = (q.square() * counts).sum(-1)
        scale = _stored((values * q * counts).sum(-1) / length.where(length > 0, 1), like=scale)
        q = (values / scale[..., None]).round_().clamp_(-8, 7)
        error = ((q * scale[..., None] - values).square_() * counts).sum(-1)
        best = _better(best, (error, q, scale))
    assert best is not None
    return best[1] + 8, best[2]


def _int4_with_zeros(
    values: torch.Tensor, counts: torch.Tensor, *, is_whole: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale * (q - zero), q in [0, 15], zero in [0, 15], whole or by sixteenths. The grid always holds 0 nearly."""
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    steps = 1 if is_whole else 16
    best: tuple[torch.Tensor, ...] | None = None
    for factor in _SHRINK:
        scale = _stored((high - low) / 15 * factor)
        middle = (high + low) / 2 / scale  # the clipped range keeps its middle
        nearest = (7.5 - middle).clamp(0, 15) * steps
        # A whole zero may be half a step off, so both neighbours are tried.
        for choice in (nearest.floor(), nearest.ceil()) if is_whole else (nearest.round(),):
            zero = choice / steps
            q = (values / scale[..., None] + zero[..., None]).round_().clamp_(0, 15)
            error = (((q - zero[..., None]) * scale[..., None] - values).square_() * counts).sum(-1)
            best = _better(best, (error, q, scale, zero))
    assert best is not None
    return best[1], best[2], (best[3] * 16).to(torch.uint8)


def _better(old: tuple[torch.Tensor, ...] | None, new: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Group by group, what belongs to the smaller error, which stands first."""
    if old is None:
        return new
    wins = new[0] < old[0]
    return tuple(
        torch.where(wins if a.dim() == 2 else wins[..., None], a, b) for a, b in zip(new, old, strict=True)
    )


def _stored(scale: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """A scale as bfloat16 holds it, never zero; where it would be, that of `like`."""
    scale = scale.to(torch.bfloat16).float()
    instead = torch.full_like(scale, _SMALLEST) if like is None else like
    return torch.where(scale.abs() < _SMALLEST, instead, scale)
