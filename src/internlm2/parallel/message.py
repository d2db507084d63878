"""What rank 0 tells the others before each step: a few small CPU tensors, by broadcast, without pickle.

The first broadcast has a fixed size and holds the header and, where it fits, all numbers; most steps need no
second one. A header is the number of tensors, then dtype, dimensions and sizes of each.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from internlm2.parallel.group import TensorGroup

_DTYPES = (torch.int64, torch.int32, torch.float32)
_FIRST_WORDS = 2048  # int64 words of the first broadcast: 16 KiB take no longer than 1 KiB
_WORDS_OF_INFO = 4  # dtype, number of dimensions, two sizes


def send_tensors(group: TensorGroup, tensors: Sequence[torch.Tensor]) -> None:
    """Give `tensors` to every other process, which calls `receive_tensors`; rank 0 alone sends.

    tensors: on the CPU, (n) or (n, m), int64, int32 or float32; none at all is a message too.
    """
    assert group.rank == 0, "only rank 0 sends"
    header = [len(tensors)]
    for tensor in tensors:
        assert tensor.device.type == "cpu", "messages are CPU tensors"
        assert tensor.ndim in (1, 2), "messages have one dimension or two"
        sizes = tensor.shape if tensor.ndim == 2 else (*tensor.shape, 1)
        header += [_DTYPES.index(tensor.dtype), tensor.ndim, *sizes]
    assert len(header) <= _FIRST_WORDS, "too many tensors for one message"
    numbers = torch.cat([_as_words(tensor) for tensor in tensors]) if tensors else torch.empty(0).long()
    first = torch.zeros(_FIRST_WORDS, dtype=torch.int64)
    first[: len(header)] = torch.tensor(header)
    fits = len(header) + len(numbers) <= _FIRST_WORDS
    if fits:
        first[len(header) : len(header) + len(numbers)] = numbers
    group.broadcast(first)
    if not fits:
        group.broadcast(numbers)


def receive_tensors(group: TensorGroup) -> list[torch.Tensor]:
    """What rank 0 sends next, equal in every bit; waits for it as long as it takes."""
    assert group.rank > 0, "rank 0 sends"
    first = group.broadcast(torch.empty(_FIRST_WORDS, dtype=torch.int64))
    num_tensors = int(first[0])
    end = 1 + num_tensors * _WORDS_OF_INFO
    infos = [(_DTYPES[i], ndim, (n, m)) for i, ndim, n, m in first[1:end].view(-1, _WORDS_OF_INFO).tolist()]
    lengths = [_num_words(n * m, dtype) for dtype, _, (n, m) in infos]
    if end + sum(lengths) <= _FIRST_WORDS:
        numbers = first[end : end + sum(lengths)]
    else:
        numbers = group.broadcast(torch.empty(sum(lengths), dtype=torch.int64))
    return [
        words.view(dtype)[: n * m].view((n, m)[:ndim])
        for words, (dtype, ndim, (n, m)) in zip(numbers.split(lengths), infos, strict=True)
    ]


def _as_words(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().view(-1)
    return F.pad(flat, (0, len(flat) * flat.itemsize % 8 // flat.itemsize)).view(torch.int64)


def _num_words(num_values: int, dtype: torch.dtype) -> int:
    return (num_values * dtype.itemsize + 7) // 8
