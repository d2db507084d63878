"""Random packed weights of every kind, with the matrix that each of them means."""

from dataclasses import dataclass

import torch

from internlm2.kernels import PackedWeight, pack_bfloat16, pack_int4, pack_int8

TURNED = "int8-turned"  # activations are turned by a Hadamard matrix: columns must be a multiple of 32
NAMES = ("bfloat16", "int8", "int8-wide", "int4", "int4-zeros")  # wide: activations of 15 bits


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x: (N, C) times the normed matrix, 32 columns at a time, by its definition."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        matrix = torch.kron(matrix, two)
    return (x.double().view(len(x), -1, 32) @ matrix).flatten(1)


@dataclass(frozen=True)
class Case:
    """packed: what the kernel takes. matrix: (N, C) float64, its meaning. gate: the same of the gate, or None."""

    packed: PackedWeight
    matrix: torch.Tensor
    gate: torch.Tensor | None
    bias: torch.Tensor | None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x: (M, C) -> (M, N) float64, without rounding x."""
        x = x.double()
        out = x @ self.matrix.T
        if self.gate is not None:
            out = torch.nn.functional.silu(x @ self.gate.T) * out
        return out if self.bias is None else out + self.bias.double()


def random_case(
    name: str,
    rows: int,
    columns: int,
    *,
    group: int = 32,
    is_gated: bool = False,
    has_bias: bool = False,
    seed: int = 0,
) -> Case:
    """A weight whose products with normal activations are about 1."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(rows, generator=generator) if has_bias else None
    draws = [_draw(name, rows, columns, group, generator) for _ in range(1 + is_gated)]
    (parts, matrix), (gate_parts, gate) = draws[0], draws[1] if is_gated else (None, None)
    bits = 15 if name == "int8-wide" else 8
    if name == "bfloat16":
        packed = pack_bfloat16(parts[0], gate=None if gate_parts is None else gate_parts[0], bias=bias)
    elif name.startswith("int8"):
        packed = pack_int8(
            parts[0], parts[1], group=group, gate=gate_parts, bias=bias, activation_bits=bits,
            uses_hadamard=name == TURNED,
        )  # fmt: skip
    else:
        packed = pack_int4(parts[0], parts[1], parts[2], group=group, gate=gate_parts, bias=bias)
    return Case(packed, matrix, gate, bias)


def _draw(
    name: str, rows: int, columns: int, group: int, generator: torch.Generator
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    num_groups = -(-columns // group)
    scales = (torch.rand(rows, num_groups, generator=generator) + 0.5).bfloat16()
    by_column = scales.double().repeat_interleave(group, 1)[:, :columns]
    if name == "bfloat16":
        weight = (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()
        return (weight,), weight.double()
    if name.startswith("int8"):
        q = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
        scales = (scales.float() / 73 / columns**0.5).bfloat16()
        by_column = scales.double().repeat_interleave(group, 1)[:, :columns]
        matrix = q.double() * by_column
        return (q, scales), hadamard(matrix) if name == TURNED else matrix
    q = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = (scales.float() / 4.6 / columns**0.5).bfloat16()
    by_column = scales.double().repeat_interleave(group, 1)[:, :columns]
    if name == "int4":
        return (q, scales, None), (q.double() - 8) * by_column
    zeros = torch.randint(0, 241, (rows, num_groups), generator=generator, dtype=torch.uint8)
    zero_of_column = zeros.double().repeat_interleave(group, 1)[:, :columns] / 16
    return (q, scales, zeros), (q.double() - zero_of_column) * by_column
