"""Draw one token a row: temperature, then top-k, top-p, min-p, typical, each over what the one before kept.

The law is that of transformers' warpers, computed in float64, with two rules of our own: among equal logits the
smaller id comes first, and the token is the inverse of the cumulative distribution at one uniform number u (over
ids in rising order without filters, over ranks with them; in float32 weights without, float64 with).
A full sort is slow. So filters look at the best 256 tokens and at the mass of the whole row, and a row whose kept
tokens are not provably among those 256, or that lies on the edge of top-p, is sorted on its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from internlm2.engine.sampling.params import SamplingParams

NUM_CANDIDATES = 256
BLOCK = 128  # ids; maxima and sums of blocks are many times faster than argmax and cumsum over a row
CANDIDATE_BLOCKS = (32, 8)
# NOTE: relative error of a row's mass in float32: the exponent of a token that counts is above -18 and rounded
# twice (2 * 18 * 2^-24), exp and the sum of a block add less than that again. A row this near the edge is sorted.
MARGIN = 1e-5


@dataclass(frozen=True)
class Shortlist:
    """The tokens that a row may become. ids: (R, K) int64, best first. weights: (R, K) float64, 0 where cut.

    is_exact: for each row, whether no token beyond the K can be kept and every cut is certain.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    is_exact: list[bool]


@dataclass(frozen=True)
class Draw:
    """What one row needs besides its logits. top: its largest logit, finite. uniform: a number in [0, 1)."""

    params: SamplingParams
    top: float
    uniform: float


def best(logits: torch.Tensor) -> tuple[list[float], list[int]]:
    """The largest logit of each row of (R, V) and the first id that has it; NaN where the row holds a NaN."""
    blocks = _in_blocks(logits, BLOCK, fill=-math.inf)  # (R, V / BLOCK, BLOCK)
    top, block = blocks.amax(-1).max(-1)  # (R,)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].argmax(-1)
    return top.tolist(), (block * BLOCK + inside).tolist()


def draw(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """One id for each row of logits (R, V) float32; every temperature is above 0."""
    tokens = [0] * len(draws)
    filtered = [row for row, one in enumerate(draws) if is_filtered(one.params)]
    free = [row for row, one in enumerate(draws) if not is_filtered(one.params)]
    for rows, draw_rows in ((free, _draw_free), (filtered, _draw_filtered)):
        if rows:
            found = draw_rows(select_rows(logits, rows), [draws[row] for row in rows])
            for row, token in zip(rows, found, strict=True):
                tokens[row] = token
    return tokens


def is_filtered(params: SamplingParams) -> bool:
    """Whether anything besides the temperature shapes the distribution."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1


def select_rows(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Those rows, in rising order; no copy when it is all of them."""
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))


