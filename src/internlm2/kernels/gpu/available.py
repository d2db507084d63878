"""Whether Triton does the work: for tensors on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

_SMS_WITHOUT_GPU = 16  # few, for the interpreter runs block after block


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. torch's builds for CUDA on Linux bring it."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(x: torch.Tensor) -> bool:
    """Whether kernels that take `x` run in Triton; otherwise their twins do."""
    return has_triton() and (x.is_cuda or _is_interpreted())


def multiplies_in_float32(x: torch.Tensor) -> bool:
    """Whether a matrix product of bfloat16 values must take them as float32: Triton's interpreter has no other way."""
    return x.dtype == torch.bfloat16 and _is_interpreted()


def current(device: torch.device) -> AbstractContextManager[object]:
    """While open, `device` is the thread's current GPU, on which Triton starts kernels; nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """How many blocks the GPU runs side by side at the least."""
    if device.type != "cuda":
        return _SMS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count
