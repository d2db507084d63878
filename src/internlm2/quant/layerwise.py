"""A network one layer at a time: a text goes through layer after layer, so two layers are all that is in memory.

What each linear of a layer is given is shown to an observer; calibration and the report of losses are two of them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from internlm2.errors import RequestError
from internlm2.model.attention import causal_attend
from internlm2.model.config import ModelConfig
from internlm2.model.layers import DecoderLayer
from internlm2.model.rope import rotary
from internlm2.quant.calibrate import InputStatistics, round_calibrated
from internlm2.quant.weight import Rounded, WeightFormat

SEQUENCE_TOKENS = 512
_SEQUENCES_AT_ONCE = 4
_INPUT_OF = {  # a linear -> the linear whose input is the same
    "attention.wqkv": "attention.wqkv",
    "attention.wo": "attention.wo",
    "feed_forward.w1": "feed_forward.w1",
    "feed_forward.w3": "feed_forward.w1",
    "feed_forward.w2": "feed_forward.w2",
}

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
def calibrate_layer(
    layer: DecoderLayer, stream: Stream, fmt: WeightFormat, group: int
) -> Mapping[str, Rounded]:
    """Round the five linears of a layer against what `stream` gives them; the layer and the stream go on rounded.

    Returns the name within the layer, such as "attention.wqkv", and the rounded weight of each.
    """
    observed = sorted(set(_INPUT_OF.values()))
    statistics = {name: InputStatistics(_linear(layer, name).in_features) for name in observed}
    with observing(layer, observed, lambda name, x: statistics[name].add(x)):
        stream.through(layer, is_kept=False)
    rounded: dict[str, Rounded] = {}
    for name, observed_name in _INPUT_OF.items():
        linear = _linear(layer, name)
        rounded[name] = round_calibrated(linear.weight, fmt, group, statistics[observed_name])
        linear.weight.copy_(rounded[name].values())
    stream.through(layer)
    return rounded


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
