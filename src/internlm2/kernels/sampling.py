"""Choosing a token for each row of logits in C++: a row is read once or twice, and no tensor is made on the way.

The law is that of engine/sampling/filters.py, which is the plain-torch twin and does what this cannot.
"""

import struct
from array import array
from collections.abc import Sequence

import torch

from internlm2.kernels.library import library

_WANTED = struct.Struct("<4dq")  # `Wanted` of cpu/sampling.h
_NOT_FINITE = -1
_WORTH_SHARING = 2  # rows: less is done before another thread has begun


def is_available(logits: torch.Tensor) -> bool:
    """Whether `choose` takes these logits (R, V)."""
    return logits.is_cpu and logits.dtype == torch.float32 and logits.stride(1) == 1 and library() is not None


def wanted(*, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> bytes:
    """What `choose` is told of one row. top_k: 0 for all. uniform: in [0, 1)."""
    return _WANTED.pack(temperature, top_p, min_p, uniform, min(top_k, 1 << 40))


def choose(logits: torch.Tensor, rows: Sequence[int], wants: Sequence[bytes]) -> list[int | None]:
    """A token for some rows of logits (R, V), for which `is_available`; None where the largest logit is not finite.

    wants: of each of `rows`, as `wanted` gives it. A row's token does not depend on the others.
    """
    built = library()
    assert built is not None
    assert len(rows) == len(wants)
    assert not rows or (min(rows) >= 0 and max(rows) < len(logits))
    places, tokens = array("q", rows), array("i", bytes(4 * len(rows)))
    failed = built.sample(
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[1],
        places.buffer_info()[0],
        len(rows),
        b"".join(wants),
        tokens.buffer_info()[0],
        torch.get_num_threads() if len(rows) >= _WORTH_SHARING else 1,
    )
    if failed:
        raise MemoryError(f"No memory to sort {logits.shape[1]} tokens.")
    return [None if token == _NOT_FINITE else token for token in tokens]
