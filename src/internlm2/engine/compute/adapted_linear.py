"""A linear that adds to each row what its LoRA adapter adds, and which rows those are.

W x becomes W x + B (A x). Rows of one adapter that lie side by side are a slice; others are gathered and put back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Span = tuple[int, int, str]  # rows [start, end) use the adapter called so


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to one linear. a: (r, in). b: (out, r), with the adapter's scale in it."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """The rows of one adapter. rows: a slice, or int64 ids (n,) on the model's device. end: behind the last."""

    name: str
    rows: slice | torch.Tensor
    end: int


class AdaptedLinear(nn.Linear):
    """A linear with the parameters of `base`, which adds to each row what its adapter adds.

    groups: the rows that have one; one list that all linears share and `Adapters.select` fills.
    """

    def __init__(self, base: nn.Linear, groups: list[Group]) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)
        self.factors: dict[str, LowRank] = {}
        self._groups = groups

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as nn.Linear
        """input: (..., in) -> (..., out). Rows are counted over the flattened leading dimensions."""
        out = F.linear(input, self.weight, self.bias)
        groups = [group for group in self._groups if group.name in self.factors]
        if not groups:
            return out
        x, flat = input.reshape(-1, self.in_features), out.reshape(-1, self.out_features)  # (N, in), (N, out)
        for group in groups:
            assert group.end <= len(x), f"adapter rows up to {group.end} of an input of {len(x)}"
            factors = self.factors[group.name]
            narrow = F.linear(x[group.rows], factors.a)  # (n, r)
            # Rounded once in both branches, so that a row does not depend on how its adapter's rows lie.
            if isinstance(group.rows, slice):
                flat[group.rows].addmm_(narrow, factors.b.t())
            else:
                flat[group.rows] = torch.addmm(flat[group.rows], narrow, factors.b.t())
        return flat.view(out.shape)


def group_rows(spans: Sequence[Span], device: torch.device) -> list[Group]:
    """The rows of each adapter. spans: of the flattened input, in any order, disjoint. device: of the model."""
    ranges = _ranges_by_name(spans)
    scattered = [name for name, parts in ranges.items() if len(parts) > 1]
    ids: dict[str, torch.Tensor] = {}
    if scattered:  # one transfer for all of them
        rows = {name: [row for part in ranges[name] for row in range(*part)] for name in scattered}
        all_rows = [row for own in rows.values() for row in own]
        row_ids = torch.tensor(all_rows, dtype=torch.int64, device=device)
        ids = dict(zip(rows, row_ids.split([len(own) for own in rows.values()]), strict=True))
    return [
        Group(name, ids[name] if name in ids else slice(*parts[0]), parts[-1][1])
        for name, parts in ranges.items()
    ]


def _ranges_by_name(spans: Sequence[Span]) -> dict[str, list[tuple[int, int]]]:
    """Name -> its ranges in order, with those that touch joined."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    reached = 0
    for start, end, name in sorted(spans):
        assert reached <= start <= end, f"adapter rows [{start}, {end}) overlap others or run backwards"
        reached = end
        parts = ranges.setdefault(name, [])
        if parts and parts[-1][1] == start:
            parts[-1] = (parts[-1][0], end)
        else:
            parts.append((start, end))
    return ranges
