"""A network one layer at a time: a text goes through layer after layer, so two layers are all that is in memory.

Calibration takes a layer in four steps (queries, keys and values; wo; w1 and w3; w2), so that each weight is rounded
for inputs that come from what is rounded already, and each product is computed once. The report of losses watches
whole layers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from internlm2.errors import RequestError
from internlm2.model.attention import Attention, causal_attend
from internlm2.model.config import ModelConfig
from internlm2.model.layers import DecoderLayer, FeedForward, RMSNorm
from internlm2.model.rope import rotary
from internlm2.quant.calibrate import InputStatistics, round_calibrated, round_nearest
from internlm2.quant.channel_scales import (
    scale_after_norm,
    scale_hidden_units,
    scale_values,
    scales_after_norm,
)
from internlm2.quant.weight import Rounded, WeightFormat

SEQUENCE_TOKENS = 512
_SEQUENCES_AT_ONCE = 4
_FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

Observe = Callable[[str, torch.Tensor], None]


class Stream:
    """The hidden states of a text on their way through the layers. hidden: (S, T, C)."""

    def __init__(self, config: ModelConfig, embeddings: torch.Tensor) -> None:
        """embeddings: (S, T, C), of S sequences of T tokens."""
        self.hidden = embeddings
        length = embeddings.shape[1]
        positions = torch.arange(length)[None]
        self._angles = rotary(config, positions, torch.full((1,), length))

    @torch.no_grad()
    def through(self, layer: nn.Module, *, is_kept: bool = True) -> None:
        """Run a layer over all sequences. is_kept: its outputs become the hidden states."""
        for first in range(0, len(self.hidden), _SEQUENCES_AT_ONCE):
            part = slice(first, first + _SEQUENCES_AT_ONCE)
            out = layer(self.hidden[part], self._angles, causal_attend)
            if is_kept:
                self.hidden[part] = out

    def normalised(self, norm: nn.Module) -> torch.Tensor:
        """What a norm makes of the hidden states, (S, T, C)."""
        return torch.cat([norm(part) for part in self.hidden.split(_SEQUENCES_AT_ONCE)])

    def attended(self, attention: Attention, x: torch.Tensor) -> torch.Tensor:
        """What `wo` is given when the attention is given x, (S, T, C) -> (S, T, H * D)."""
        wo = attention.wo
        attention.add_module("wo", nn.Identity())
        try:
            parts = x.split(_SEQUENCES_AT_ONCE)
            return torch.cat([attention(part, self._angles, causal_attend) for part in parts])
        finally:
            attention.add_module("wo", wo)

    def add(self, linear: nn.Module, x: torch.Tensor) -> None:
        """Add what a linear makes of x, (S, T, any), to the hidden states."""
        parts = zip(self.hidden.split(_SEQUENCES_AT_ONCE), x.split(_SEQUENCES_AT_ONCE), strict=True)
        for hidden, part in parts:
            hidden.add_(linear(part))


@dataclass(frozen=True)
class Calibration:
    """How weights are rounded with the help of a text.

    scales_columns: large inputs get finer columns (AWQ). compensates: columns make up for the errors of those before
    (GPTQ); otherwise each weight goes to the nearest. stored_dtype: of the norms.
    """

    fmt: WeightFormat
    group: int
    scales_columns: bool
    compensates: bool
    stored_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class CalibratedLayer:
    """Names within the layer, such as "attention.wqkv.weight" -> rounded matrices, and what stays in floats."""

    rounded: Mapping[str, Rounded]
    kept: Mapping[str, torch.Tensor]


@contextmanager
def observing(layer: nn.Module, names: Iterator[str] | list[str], observe: Observe) -> Iterator[None]:
    """Within the block, `observe(name, input)` sees what the linears `names` of a layer are given, (..., C)."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _module, inputs: observe(name, inputs[0])

    hooks = [layer.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def calibrate_layer(layer: DecoderLayer, stream: Stream, how: Calibration) -> CalibratedLayer:
    """Round the five linears of a layer for what `stream` gives them; the layer and the stream go on rounded."""
    rounder = _Rounder(how)
    attention, feed_forward = layer.attention, layer.feed_forward
    wqkv, wo, w1, w2, w3 = (
        _linear(layer, name) for name in ("attention.wqkv", "attention.wo", *_FEED_FORWARD)
    )

    x = stream.normalised(layer.attention_norm)
    seen = statistics_of(x)
    if how.scales_columns:
        scale_values(attention, statistics_of(stream.attended(attention, x)), how.fmt, how.group)
    x, seen = rounder.turn_norm(layer.attention_norm, [wqkv.weight], x, seen)
    rounder.round("attention.wqkv.weight", wqkv, seen)
    x = stream.attended(attention, x)
    rounder.round("attention.wo.weight", wo, statistics_of(x))
    stream.add(wo, x)

    x = stream.normalised(layer.ffn_norm)
    seen = statistics_of(x)
    if how.scales_columns:
        scale_hidden_units(feed_forward, statistics_of(_gated(feed_forward, x)), how.fmt, how.group)
    x, seen = rounder.turn_norm(layer.ffn_norm, [w1.weight, w3.weight], x, seen)
    rounder.round("feed_forward.w1.weight", w1, seen)
    rounder.round("feed_forward.w3.weight", w3, seen)
    x = _gated(feed_forward, x)
    rounder.round("feed_forward.w2.weight", w2, statistics_of(x))
    stream.add(w2, x)

    kept = {name: p.detach() for name, p in layer.named_parameters() if name not in rounder.rounded}
    return CalibratedLayer(rounder.rounded, kept)


class _Rounder:
    """Rounds one linear after the other, which go on with their rounded weights."""

    def __init__(self, how: Calibration) -> None:
        self._how = how
        self.rounded: dict[str, Rounded] = {}

    def turn_norm(
        self, norm: RMSNorm, weights: list[torch.Tensor], x: torch.Tensor, seen: InputStatistics
    ) -> tuple[torch.Tensor, InputStatistics]:
        """Bring a norm into the form in which it is stored, and its readers with it. Returns the new x and its sums."""
        how = self._how
        scales = torch.ones_like(norm.weight)
        if how.scales_columns:
            scales = scales_after_norm(weights, seen, how.fmt, how.group)
        factors = scale_after_norm(norm, weights, scales, how.stored_dtype)
        return x.div_(factors), seen.divided(factors)

    def round(self, name: str, linear: nn.Linear, seen: InputStatistics) -> None:
        """Round a linear's weight for the inputs that were seen."""
        how = self._how
        if how.compensates:
            rounded = round_calibrated(linear.weight, how.fmt, how.group, seen)
        else:
            rounded = round_nearest(linear.weight, how.fmt, how.group, seen.mean())
        linear.weight.copy_(rounded.values())
        self.rounded[name] = rounded


def statistics_of(x: torch.Tensor) -> InputStatistics:
    """The statistics of x, (S, T, C)."""
    statistics = InputStatistics(x.shape[-1])
    for part in x.split(_SEQUENCES_AT_ONCE):
        statistics.add(part)
    return statistics


def _gated(feed_forward: FeedForward, x: torch.Tensor) -> torch.Tensor:
    """What w2 is given, (S, T, F)."""
    parts = x.split(_SEQUENCES_AT_ONCE)
    return torch.cat([F.silu(feed_forward.w1(part)) * feed_forward.w3(part) for part in parts])


def sequences(ids: list[int], *, length: int = SEQUENCE_TOKENS) -> torch.Tensor:
    """Cut a text into sequences of the same length, (S, T) int64; a rest is left out. Raises RequestError.

    A text shorter than one sequence is one sequence.
    """
    if len(ids) < 2:
        raise RequestError("The text has fewer than 2 tokens. Give a longer one.")
    length = min(length, len(ids))
    whole = len(ids) // length * length
    return torch.tensor(ids[:whole], dtype=torch.int64).view(-1, length)


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
