"""What quantisation loses on a text: perplexity, agreement on the likeliest token, divergence, each linear's error.

Both networks are run side by side, a layer of each at a time. A linear's error is that of its output on the inputs that
the unquantised network gives it, so errors do not add up; what adds up is seen in the outputs.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from internlm2.model.layers import DecoderLayer, FeedForward
from internlm2.quant.layerwise import Stream, observing
from internlm2.quant.linear import PackedFeedForward

_ROWS_AT_ONCE = 128

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LossReport:
    """What a quantised model loses. perplexity: of the text, before and after. top1_agreement: share of positions at
    which both find the same token the likeliest, 0 to 1. kl_mean, kl_p99: divergence of the next-token distributions
    from the unquantised ones, in nats; p99: 99 of 100 positions are below. linear_errors: layer and linear ->
    |difference| / |output|. weight_bytes: of all weight files, before and after.
    """

    num_tokens: int
    perplexity: tuple[float, float]
    top1_agreement: float
    kl_mean: float
    kl_p99: float
    linear_errors: dict[str, float]
    weight_bytes: tuple[int, int]

    @property
    def perplexity_rise(self) -> float:
        """0.01: by one per cent."""
        return self.perplexity[1] / self.perplexity[0] - 1

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return asdict(self) | {"perplexity_rise": self.perplexity_rise}

    def as_text(self) -> str:
        """For people: the figures, then a line for each layer."""
        before, after = self.perplexity
        sizes = [size / 1e6 for size in self.weight_bytes]
        lines = [
            f"On {self.num_tokens:,} tokens, against the unquantised model:",
            f"  perplexity        {before:.3f} -> {after:.3f} ({100 * self.perplexity_rise:+.2f} %)",
            f"  top-1 agreement   {100 * self.top1_agreement:.2f} %",
            f"  KL divergence     mean {self.kl_mean:.5f}, 99 % below {self.kl_p99:.4f}",
            f"  weight files      {sizes[0]:,.1f} -> {sizes[1]:,.1f} MB ({100 * sizes[1] / sizes[0]:.0f} %)",
        ]
        names = sorted({name.split(".", 1)[1] for name in self.linear_errors})
        layers = sorted({int(name.split(".", 1)[0]) for name in self.linear_errors})
        lines += ["", "Error of the output in %" + "".join(f"{name.split('.')[-1]:>9}" for name in names)]
        for layer in layers:
            errors = (self.linear_errors[f"{layer}.{name}"] for name in names)
            lines.append(f"  layer {layer:<16}" + "".join(f"{100 * error:>9.2f}" for error in errors))
        return "\n".join(lines)


@dataclass
class _Error:
    """Sums of squares, of the differences and of what is expected."""

    difference: float = 0.0
    expected: float = 0.0

    def add(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        self.difference += float((found.float() - expected.float()).square().sum(dtype=torch.float64))
        self.expected += float(expected.float().square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        return math.sqrt(self.difference / self.expected) if self.expected else 0.0


@torch.no_grad()
def compare_layers(
    plain: DecoderLayer, other: DecoderLayer, stream: Stream, other_stream: Stream
) -> dict[str, float]:
    """Send both streams through a layer of theirs; the name of each linear and the relative error of `other`'s."""
    errors: dict[str, _Error] = {}

    def observe(name: str, x: torch.Tensor) -> None:
        shown = "feed_forward.w13" if name == "feed_forward.w1" else name
        error = errors.setdefault(shown, _Error())
        for rows in x.reshape(-1, x.shape[-1]).split(1024):
            error.add(_output(other, name, rows), _output(plain, name, rows))

    with observing(plain, ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2"], observe):
        stream.through(plain)
    other_stream.through(other)
    return {name: error.relative for name, error in errors.items()}


def _output(layer: DecoderLayer, name: str, x: torch.Tensor) -> torch.Tensor:
    """What a linear makes of x; w1 stands for silu(w1 x) * w3 x. NOTE: not through the module, whose hook calls us."""
    feed_forward: nn.Module = layer.feed_forward
    if name == "feed_forward.w1":
        if isinstance(feed_forward, PackedFeedForward):
            return feed_forward.w13(x)
        assert isinstance(feed_forward, FeedForward)
        return F.silu(feed_forward.w1.forward(x)) * feed_forward.w3.forward(x)
    return layer.get_submodule(name).forward(x)


@dataclass
class OutputComparison:
    """Collects what the outputs of two networks say about a text."""

    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])
    num_predicted: int = 0
    num_agreed: int = 0
    divergences: list[torch.Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(
        self, ids: torch.Tensor, hidden: tuple[torch.Tensor, torch.Tensor], heads: tuple[Logits, Logits]
    ) -> None:
        """ids: (T,) of one sequence. hidden: (T, C) after the final norm, of both. heads: -> (rows, V) float32."""
        targets = F.pad(ids[1:], (0, 1), value=-1)
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            logprobs = [head(x[rows]).log_softmax(-1) for x, head in zip(hidden, heads, strict=True)]
            is_known = targets[rows] >= 0
            wanted = targets[rows].clamp(min=0)[:, None]
            for i, one in enumerate(logprobs):
                self.losses[i] -= float(one.gather(1, wanted)[:, 0][is_known].sum(dtype=torch.float64))
            self.num_predicted += int(is_known.sum())
            self.num_agreed += int((logprobs[0].argmax(-1) == logprobs[1].argmax(-1)).sum())
            self.divergences.append((logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum(-1))

    def report(self, *, linear_errors: dict[str, float], weight_bytes: tuple[int, int]) -> LossReport:
        """The figures of everything that was added."""
        divergences = torch.cat(self.divergences)
        before, after = (math.exp(loss / self.num_predicted) for loss in self.losses)
        return LossReport(
            num_tokens=len(divergences),
            perplexity=(before, after),
            top1_agreement=self.num_agreed / len(divergences),
            kl_mean=float(divergences.mean()),
            kl_p99=float(divergences.quantile(0.99)),
            linear_errors=linear_errors,
            weight_bytes=weight_bytes,
        )
