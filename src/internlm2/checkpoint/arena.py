"""One piece of memory for all packed weights of a model, on huge pages where the system has them.

A weight of its own wastes the rest of its last huge page, and small ones between short-lived matrices keep the heap
from giving memory back: together as much again as a small model.
"""

from dataclasses import fields, replace
from typing import Any

import torch

from internlm2.kernels import PackedWeight, packed

_ALIGNMENT = 64  # of a tensor: a line of the processor's cache
# What a packed weight is made from; the rest follows from it.
FIELDS = tuple(field.name for field in fields(PackedWeight) if field.init)


class Arena:
    """num_bytes: about what will be kept here. Memory is taken when it is written; what does not fit lies outside."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = packed.allocate(num_bytes)
        self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """Memory, (num_bytes,) uint8. It stays as long as any tensor of this arena."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + num_bytes > len(self._memory):
            return packed.allocate(num_bytes)
        self._used = start + num_bytes
        return self._memory[start : self._used]

    def keep(self, weight: PackedWeight) -> PackedWeight:
        """The same weight, here."""
        values = [(name, getattr(weight, name)) for name in FIELDS]
        here: dict[str, Any] = {name: self._copy(x) for name, x in values if isinstance(x, torch.Tensor)}
        return replace(weight, **here)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        copied = self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return copied.copy_(tensor)
