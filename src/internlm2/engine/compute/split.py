"""One step on a model that several processes hold: rank 0 says what is computed, the others compute along.

Rank 0 alone schedules, packs and samples. Before each call of the network it broadcasts an order with a few small
tensors; the sums inside the network then make every process's result the whole model's (`parallel.tensor`).
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import TypeVar

import torch

from internlm2.engine.compute.batch import Batch, Span
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.engine.schedule.pages import Direction, Move
from internlm2.errors import RequestError
from internlm2.model.heads import Model
from internlm2.parallel import TensorGroup, receive_tensors, send_tensors

T = TypeVar("T")


class Order(IntEnum):
    """What the others are to do: the first number of every message."""

    STOP = 0
    MOVE = 1
    FORWARD = 2
    LOGITS = 3


class Leader:
    """Gives orders to the other processes of `group`, one after the other.

    All of them are given by the engine's thread, which no signal interrupts: the processes do the same things in the
    same order. explain: what to say of an exception that ended an order, in whole sentences.
    """

    def __init__(self, group: TensorGroup, explain: Callable[[Exception], str]) -> None:
        self.group = group
        self._explain = explain
        self._error: RequestError | None = None

    def together(self, order: Order, tensors: list[torch.Tensor], work: Callable[[], T]) -> T:
        """Let every process do `order`; `work` is this one's part. Raises RequestError when a process is lost."""
        if self._error is not None:
            raise self._error
        try:
            send_tensors(self.group, [torch.tensor([order]), *tensors])
            return work()
        except Exception as error:
            # Whatever it was, the processes are no longer at the same place.
            self._error = RequestError(
                f"A model that is split over {self.group.size} processes cannot go on: {self._explain(error)} Load it "
                "again."
            )
            self.group.leave()  # so that the model can be loaded again in this process
            raise self._error from error

    def close(self) -> None:
        """Let the other processes go. A second call does nothing."""
        failed, self._error = self._error, RequestError("This model was closed. Load it again.")
        if failed is None:
            send_tensors(self.group, [torch.tensor([Order.STOP])])
            self.group.close()


class LeadingRunner(Runner):
    """The runner of rank 0: what it is asked for, every process does."""

    def __init__(self, model: Model, cache: PageCache, leader: Leader) -> None:
        super().__init__(model, cache)
        self._leader = leader

    def move(self, moves: Sequence[Move]) -> None:
        """As `Runner.move`."""
        if moves:
            numbers = [[move.direction is Direction.TO_HOST, move.page, move.host_page] for move in moves]
            own_part = partial(super().move, moves)
            self._leader.together(Order.MOVE, [torch.tensor(numbers)], own_part)

    def forward(self, batch: Batch) -> torch.Tensor:
        """As `Runner.forward`."""
        return self._leader.together(Order.FORWARD, pack_batch(batch), partial(super().forward, batch))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `Runner.logits`. The rows are sent: every process has computed them, but only rank 0 knows which."""
        rows, own_part = hidden.contiguous(), super().logits

        def work() -> torch.Tensor:
            self._leader.group.broadcast(rows)
            return own_part(rows)

        return self._leader.together(Order.LOGITS, [torch.tensor([len(rows)])], work)


@torch.inference_mode()
def follow(runner: Runner, group: TensorGroup) -> None:
    """Do what rank 0 says until it says stop. Raises RequestError when rank 0 is lost."""
    weight = runner.model.model.tok_embeddings.weight
    while True:
        order, *tensors = receive_tensors(group)
        match Order(int(order)):
            case Order.STOP:
                return
            case Order.MOVE:
                runner.move(
                    [
                        Move(Direction.TO_HOST if to_host else Direction.TO_DEVICE, page, host_page)
                        for to_host, page, host_page in tensors[0].tolist()
                    ]
                )
            case Order.FORWARD:
                runner.forward(unpack_batch(tensors, device=runner.device))
            case Order.LOGITS:
                rows = torch.empty(int(tensors[0]), weight.shape[1], dtype=weight.dtype, device=weight.device)
                runner.logits(group.broadcast(rows))


def pack_batch(batch: Batch) -> list[torch.Tensor]:
    """A batch as tensors on the CPU: (4, N) of each row, (spans, 4) with the number of runs, (runs, 2)."""
    assert not batch.adapters, "adapters are not split"
    rows = torch.stack((batch.input_ids, batch.positions, batch.limits, batch.slots)).cpu()
    spans = [[span.start, span.num_rows, span.first_position, len(span.runs)] for span in batch.spans]
    return [rows, torch.tensor(spans), torch.tensor([run for span in batch.spans for run in span.runs])]


def unpack_batch(tensors: Sequence[torch.Tensor], *, device: torch.device) -> Batch:
    """The batch that `pack_batch` made."""
    rows, numbers, all_runs = tensors
    spans: list[Span] = []
    runs = iter([(slot, count) for slot, count in all_runs.tolist()])
    for start, num_rows, first_position, num_runs in numbers.tolist():
        spans.append(Span(start, num_rows, first_position, tuple(next(runs) for _ in range(num_runs))))
    input_ids, positions, limits, slots = rows.to(device).unbind()
    return Batch(input_ids, positions, limits, slots, tuple(spans))
