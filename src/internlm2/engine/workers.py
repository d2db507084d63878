"""The other processes of a model that is split (tensor parallelism): who starts them, and what each of them runs.

`LLM(tensor_parallel=N)` starts N - 1 times `python -m internlm2.engine.workers SETTINGS` on this machine. While they
start, nobody waits where Ctrl-C or the end of a process would go unnoticed: each says on its stdout how far it is. Each
ends when its stdin does, so that none outlives rank 0, whatever happens to it.
"""

import json
import logging
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import cast

import torch

from internlm2 import config, log
from internlm2.checkpoint import memory
from internlm2.checkpoint.load import load_checkpoint, parse_device
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import resolve_model
from internlm2.checkpoint.source import Checkpoint
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.engine.compute.split import Leader, follow
from internlm2.engine.fork_guard import ForkGuard
from internlm2.engine.worker_process import Child, Stage, WorkerSettings, end_with_rank_0, say
from internlm2.errors import InternLM2Error, RequestError
from internlm2.model.heads import RopeMode
from internlm2.parallel import TensorGroup, free_address, receive_tensors, send_tensors

START_SECONDS = 300.0  # a worker imports torch first
LEAVE_SECONDS = 10.0
_POLL_SECONDS = 0.05

_log = logging.getLogger(__name__)