def _draw_free(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Inverse of the cumulative distribution in order of ids: first the block, then the token within it."""
    tokens: list[int] = []
    for part in _slices(logits):
        blocks = _in_blocks(_chances(logits[part], draws[part]), BLOCK, fill=0.0)  # (R, V / BLOCK, BLOCK)
        block, rest = _invert(blocks.sum(-1).double().cpu(), uniforms=_uniforms(draws[part]))
        rows = torch.arange(len(blocks), device=blocks.device)
        within = blocks[rows, block.to(blocks.device)].double().cpu()  # (R, BLOCK)
        inside, _ = _invert(within, targets=rest)
        tokens += (block * BLOCK + inside).tolist()
    return tokens


def _draw_filtered(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    short = shortlist(logits, draws)
    tokens = _draw_ranked(short, draws)
    for row, is_exact in enumerate(short.is_exact):
        if not is_exact:
            tokens[row] = _draw_ranked(full_list(logits[row], draws[row].params), draws[row : row + 1])[0]
    return tokens


def _draw_ranked(short: Shortlist, draws: Sequence[Draw]) -> list[int]:
    rank, _ = _invert(short.weights, uniforms=_uniforms(draws))
    return short.ids.gather(1, rank[:, None])[:, 0].tolist()


def _uniforms(draws: Sequence[Draw]) -> torch.Tensor:
    return torch.tensor([one.uniform for one in draws], dtype=torch.float64)


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def _invert(
    weights: torch.Tensor, *, uniforms: torch.Tensor | None = None, targets: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first place of each row where the cumulative weight exceeds the target, and what is left of the target.

    weights: (R, n) float64, not negative, not all 0. targets: (R,) float64; or uniforms: the same as shares of the
    whole weight. The weight at the place is always above 0.
    """
    cumulative = weights.cumsum(-1)
    last = cumulative[:, -1]
    if targets is None:
        assert uniforms is not None
        targets = uniforms * last
    below = last.nextafter(torch.zeros_like(last))  # rounding may reach the end
    targets = torch.minimum(targets, below)[:, None]
    place = (cumulative <= targets).sum(-1, keepdim=True)
    before = F.pad(cumulative, (1, 0)).gather(1, place)
    return place[:, 0], (targets - before)[:, 0]


def shortlist(logits: torch.Tensor, draws: Sequence[Draw]) -> Shortlist:
    """What the filters keep among the best tokens of each row of logits (R, V)."""
    values, ids = _candidates(logits)  # (R, K)
    params = [one.params for one in draws]
    if values.shape[1] == logits.shape[1]:  # nothing lies beyond
        scaled = (values.double() - values[:, :1]) / _column([one.temperature for one in params])
        weights, _ = _keep(values, params, scaled.exp().sum(-1), margin=0.0)
        return Shortlist(ids, weights, [True] * len(params))
    masses = torch.zeros(len(params), dtype=torch.float64)
    if any(one.top_p < 1 and not one.top_k for one in params):
        masses = _masses(logits, draws)
    weights, is_open = _keep(values, params, masses, margin=MARGIN)
    return Shortlist(ids, weights, (~is_open).tolist())


def full_list(logits: torch.Tensor, params: SamplingParams) -> Shortlist:
    """The same for one row (V,), sorted as far as any token can be kept; always exact."""
    logits = logits.cpu()
    scaled = (logits.double() - logits.max()) / params.temperature  # (V,), from 0 down
    weights = scaled.exp()
    mass = weights.sum()
    if params.top_k:
        can_stay = logits >= logits.topk(min(params.top_k, len(logits))).values[-1]
    elif params.top_p < 1:
        can_stay = _may_reach(scaled, weights, params.top_p * mass)
    else:
        can_stay = weights >= params.min_p / 2
    ids = can_stay.nonzero()[:, 0]
    values, ids = _ranked(logits[ids][None], ids[None])
    kept, _ = _keep(values, [params], mass[None], margin=0.0)
    return Shortlist(ids, kept, [True])


def _may_reach(scaled: torch.Tensor, weights: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    """Which tokens (V,) have less than `edge` before them, or little more: an eighth of a logit is not told apart."""
    levels = (scaled * -8).clamp(max=800).long()
    reached = torch.bincount(levels, weights).cumsum(0)
    return levels <= (reached < edge * (1 + 1e-9)).sum()


def _keep(
    values: torch.Tensor, params: Sequence[SamplingParams], masses: torch.Tensor, *, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the filters to ranked logits.

    values: (R, K) float32, falling. masses: (R,) float64, the weight of the whole row where the best token weighs
    1; unused with top-k. Returns the weights (R, K), 0 where cut, and whether (R,) what lies beyond the K or within
    `margin` of an edge could change them.
    """
    # NOTE: what no row asks for is left out: for one row, calling torch costs more than its arithmetic.
    scaled = (values.double() - values[:, :1]) / _column(
        [one.temperature for one in params]
    )  # (R, K), from 0 down
    weights = scaled.exp()
    whole = masses[:, None]
    is_near: torch.Tensor | None = None
    if any(one.top_k for one in params):
        weights, whole, is_near = _keep_top_k(values, weights, params, whole)
    if any(one.top_p < 1 for one in params):
        top_p = _column([one.top_p for one in params])
        before = F.pad(weights.cumsum(-1)[:, :-1], (1, 0))
        edge = torch.where(top_p < 1, top_p * whole, math.inf)
        if margin > 0:
            no_top_k = torch.tensor([one.top_k == 0 for one in params])[:, None]
            is_close = ((before - edge).abs() < margin * masses[:, None]) & no_top_k
            is_near = is_close.any(-1) if is_near is None else is_near | is_close.any(-1)
        weights = torch.where(before >= edge, 0.0, weights)
    if any(one.min_p > 0 for one in params):
        weights = torch.where(weights < _column([one.min_p for one in params]), 0.0, weights)
    is_open = ((weights > 0) & (values <= values[:, -1:])).any(-1)
    if is_near is not None:
        is_open |= is_near
    if any(one.typical_p < 1 for one in params):
        typical_p = _column([one.typical_p for one in params])
        weights = torch.where(_is_typical(scaled, weights, typical_p), weights, 0.0)
    return weights, is_open


def _keep_top_k(
    values: torch.Tensor, weights: torch.Tensor, params: Sequence[SamplingParams], whole: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (R, K) after top-k, the mass (R, 1) that top-p takes its share of, and rows (R,) that cannot tell it."""
    top_k = torch.tensor([min(one.top_k, 1 << 40) for one in params])[:, None]
    smallest = values.gather(1, (top_k - 1).clamp(0, values.shape[1] - 1))
    weights = torch.where((top_k > 0) & (values < smallest), 0.0, weights)
    # NOTE: where top-k keeps more than the K, their sum is not that mass.
    takes_share = torch.tensor([one.top_k > 0 and one.top_p < 1 for one in params])[:, None]
    is_short = takes_share & (smallest <= values[:, -1:]) & (weights[:, -1:] > 0)
    return weights, torch.where(top_k > 0, weights.cumsum(-1)[:, -1:], whole), is_short[:, 0]


def _is_typical(scaled: torch.Tensor, weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Which tokens are closest in surprise to the entropy, up to `mass` (R, 1) of the probability; all where it is 1.

    scaled: logarithms of the weights (R, K) before any was cut.
    """
    total = weights.cumsum(-1)[:, -1:]
    chances = weights / total
    surprise = (total.log() - scaled).masked_fill(weights == 0, math.inf)
    entropy = (chances * surprise).nan_to_num(nan=0.0).sum(-1, keepdim=True)
    distance, order = (surprise - entropy).abs().sort(dim=-1, stable=True)
    last = (chances.gather(1, order).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=weights.shape[1] - 1)
    return ((surprise - entropy).abs() <= distance.gather(1, last)) | (mass >= 1)


def _candidates(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best tokens of each row, ranked: values and ids (R, K), K = NUM_CANDIDATES or V, on the CPU.

    They all lie in the K blocks with the largest maxima, so only those are searched: first large blocks, then small.
    """
    values, ids = logits, None
    for size in CANDIDATE_BLOCKS:
        if values.shape[1] > NUM_CANDIDATES * size:
            blocks = _in_blocks(values, size, fill=-math.inf)
            best_blocks = blocks.amax(-1).topk(NUM_CANDIDATES, sorted=False).indices  # (R, K)
            starts = torch.arange(len(blocks), device=blocks.device)[:, None] * blocks.shape[1]
            values = (
                blocks.flatten(0, 1).index_select(0, (starts + best_blocks).flatten()).view(len(blocks), -1)
            )
            places = (best_blocks[:, :, None] * size + torch.arange(size, device=blocks.device)).flatten(1)
            ids = places if ids is None else ids.gather(1, places)
    values, places = values.topk(min(NUM_CANDIDATES, values.shape[1]), sorted=False)
    return _ranked(values.cpu(), (places if ids is None else ids.gather(1, places)).cpu())


def _ranked(values: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (R, n), the largest value first, and among equal values the smallest id."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 the same as 0.0
    keys = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) * 2**32 - ids  # floats in order, as integers
    order = keys.sort(dim=-1, descending=True).indices
    return values.gather(1, order), ids.gather(1, order)


def _masses(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The weight of each row (R,) float64 where its best token weighs 1; right to MARGIN."""
    masses: list[torch.Tensor] = []
    for part in _slices(logits):
        weights = _scaled(logits[part], draws[part]).exp_()
        masses.append(_in_blocks(weights, BLOCK, fill=0.0).sum(-1).double().sum(-1))
    return torch.cat(masses).cpu()


def _slices(logits: torch.Tensor) -> list[slice]:
    """Some rows at a time: fresh memory for all of them would cost more than the arithmetic on a CPU."""
    step = max(1, (1 << 20 if logits.is_cpu else 1 << 26) // logits.shape[1])
    return [slice(first, first + step) for first in range(0, len(logits), step)]


def _chances(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Softmax at each row's temperature (R, V) float32."""
    return _scaled(logits, draws).softmax(-1)


def _scaled(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Logits at each row's temperature, from 0 down. NOTE: subtract first; large logits would lose digits."""
    top = logits.new_tensor([one.top for one in draws])[:, None]
    temperature = logits.new_tensor([one.params.temperature for one in draws])[:, None]
    return (logits - top).div_(temperature)


def _in_blocks(values: torch.Tensor, size: int, *, fill: float) -> torch.Tensor:
    """(R, V) as (R, blocks, size); a copy only where the size does not divide V."""
    missing = -values.shape[1] % size
    if missing:
        values = F.pad(values, (0, missing), value=fill)
    return values.unflatten(1, (-1, size))
