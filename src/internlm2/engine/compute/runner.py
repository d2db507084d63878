"""Runs the network on a batch: the only place of the engine where the model is called."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from internlm2.engine.compute.attend import make_attend, table_of
from internlm2.engine.compute.batch import Batch
from internlm2.engine.compute.gpu_layers import gpu_steps
from internlm2.engine.compute.packed_layers import packed_layers
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.schedule.pages import Move
from internlm2.model.heads import CausalLM, Model, ValueModel

# Rows of every operation in deterministic mode. NOTE: torch computes what is left over at the end of a vector loop with
# other instructions, so not only matrix products but every exponential depends on the number of rows.
FIXED_ROWS = 64


class AdapterRows(Protocol):
    """Who applies LoRA adapters: told before a forward which rows use which, and which ones requests need."""

    def select(self, spans: Sequence[tuple[int, int, str]]) -> None: ...

    def hold(self, name: str, user: int) -> int: ...

    def release(self, name: str, user: int) -> None: ...


class Runner:
    """A model and the memory of its keys and values.

    adapters: told which rows of a batch use which adapter. is_deterministic: the result of a row depends on nothing
    but its own sequence, bit by bit (on a CPU with 1, 2, 4, ... threads); everything is then done for FIXED_ROWS
    rows at a time, which costs speed.
    """

    def __init__(
        self,
        model: Model,
        cache: PageCache,
        *,
        adapters: AdapterRows | None = None,
        is_deterministic: bool = False,
    ) -> None:
        self.model = model
        self.cache = cache
        self.adapters = adapters
        self._is_deterministic = is_deterministic
        self._packed = None if cache.pages is None else packed_layers(model)
        self._gpu = None if is_deterministic else gpu_steps(model, cache, is_adapted=adapters is not None)
        if is_deterministic:
            fix_rows(model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.model.tok_embeddings.weight.device

    def move(self, moves: Sequence[Move]) -> None:
        """Copy pages between the device and host memory."""
        self.cache.move(moves)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Final hidden states (N, C) of a batch; its keys and values are in the cache afterwards."""
        if self.adapters is not None:
            self.adapters.select(batch.adapters)
        if self._packed is not None and self.cache.pages is not None:
            return self._packed.forward(batch, self.cache.pages, table_of(batch, self.cache.pages))
        if self._gpu is not None:
            return self._gpu.forward(batch)
        num_rows = len(batch.input_ids)
        padding = (0, -num_rows % FIXED_ROWS) if self._is_deterministic else (0, 0)
        ids, positions, limits = (F.pad(x, padding) for x in (batch.input_ids, batch.positions, batch.limits))
        # Each token is a row of its own with its own limit: (N, 1).
        hidden = self.model.hidden_states(
            ids[:, None],
            position_ids=positions[:, None],
            length_limits=limits,
            attend=make_attend(self.cache, batch, is_alone=self._is_deterministic),
        )
        return hidden[:num_rows, 0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: (R, C) -> (R, V) float32."""
        assert isinstance(self.model, CausalLM)
        if not self._is_deterministic:
            return self.model.logits(hidden[:, None])[:, 0]
        # NOTE: a tied head is no module that `fix_rows` could replace, so the rows are fixed here.
        padded = F.pad(hidden, (0, 0, 0, -len(hidden) % FIXED_ROWS))
        blocks = [self.model.logits(block[:, None])[:, 0] for block in padded.split(FIXED_ROWS)]
        return torch.cat(blocks)[: len(hidden)]

    @torch.inference_mode()
    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a reward or value head says of each row. hidden: (R, C) -> (R,) float32."""
        assert isinstance(self.model, ValueModel)
        return self.model.v_head(hidden)[:, 0].float()


def fix_rows(model: nn.Module) -> None:
    """Make every linear of `model` work in blocks of FIXED_ROWS rows, so that no row feels its neighbours."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, _FixedRowsLinear(child))


class _FixedRowsLinear(nn.Linear):
    """The same weights as `base`; the kernel always sees the same shape, whatever the batch."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        """(..., in) -> (..., out)."""
        rows = input.reshape(-1, self.in_features)
        padded = F.pad(rows, (0, 0, 0, -len(rows) % FIXED_ROWS))
        out = torch.cat([F.linear(block, self.weight, self.bias) for block in padded.split(FIXED_ROWS)])
        return out[: len(rows)].view(*input.shape[:-1], self.out_features)
