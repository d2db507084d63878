"""Filters and chance once more, in numpy float64: one row at a time, fully sorted, written apart from the package."""

import numpy as np

from internlm2.engine.sampling.params import SamplingParams


def kept(logits: np.ndarray, params: SamplingParams) -> dict[int, float]:
    """Ids that the filters keep of logits (V,) -> their weights (the best token's is 1), best first, then by id."""
    ids = np.lexsort((np.arange(len(logits)), -logits))  # (V,)
    weights = np.exp((logits[ids].astype(np.float64) - logits.max()) / params.temperature)
    if params.top_k:
        threshold = logits[ids][min(params.top_k, len(ids)) - 1]
        weights[logits[ids] < threshold] = 0
    if params.top_p < 1:
        cumulative = np.cumsum(weights)
        before = np.concatenate(([0.0], cumulative[:-1]))
        weights[before >= params.top_p * cumulative[-1]] = 0
    weights[weights < params.min_p] = 0
    ids, weights = ids[weights > 0], weights[weights > 0]
    if params.typical_p < 1:
        chances = weights / weights.sum()
        entropy = -(chances * np.log(chances)).sum()
        distances = np.abs(-np.log(chances) - entropy)
        order = np.argsort(distances, kind="stable")
        last = min(int((np.cumsum(chances[order]) < params.typical_p).sum()), len(order) - 1)
        # NOTE: the slack keeps equal logits together, whose logarithms numpy may round apart.
        is_near = distances <= distances[order[last]] + 1e-11
        ids, weights = ids[is_near], weights[is_near]
    return dict(zip(ids.tolist(), weights.tolist(), strict=True))


def token(logits: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """The inverse of the cumulative distribution: over ids in rising order without filters, over ranks with them."""
    weights = kept(logits, params)
    is_filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1
    ids = list(weights) if is_filtered else sorted(weights)
    cumulative = np.cumsum([weights[token_id] for token_id in ids])
    return ids[int((cumulative <= uniform * cumulative[-1]).sum())]