class Workers:
    """The processes that rank 0 started, and the group that they and it are in.

    path: the checkpoint, of which each loads its part at once. device: "cpu" (the threads are shared out), or "cuda"
    for one GPU each. Raises RequestError when that cannot be, and when one of them ends.
    """

    def __init__(self, path: str, *, size: int, dtype: str, device: str, rope_mode: RopeMode) -> None:
        devices = _devices(device, size)
        self._home = ForkGuard()
        self._size = size
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
        self.children: list[Child] = []
        try:
            for rank in range(1, size):
                self.children.append(Child(replace(settings, rank=rank, device=devices[rank])))
            self._wait_for(Stage.READY, START_SECONDS)
            self.group = self._connect(settings)
        except BaseException:
            self._end_children()
            raise
        if device == "cpu":
            torch.set_num_threads(num_threads)

    def watch(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same checkpoint; reading it raises RequestError once one of the processes has ended."""
        return _Watched(checkpoint, self)

    def bytes_left(self) -> int | None:
        """Memory left for keys and values in every process once all have loaded; None where it is not told."""
        self._wait_for(Stage.LOADED)
        send_tensors(self.group, [])
        left = _gather_bytes_left(self.group)
        return None if left < 0 else left

    def lead(self, cache: PageCache, *, num_pages: int, num_host_pages: int) -> Leader:
        """Have the others make a cache like `cache`; from now on they follow."""
        sizes = torch.tensor([num_pages, cache.page_size, num_host_pages, int(cache.is_int8)])
        send_tensors(self.group, [sizes])
        return Leader(self.group, self.explain)

    def check(self) -> None:
        """Raise RequestError when one of the processes has ended, which none does while the model is loaded."""
        ended = self._first_ended()
        if ended is not None:
            raise RequestError(
                f"A model that is split over {self._size} processes could not be loaded: {ended.last_words()} Mend "
                "that, and load it again."
            )

    def explain(self, error: Exception) -> str:
        """What `error` came from: the process that ended, if one did, and else what it says itself."""
        until = time.monotonic() + 1.0  # the connection ends a moment before the process does
        while time.monotonic() < until and isinstance(error, RequestError):
            ended = self._first_ended()
            if ended is not None:
                return ended.last_words()
            time.sleep(_POLL_SECONDS)
        said = str(error) if isinstance(error, InternLM2Error) else f"{type(error).__name__}: {error}"
        return said.rstrip(".") + "."

    def close(self, leader: Leader) -> None:
        """Let the processes go, and make sure that they went. In a fork of this process: nothing."""
        if not self._home.is_at_home:
            return
        try:
            leader.close()
            for child in self.children:
                child.process.wait(LEAVE_SECONDS)
        except (InternLM2Error, subprocess.TimeoutExpired) as error:
            _log.warning("The processes of a split model did not leave by themselves: %s", error)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the processes and the group, whatever they are doing."""
        if self._home.is_at_home:
            self._end_children()
            self.group.leave()
            torch.set_num_threads(self._threads_before)

    def _first_ended(self) -> Child | None:
        """The process that ended first, for the others end with it."""
        ended = [
            (at, child.rank, child) for child in self.children if (at := child.ended_seconds) is not None
        ]
        return min(ended)[2] if ended else None

    def _wait_for(self, stage: Stage, seconds: float = math.inf) -> None:
        until = time.monotonic() + seconds
        while any(child.stage < stage for child in self.children):
            self.check()
            if time.monotonic() > until:
                raise RequestError(
                    f"The processes of a split model did not start within {seconds:g} s. Is the machine overloaded? "
                    "Try again, or load the model without tensor_parallel."
                )
            time.sleep(_POLL_SECONDS)

    def _connect(self, settings: WorkerSettings) -> TensorGroup:
        """Meet the others, all of which are about to. In a thread: nothing interrupts torch when one ends now."""
        meeting: Future[TensorGroup] = Future()

        def meet() -> None:
            try:
                meeting.set_result(_join_group(settings))
            except BaseException as error:
                meeting.set_exception(error)

        threading.Thread(target=meet, name="meet-split-model", daemon=True).start()
        while not meeting.done():
            self.check()
            time.sleep(_POLL_SECONDS)
        return meeting.result()

    def _end_children(self) -> None:
        for child in self.children:
            child.kill()


class _Watched:
    """A checkpoint that is read only as long as all processes are there."""

    def __init__(self, checkpoint: Checkpoint, workers: Workers) -> None:
        self.path = checkpoint.path
        self.config = checkpoint.config
        self.tensors = checkpoint.tensors
        self.tokenizer_folder = checkpoint.tokenizer_folder
        self._checkpoint = checkpoint
        self._workers = workers

    def read(self, name: str) -> torch.Tensor:
        self._workers.check()
        return self._checkpoint.read(name)


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


def _join_group(settings: WorkerSettings) -> TensorGroup:
    return TensorGroup.connect(
        settings.rank,
        settings.size,
        address=settings.address,
        device=torch.device(settings.device),
        timeout_seconds=START_SECONDS,
    )


def work(settings: WorkerSettings) -> None:
    """Be one of the other processes: load a part of the model, then follow rank 0 until it says stop."""
    if settings.device == "cpu":
        torch.set_num_threads(settings.num_threads)
    say(Stage.READY)
    with _join_group(settings) as group:
        model = load_checkpoint(
            open_checkpoint(resolve_model(settings.path)),
            dtype=settings.dtype,
            device=settings.device,
            rope_mode=cast(RopeMode, settings.rope_mode),
            group=group,
        )
        say(Stage.LOADED)
        receive_tensors(group)  # for as long as rank 0 is still loading
        _gather_bytes_left(group)
        [sizes] = receive_tensors(group)
        num_pages, page_size, num_host_pages, is_int8 = sizes.tolist()
        cache = PageCache(
            model.config,
            num_pages=num_pages,
            page_size=page_size,
            dtype=model.model.tok_embeddings.weight.dtype,
            device=group.device,
            kv_dtype="int8" if is_int8 else None,
            num_host_pages=num_host_pages,
        )
        follow(Runner(model, cache), group)


def main() -> None:
    """Entry point of a worker. What goes wrong is told in one line on stderr."""
    log.configure(verbosity=-1)
    threading.Thread(target=end_with_rank_0, daemon=True).start()
    try:
        work(config.from_dict(WorkerSettings, json.loads(sys.argv[1]), where="settings of a worker"))
    except InternLM2Error as error:
        _log.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
