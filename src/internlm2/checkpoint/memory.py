"""How much memory there is, and how much a model needs: asked before loading, not found out by being killed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from internlm2.errors import MemoryBudgetError
from internlm2.model.config import ModelConfig

GIB = 1 << 30


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Memory that a process may still take: free and reclaimable RAM plus swap, within the container's limit.

    None where the system does not tell (macOS, Windows).
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = sum(int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text()) - _file_cache_bytes(cgroup / "memory.stat")
    except (OSError, ValueError):  # no container, or "max"
        return available
    return min(available, limit - used)


def _file_cache_bytes(stat: Path) -> int:
    """Cached files count as used in a container, but make way for what a program asks for."""
    try:
        numbers = dict(line.split() for line in stat.read_text().splitlines())
        return int(numbers["inactive_file"]) + int(numbers["active_file"])
    except (OSError, KeyError, ValueError):
        return 0


def available_on(device: torch.device) -> int | None:
    """Memory that may still be taken on a GPU or in RAM; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes() if device.type == "cpu" else None


def check_fits(needed_bytes: int, *, device: torch.device, what: str) -> None:
    """Raise MemoryBudgetError when `needed_bytes` for `what` exceed what the device has left."""
    available = available_on(device)
    if available is not None and needed_bytes > available:
        raise MemoryBudgetError(
            f"{what} needs {needed_bytes / GIB:.1f} GiB, but {device} has {available / GIB:.1f} GiB left. "
            "Close other programs, choose a smaller dtype or a smaller model."
        )


@dataclass(frozen=True)
class ParameterCount:
    """total: all parameters. embedding: those of tok_embeddings, which decoding does not read in full."""

    total: int
    embedding: int


def count_parameters(shapes: dict[str, tuple[int, ...]]) -> ParameterCount:
    """Count the parameters in `source.expected_shapes(config)`."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return ParameterCount(sum(sizes.values()), sizes["model.tok_embeddings.weight"])


def rounded_bytes(
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    bits: float,
    head_bits: float | None,
) -> int:
    """About what a model takes whose matrices are rounded or packed; the embedding and all vectors stay in `dtype`.

    shapes: `source.expected_shapes(config)`. bits: of a value in the layers, with its scales. head_bits: the same of
    the output matrix; None: it stays as it is. A tied one that does not is a weight of its own beside the embedding.
    """
    if config.head == "language" and config.tie_word_embeddings and head_bits is not None:
        shapes = shapes | {"output.weight": shapes["model.tok_embeddings.weight"]}
    total = 0.0
    for name, shape in shapes.items():
        of_this = head_bits if name == "output.weight" else bits
        if name.endswith("tok_embeddings.weight") or len(shape) < 2 or of_this is None:
            of_this = dtype.itemsize * 8
        total += torch.Size(shape).numel() * of_this / 8
    return int(total)


def kv_cache_bytes(
    config: ModelConfig, num_tokens: int, *, bytes_per_value: int = 2, scale_bytes: int = 0
) -> int:
    """Keys and values of one sequence: 2 x layers x K x tokens x (D x bytes + scale).

    scale_bytes: what quantised keys and values carry besides, for each token and key/value head.
    """
    head_bytes = config.head_dim * bytes_per_value + scale_bytes
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_bytes * num_tokens
