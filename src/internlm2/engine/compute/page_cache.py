"""The memory behind the pages: keys and values of every layer, on the device and in host memory.

A slot is page * page_size + offset, so pages that follow each other are one piece of memory that attention can read
in place. Memory is reserved at once and touched only where it is written (on a CPU an unused page costs nothing).
"""

import math
from collections.abc import Sequence

import torch

from internlm2.engine.schedule.pages import Direction, Move
from internlm2.kernels.attention import Pages
from internlm2.kernels.packed import allocate
from internlm2.model.config import ModelConfig
from internlm2.quant import kv


class PageCache:
    """Storage for `num_pages` pages on `device` and `num_host_pages` in host memory.

    num_key_value_heads: of this process (fewer than the model's under tensor parallelism). kv_dtype: "int8", or
    None for the dtype of the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: str | None = None,
        num_host_pages: int = 0,
        num_key_value_heads: int | None = None,
    ) -> None:
        self.page_size = page_size
        self.dtype = dtype
        self.is_int8 = kv_dtype == "int8"
        heads = num_key_value_heads or config.num_key_value_heads
        shape = (config.num_hidden_layers, num_pages * page_size, heads, config.head_dim)
        stored = torch.int8 if self.is_int8 else dtype
        self.keys = _reserve(shape, stored, device)  # (layers, slots, K, D)
        self.values = _reserve(shape, stored, device)
        self._blocks = [self.keys, self.values]
        if self.is_int8:
            self.key_scales = torch.empty(shape[:3], dtype=torch.float32, device=device)  # (layers, slots, K)
            self.value_scales = torch.empty_like(self.key_scales)
            self._blocks += [self.key_scales, self.value_scales]
        # What the kernels of the CPU read; None for other devices and dtypes.
        self.pages: Pages | None = None
        if Pages.takes(stored, self.keys.device, config.head_dim):
            scales = (self.key_scales, self.value_scales) if self.is_int8 else ()
            self.pages = Pages(self.keys, self.values, *scales)
        self._host = [self._host_block(block, num_host_pages * page_size) for block in self._blocks]

    @staticmethod
    def _host_block(block: torch.Tensor, num_slots: int) -> torch.Tensor:
        shape = (block.shape[0], num_slots, *block.shape[2:])
        return torch.empty(shape, dtype=block.dtype, pin_memory=block.is_cuda and num_slots > 0)

    @property
    def num_bytes(self) -> int:
        """Bytes reserved on the device."""
        return sum(block.nbytes for block in self._blocks)

    def write(
        self, layer: int, slots: torch.Tensor, first_slot: int | None, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Store keys and values (N, K, D) of `layer` at `slots` (N,) int64.

        first_slot: given when the slots follow each other from there on, which is faster.
        """
        new = [k, v]
        if self.is_int8:
            (k8, k_scale), (v8, v_scale) = kv.quantize(k), kv.quantize(v)
            new = [k8, v8, k_scale, v_scale]
        for block, part in zip(self._blocks, new, strict=True):
            if first_slot is None:
                block[layer].index_copy_(0, slots, part)
            else:
                block[layer, first_slot : first_slot + len(part)] = part

    def read(self, layer: int, slots: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (S, K, D) of `layer`: a view for a slice, a copy for indices or int8."""
        k, v = self.keys[layer, slots], self.values[layer, slots]
        if self.is_int8:
            k = kv.dequantize(k, self.key_scales[layer, slots], self.dtype)
            v = kv.dequantize(v, self.value_scales[layer, slots], self.dtype)
        return k, v

    def move(self, moves: Sequence[Move]) -> None:
        """Copy pages between the device and host memory, in order."""
        for move in moves:
            page, host_page = self._slots(move.page), self._slots(move.host_page)
            for block, host in zip(self._blocks, self._host, strict=True):
                if move.direction is Direction.TO_HOST:
                    host[:, host_page].copy_(block[:, page])
                else:
                    block[:, page].copy_(host[:, host_page])

    def _slots(self, page: int) -> slice:
        return slice(page * self.page_size, (page + 1) * self.page_size)


def _reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for keys or values; on huge pages on a CPU, where one core then reads it about 1.5 times as fast."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
