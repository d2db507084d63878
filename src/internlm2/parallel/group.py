"""The processes that hold one model together: who they are, and the three things they say to each other.

Sums and gathers go over NCCL between GPUs and over gloo between CPUs. Broadcasts of CPU tensors have a gloo
group of their own, in which a process may wait for work as long as it takes.
"""

import gc
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F

from internlm2.errors import ConfigError, RequestError

# How long an idle process waits for the next message: an idle server is no failure.
_IDLE_LIMIT = timedelta(days=365)


class TensorGroup:
    """This process's place among the `size` processes that hold one model: owner of the process group.

    rank: from 0. device: where this process computes. Made by `connect`; one at a time in a process.
    """

    def __init__(
        self, rank: int, size: int, *, device: torch.device, messages: dist.ProcessGroup, timeout: timedelta
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._messages = messages
        self._timeout = timeout
        self._is_open = True

    @classmethod
    def connect(
        cls, rank: int, size: int, *, address: str, device: torch.device, timeout_seconds: float = 600.0
    ) -> Self:
        """Meet the other processes; returns when all `size` have come.

        address: "host:port" where rank 0 listens and the others find it, the same in every process. device: the
        CPU, or one GPU that no other process of the group uses. timeout_seconds: how long to wait for the others,
        here and in every sum or gather. Raises ConfigError for values that cannot be, RequestError when the
        others do not come.
        """
        if not 0 <= rank < size:
            raise ConfigError(f"rank is {rank}, but must be from 0 to {size - 1} in a group of {size}.")
        host, port = _parse_address(address)
        backend = _backend(device)
        if dist.is_initialized():
            raise RequestError(
                "This process is in a process group already. Close that group first, or start another process."
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL and Triton look at the current device
            device = torch.device("cuda", torch.cuda.current_device())
        timeout = timedelta(seconds=timeout_seconds)
        has_joined = False
        try:
            store = dist.TCPStore(host, port, size, is_master=rank == 0, timeout=timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            has_joined = True
            messages = dist.new_group(backend="gloo", timeout=_IDLE_LIMIT)
        except dist.DistError as error:
            if has_joined:  # and not another group, of another thread
                dist.destroy_process_group()
            raise RequestError(
                f"Rank {rank} could not meet the {size} processes of its group at {address} within "
                f"{timeout_seconds:g} s ({_first_line(error)}). Start them all with one address, whose port is "
                "free on the machine of rank 0 and open to the others."
            ) from error
        assert isinstance(messages, dist.ProcessGroup)
        return cls(rank, size, device=device, messages=messages, timeout=timeout)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place. x: contiguous, of one shape everywhere. Returns x, equal in every bit
        on every process."""
        assert x.is_contiguous()
        self._together(lambda: dist.all_reduce(x))
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """Join the last dimensions. x: (..., widths[rank]) -> (..., sum(widths)) on every process."""
        assert len(widths) == self.size
        assert x.shape[-1] == widths[self.rank]
        widest = max(widths)
        mine = F.pad(x, (0, widest - x.shape[-1])).contiguous()  # (..., widest)
        all_parts = mine.new_empty(self.size * mine.numel())
        self._together(lambda: dist.all_gather_single(all_parts, mine.view(-1)))
        parts = all_parts.view(self.size, *mine.shape)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Fill x with what rank 0 has in it, in place. x: contiguous, of one shape everywhere. Returns x.

        On a CPU tensor this waits for rank 0 without a time limit: how a process waits for work.
        """
        assert x.is_contiguous()
        group = self._messages if x.device.type == "cpu" else None
        self._together(lambda: dist.broadcast(x, 0, group=group))
        return x

    def close(self) -> None:
        """Leave together with the others; waits until all want to. A second call does nothing."""
        if not self._is_open:
            return
        # NOTE: in this order. What cycles still hold is dropped, nobody hangs up while another is talking, and the
        # group goes before the interpreter does: gloo's threads would abort the process at its exit.
        gc.collect()
        try:
            self._together(lambda: dist.monitored_barrier(self._messages, timeout=self._timeout))
        finally:
            self.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an error leave at once, so that the others learn of it instead of waiting."""
        if error is None:
            self.close()
        else:
            self.leave()

    def leave(self) -> None:
        """Leave at once; the others learn of it by an error. A second call does nothing."""
        if self._is_open:
            self._is_open = False
            dist.destroy_process_group()

    def _together(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise RequestError(
                f"Rank {self.rank} lost another process of its group ({_first_line(error)}). Look for the message "
                "of the one that ended first, then start all of them again."
            ) from error


def free_address() -> str:
    """An address "127.0.0.1:port" that nobody listens on now, for a group whose processes share this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _parse_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            f"address is {address!r}, but must be host:port with a port from 1 to 65535, such as 127.0.0.1:29500."
        )
    return host.strip("[]"), int(port)  # an IPv6 address stands in brackets


def _backend(device: torch.device) -> str:
    if device.type == "cpu":
        return "gloo"
    if device.type != "cuda" or not dist.is_nccl_available():
        raise ConfigError(
            f"device is {str(device)!r}, but the processes of a group compute on 'cpu', or on 'cuda:N' with a torch "
            "that has NCCL (Linux builds for CUDA). Use one of these."
        )
    return "nccl"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
