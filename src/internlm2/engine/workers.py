"""The other processes of a model that is split (tensor parallelism): who starts them, and what each of them runs.

`LLM(tensor_parallel=N)` starts N - 1 times `python -m internlm2.engine.workers SETTINGS` on this machine.
"""

import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch

from internlm2 import config, log
from internlm2.checkpoint import memory
from internlm2.checkpoint.load import load_checkpoint, parse_device
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import resolve_model
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.engine.compute.split import Leader, follow
from internlm2.errors import InternLM2Error, RequestError
from internlm2.model.heads import RopeMode
from internlm2.parallel import TensorGroup, free_address, receive_tensors, send_tensors

CONNECT_SECONDS = 300.0  # a worker imports torch first
LEAVE_SECONDS = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a process must know to hold the part of its rank. num_threads: of each process, on a CPU."""

    path: str
    rank: int
    size: int
    address: str
    dtype: str
    device: str
    rope_mode: str
    num_threads: int


class Workers:
    """The processes that rank 0 started, and the group that they and it are in.

    path: the checkpoint, of which each loads its part at once. device: "cpu" (the threads are shared out), or "cuda"
    for one GPU each. Raises RequestError when that cannot be.
    """

    def __init__(self, path: str, *, size: int, dtype: str, device: str, rope_mode: RopeMode) -> None:
        devices = _devices(device, size)
        self._threads_before = torch.get_num_threads()
        num_threads = max(self._threads_before // size, 1)
        settings = WorkerSettings(
            path=path,
            rank=0,
            size=size,
            address=free_address(),
            dtype=dtype,
            device=devices[0],
            rope_mode=rope_mode,
            num_threads=num_threads,
        )
        _log.info("Starting %s processes, each with a part of the model.", size)
        self.device = devices[0]
        self._processes = [
            _start(replace(settings, rank=rank, device=devices[rank])) for rank in range(1, size)
        ]
        try:
            self.group = TensorGroup.connect(
                0,
                size,
                address=settings.address,
                device=torch.device(self.device),
                timeout_seconds=CONNECT_SECONDS,
            )
        except BaseException:
            for process in self._processes:
                process.kill()
            raise
        if device == "cpu":
            torch.set_num_threads(num_threads)

    def bytes_left(self) -> int | None:
        """Memory left for keys and values in every process once all have loaded; None where it is not told."""
        left = _gather_bytes_left(self.group)
        return None if left < 0 else left

    def lead(self, cache: PageCache, *, num_pages: int, num_host_pages: int) -> Leader:
        """Have the others make a cache like `cache`; from now on they follow."""
        sizes = torch.tensor([num_pages, cache.page_size, num_host_pages, int(cache.is_int8)])
        send_tensors(self.group, [sizes])
        return Leader(self.group)

    def close(self, leader: Leader) -> None:
        """Let the processes go, and make sure that they went."""
        try:
            leader.close()
            for process in self._processes:
                process.wait(LEAVE_SECONDS)
        except (InternLM2Error, subprocess.TimeoutExpired) as error:
            _log.warning("The processes of a split model did not leave by themselves: %s", error)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the processes and the group, whatever they are doing."""
        self.group.leave()
        torch.set_num_threads(self._threads_before)
        for process in self._processes:
            process.kill()
            process.wait()


def _devices(device: str, size: int) -> list[str]:
    """The device of each rank."""
    kind = parse_device(device)
    if kind.index is not None:
        raise RequestError(f"device is {device!r}, but a split model takes several. Write {kind.type!r}.")
    if kind.type == "cpu":
        return ["cpu"] * size
    found = torch.cuda.device_count()
    if found < size:
        raise RequestError(
            f"tensor_parallel is {size}, but this machine has {found} GPUs. Give at most that."
        )
    return [f"cuda:{rank}" for rank in range(size)]


def _gather_bytes_left(group: TensorGroup) -> int:
    """The least memory that a process may take; -1 where one does not know. Waits for all."""
    left = memory.available_on(group.device)
    on_each = torch.tensor([-1 if left is None else left], device=group.device)
    least = int(group.all_gather(on_each, [1] * group.size).min())
    return least // group.size if group.device.type == "cpu" and least > 0 else least  # one memory for all


def _start(settings: WorkerSettings) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "internlm2.engine.workers", json.dumps(asdict(settings))]
    # In a session of its own: Ctrl-C at the terminal is for rank 0.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )


def work(settings: WorkerSettings) -> None:
    """Be one of the other processes: load a part of the model, then follow rank 0 until it says stop."""
    if settings.device == "cpu":
        torch.set_num_threads(settings.num_threads)
    device = torch.device(settings.device)
    with TensorGroup.connect(
        settings.rank,
        settings.size,
        address=settings.address,
        device=device,
        timeout_seconds=CONNECT_SECONDS,
    ) as group:
        model = load_checkpoint(
            open_checkpoint(resolve_model(settings.path)),
            dtype=settings.dtype,
            device=settings.device,
            rope_mode=cast(RopeMode, settings.rope_mode),
            group=group,
        )
        _gather_bytes_left(group)
        [sizes] = receive_tensors(group)
        num_pages, page_size, num_host_pages, is_int8 = sizes.tolist()
        cache = PageCache(
            model.config,
            num_pages=num_pages,
            page_size=page_size,
            dtype=model.model.tok_embeddings.weight.dtype,
            device=device,
            kv_dtype="int8" if is_int8 else None,
            num_host_pages=num_host_pages,
        )
        follow(Runner(model, cache), group)


def main() -> None:
    """Entry point of a worker. What goes wrong is told in one line on stderr."""
    log.configure(verbosity=-1)
    try:
        work(config.from_dict(WorkerSettings, json.loads(sys.argv[1]), where="settings of a worker"))
    except InternLM2Error as error:
        _log.error("A process of the split model ended: %s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
