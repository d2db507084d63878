"""Decoding steps as CUDA graphs: all kernels of a step are started by one call instead of hundreds.

A graph is made once for 1, 2, 4, 8, ... rows and replayed on buffers that never move. A smaller batch is padded with
rows that write nothing and see no keys. Page tables stay on the device and change only where a sequence got a page.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from internlm2.engine.compute.batch import Batch
from internlm2.engine.compute.gpu_attend import FEW_ROWS, AttendLayer, TableAttend, fill_row, pages_of

SIZES = (1, 2, 4, 8, 16, 32, 64)
_WARM_UPS = 2  # kernels are compiled, and libraries take their memory, before anything is recorded

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, AttendLayer], torch.Tensor]


class Graph(Protocol):
    """A recorded computation: `replay` does it again, on the same memory."""

    def replay(self) -> None: ...


class Capture(Protocol):
    """Records a computation, and says where its result lies after every replay."""

    def __call__(self, compute: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]: ...


class CudaCapture:
    """Records CUDA graphs that share one pool of memory, for they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """See Capture. `compute` runs a few times before, and must bear that."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(beside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()
        return graph, result


class DecodeGraphs:
    """Steps of few rows, each replayed from the graph of the next larger size.

    step: the network on rows, as `GpuLayers.forward`. most_pages: of one sequence. sizes: rows of the graphs, growing.
    """

    def __init__(
        self,
        step: Step,
        capture: Capture,
        *,
        page_size: int,
        most_pages: int,
        device: torch.device,
        sizes: tuple[int, ...] = SIZES,
    ) -> None:
        self._step, self._capture, self._page_size, self._sizes = step, capture, page_size, sizes
        self._most_pages = most_pages
        self._graphs: dict[int, tuple[Graph, torch.Tensor]] = {}
        # Of a row of padding: any token at position 0 of a sequence of 1, without a slot.
        self._padding = torch.tensor([[0], [0], [1], [-1]], device=device)
        self._rows = self._padding.repeat(1, sizes[-1])  # ids, positions, limits, slots: (4, rows)
        self._table = torch.zeros(sizes[-1], most_pages, dtype=torch.int32, device=device)
        self._host_table = torch.zeros(sizes[-1], most_pages, dtype=torch.int32)
        self._known: list[tuple[tuple[int, int], ...]] = [()] * sizes[-1]  # pages in each row of the table

    @property
    def num_graphs(self) -> int:
        """How many sizes have been recorded so far."""
        return len(self._graphs)

    def fits(self, batch: Batch) -> bool:
        """Whether `forward` takes the batch: few rows, few of each sequence, no adapters."""
        return (
            0 < len(batch.slots) <= self._sizes[-1]
            and not batch.adapters
            and all(span.num_rows <= FEW_ROWS for span in batch.spans)
            and all(span.num_keys <= self._most_pages * self._page_size for span in batch.spans)
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Final hidden states (N, C) of a batch that fits."""
        num_rows = len(batch.slots)
        size = next(size for size in self._sizes if size >= num_rows)
        self._fill(batch, size)
        if size not in self._graphs:
            self._graphs[size] = self._capture(lambda: self._compute(size))
        graph, result = self._graphs[size]
        graph.replay()
        return result[:num_rows].clone()  # the next replay overwrites it

    def _compute(self, size: int) -> torch.Tensor:
        ids, positions, limits, slots = self._rows[:, :size].unbind()
        # NOTE: a product, for `torch.where` with a number copies it to the device, which cannot be recorded.
        lengths = ((positions + 1) * (slots >= 0)).to(torch.int32)
        return self._step(ids, positions, limits, slots, TableAttend(self._table[:size], lengths))

    def _fill(self, batch: Batch, size: int) -> None:
        num_rows = len(batch.slots)
        for own, new in zip(
            self._rows, (batch.input_ids, batch.positions, batch.limits, batch.slots), strict=True
        ):
            own[:num_rows] = new
        if num_rows < size:
            self._rows[:, num_rows:size] = self._padding
        changed: list[int] = []
        width = 0
        for span in batch.spans:
            pages = pages_of(span, self._page_size)
            for row in range(span.start, span.start + span.num_rows):
                if self._known[row] != pages:
                    fill_row(self._host_table[row], pages)
                    self._known[row] = pages
                    changed.append(row)
                    width = max(width, sum(count for _, count in pages))
        if changed:
            part = slice(changed[0], changed[-1] + 1), slice(0, width)
            self._table[part].copy_(self._host_table[part])
