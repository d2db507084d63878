"""Scales for the columns of a weight, undone where its inputs are made (AWQ, arXiv 2306.00978).

A column that meets large inputs should be rounded finely. Multiplying it by s > 1 before rounding does that, for its
group's step grows less than s; what makes the inputs is divided by s, so the product is the same. How strongly sizes
count, s = size^p, is tried out for several p, and the one whose products change least on the text is kept; p = 0 is no
scaling and is always tried. What makes the inputs is a norm's weight, a row of w3 before w2, a value row before wo.
"""

import torch

from internlm2.model.attention import Attention
from internlm2.model.layers import FeedForward, RMSNorm
from internlm2.quant.calibrate import InputStatistics, round_nearest
from internlm2.quant.weight import WeightFormat

_POWERS = tuple(i / 10 for i in range(11))
_ROWS = 256  # of a weight decide about its columns
_SMALLEST_SIZE = 1e-3  # of the mean size: a column that nearly never counts is not blown up without end


@torch.no_grad()
def find_scales(
    weights: list[torch.Tensor], sizes: torch.Tensor, fmt: WeightFormat, group: int, hessian: torch.Tensor
) -> torch.Tensor:
    """(C,) positive scales for the columns of `weights`, (N, C) each, which share their inputs.

    sizes: (C,) of the inputs. hessian: (C, C), the mean of x x^T over the inputs.
    """
    samples = [w[:: max(1, len(w) // _ROWS)].float() for w in weights]
    sizes = sizes.clamp(min=float(sizes.mean()) * _SMALLEST_SIZE)
    best: tuple[float, torch.Tensor] | None = None
    for power in _POWERS:
        scales = sizes.where(sizes > 0, 1) ** power
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for sample in samples:
            rounded = round_nearest(sample * scales, fmt, group, hessian / scales / scales[:, None])
            moved = rounded.values() / scales - sample
            error += float(((moved @ hessian) * moved).sum(dtype=torch.float64))
        if best is None or error < best[0]:
            best = error, scales
    assert best is not None
    return best[1]


@torch.no_grad()
def scale_after_norm(
    norm: RMSNorm, weights: list[torch.Tensor], scales: torch.Tensor, stored_dtype: torch.dtype
) -> torch.Tensor:
    """Divide a norm's weight by `scales` and multiply the columns of what reads it; both are changed in place.

    The norm's weight is rounded to `stored_dtype` here and the columns make up for it. Returns the factors, (C,).
    """
    before = norm.weight.clone()
    after = (before / scales).to(stored_dtype).float()
    factors = (before / after.where(after != 0, 1)).where(after != 0, 1)
    norm.weight.copy_(after)
    for weight in weights:
        weight.mul_(factors)
    return factors


@torch.no_grad()
def scale_hidden_units(
    feed_forward: FeedForward, statistics: InputStatistics, fmt: WeightFormat, group: int
) -> None:
    """Scale the columns of w2 and divide the rows of w3. statistics: of what w2 is given."""
    hessian = statistics.mean()
    scales = find_scales([feed_forward.w2.weight], _sizes(hessian), fmt, group, hessian)
    feed_forward.w2.weight.mul_(scales)
    feed_forward.w3.weight.div_(scales[:, None])


@torch.no_grad()
def scale_values(attention: Attention, statistics: InputStatistics, fmt: WeightFormat, group: int) -> None:
    """Scale the columns of wo and divide the values' rows, each of which all query heads of its group share.

    statistics: of what wo is given.
    """
    hessian = statistics.mean()
    heads, queries, width = attention.num_key_value_heads, attention.queries_per_group, attention.head_dim
    sizes = hessian.diagonal().view(heads, queries, width).mean(1, keepdim=True).sqrt()
    shared = sizes.expand(heads, queries, width).reshape(-1)
    scales = find_scales([attention.wo.weight], shared, fmt, group, hessian)
    attention.wo.weight.mul_(scales)
    of_values = scales.view(heads, queries, width)[:, 0]
    attention.wqkv.weight.view(heads, queries + 2, width, -1)[:, -1].div_(of_values[..., None])
    if attention.wqkv.bias is not None:
        attention.wqkv.bias.view(heads, queries + 2, width)[:, -1].div_(of_values)


def scales_after_norm(
    weights: list[torch.Tensor], statistics: InputStatistics, fmt: WeightFormat, group: int
) -> torch.Tensor:
    """`find_scales` for what reads a norm. statistics: of what the norm gives."""
    hessian = statistics.mean()
    return find_scales(weights, _sizes(hessian), fmt, group, hessian)


def _sizes(hessian: torch.Tensor) -> torch.Tensor:
    return hessian.diagonal().clamp(min=0).sqrt()
