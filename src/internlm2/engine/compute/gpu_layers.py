"""All layers of a model on a GPU: the network's modules for the products, kernels for what stands between them.

The same mathematics as `Model.hidden_states`, on rows instead of a batch of sequences. Whatever differs between two
steps lies in the tensors that it is given, so that a CUDA graph can replay it (`graphs.py`).
"""

import torch
from torch import nn

from internlm2.engine.compute.batch import Batch
from internlm2.engine.compute.gpu_attend import AttendLayer, BatchAttend, layer_pages
from internlm2.engine.compute.graphs import Capture, CudaCapture, DecodeGraphs
from internlm2.engine.compute.page_cache import PageCache
from internlm2.kernels.gpu.available import current, has_triton
from internlm2.kernels.gpu.elementwise import rms_norm, rotate_and_store, swiglu
from internlm2.model.attention import Attention
from internlm2.model.heads import Model
from internlm2.model.layers import DecoderLayer, FeedForward, RMSNorm
from internlm2.model.rope import rotary
from internlm2.parallel.tensor import SummedLinear
from internlm2.quant.gpu import GpuFeedForward


class GpuLayers:
    """The layers of `model`, whose keys and values lie in `cache`. Plain w1 and w3 become views of one weight."""

    def __init__(self, model: Model, cache: PageCache) -> None:
        assert takes_layers(model)
        self._model = model
        self._pages = [layer_pages(cache, layer) for layer in range(model.config.num_hidden_layers)]
        self._blocks = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
        self._joined = [_join_gate(layer.feed_forward) for layer in self._blocks]

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        limits: torch.Tensor,
        slots: torch.Tensor,
        attend: AttendLayer,
    ) -> torch.Tensor:
        """All (N,) int64; a row with a negative slot is padding. Returns the final hidden states (N, C)."""
        trunk = self._model.model
        angles = rotary(self._model.config, positions[:, None], limits)
        cos, sin = angles.cos[:, 0], angles.sin[:, 0]  # (N, D)
        hidden, add = trunk.tok_embeddings(input_ids), None
        for layer, pages, joined in zip(self._blocks, self._pages, self._joined, strict=True):
            hidden, x = _norm(layer.attention_norm, hidden, add)
            attention = layer.attention
            q = rotate_and_store(attention.wqkv(x), cos, sin, pages, slots)  # (N, H, D)
            add = attention.wo(attend(q, pages, scale=attention.meta.scale).flatten(1))
            hidden, x = _norm(layer.ffn_norm, hidden, add)
            add = _feed_forward(layer.feed_forward, joined, x)
        return _norm(trunk.norm, hidden, add)[1]


class GpuSteps:
    """One step after the other on a GPU: by a replayed graph where one fits, else kernel by kernel."""

    def __init__(self, model: Model, cache: PageCache, *, capture: Capture | None) -> None:
        self._layers = GpuLayers(model, cache)
        self._page_size = cache.page_size
        self.graphs: DecodeGraphs | None = None
        if capture is not None:
            num_pages = cache.keys.shape[1] // cache.page_size
            self.graphs = DecodeGraphs(
                self._layers.forward,
                capture,
                page_size=cache.page_size,
                most_pages=num_pages,
                device=cache.keys.device,
            )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Final hidden states (N, C); the batch's keys and values are in the cache afterwards."""
        with current(batch.slots.device):
            if self.graphs is not None and self.graphs.fits(batch):
                return self.graphs.forward(batch)
            attend = BatchAttend(batch, page_size=self._page_size)
            return self._layers.forward(batch.input_ids, batch.positions, batch.limits, batch.slots, attend)


def gpu_steps(model: Model, cache: PageCache, *, is_adapted: bool) -> GpuSteps | None:
    """None on other devices, without Triton, and for models that are not the network's own.

    is_adapted: which rows have an adapter differs from step to step, so nothing is replayed; nor is it for a model
    that is split over processes.
    """
    if not cache.keys.is_cuda or not has_triton() or not takes_layers(model):
        return None
    is_split = any(isinstance(module, SummedLinear) for module in model.modules())
    return GpuSteps(model, cache, capture=None if is_adapted or is_split else CudaCapture())


def takes_layers(model: Model) -> bool:
    """Whether all layers are the network's own, with any linears in them."""
    return isinstance(model.model.norm, RMSNorm) and all(
        type(layer) is DecoderLayer
        and type(layer.attention) is Attention
        and isinstance(layer.attention_norm, RMSNorm)
        and isinstance(layer.ffn_norm, RMSNorm)
        and type(layer.feed_forward) in (FeedForward, GpuFeedForward)
        for layer in model.model.layers
    )


def _norm(
    module: nn.Module, hidden: torch.Tensor, add: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(module, RMSNorm)
    return rms_norm(hidden, module.weight, eps=module.eps, add=add)


def _feed_forward(module: nn.Module, joined: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """x: (N, C) -> (N, C)."""
    if not isinstance(module, FeedForward):
        return module(x)
    if joined is None:
        return module.w2(swiglu(torch.cat((module.w1(x), module.w3(x)), dim=1)))
    return module.w2(swiglu(nn.functional.linear(x, joined)))


def _join_gate(module: nn.Module) -> torch.Tensor | None:
    """w1 and w3 as one weight (2 F, C), of which both become views; None where they are more than a product."""
    if not isinstance(module, FeedForward) or {type(module.w1), type(module.w3)} != {nn.Linear}:
        return None
    joined = torch.cat((module.w1.weight.detach(), module.w3.weight.detach()))
    half = len(module.w1.weight)
    module.w1.weight = nn.Parameter(joined[:half], requires_grad=False)
    module.w3.weight = nn.Parameter(joined[half:], requires_grad=False)
    return joined
