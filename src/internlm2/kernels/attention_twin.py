"""Attention over pages in plain torch: gathered keys, one dense softmax for each sequence.

What tests hold the C++ against, and what runs where it is not built.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from internlm2.kernels.attention import Pages, PageTable

_ROWS_AT_ONCE = 64  # of scores, so that they stay small


def attend_twin(
    pages: "Pages", table: "PageTable", layer: int, q: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """As `attention.attend`."""
    out = torch.empty_like(q)
    for span in range(table.num_spans):
        start, num_rows, first_position, first_run, num_runs = table.numbers[5 * span : 5 * span + 5]
        slots = _slots(table, first_run, num_runs)
        k = _read(pages.keys, pages.key_scales, layer, slots)  # (S, K, D) float32
        v = _read(pages.values, pages.value_scales, layer, slots)
        for row in range(0, num_rows, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, num_rows - row)
            rows = slice(start + row, start + row + count)
            seen = first_position + row
            out[rows] = _attend(q[rows].float(), k[: seen + count], v[: seen + count], seen, scale).to(
                q.dtype
            )
    return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: int, scale: float) -> torch.Tensor:
    """q: (T, H, D), k, v: (S, K, D), all float32; row t sees seen + t + 1 keys."""
    grouped = q.view(len(q), k.shape[1], -1, q.shape[2])  # (T, K, G, D)
    scores = torch.einsum("tkgd,skd->tkgs", grouped, k) * scale
    visible = torch.ones(len(q), len(k), dtype=torch.bool).tril(seen)
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    out = torch.einsum("tkgs,skd->tkgd", weights, v.nan_to_num(0.0, 0.0, 0.0))
    # NOTE: 0 times NaN is NaN, so values that are not finite are added apart, to the rows that see them only.
    for key in (~v.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist():
        rows = slice(max(0, key - seen), None)
        bad = torch.where(v[key].isfinite(), 0.0, v[key])[:, None]  # (K, 1, D)
        weight = weights[rows, ..., key, None]
        out[rows] += torch.where(bad == 0, 0.0, weight * bad)
    return out.reshape(q.shape)


def write_twin(pages: "Pages", table: "PageTable", layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """As `attention.write`."""
    for new, block, scales in ((k, pages.keys, pages.key_scales), (v, pages.values, pages.value_scales)):
        if scales is None:
            block[layer, table.slots] = new.to(block.dtype)
            continue
        x = new.float()
        scale = (x.abs().amax(-1) / 127).clamp(min=1e-20)
        is_finite = x.isfinite().all(-1)
        rounded = torch.where(is_finite[..., None], (x / scale[..., None]).round(), 0.0)
        block[layer, table.slots] = rounded.to(torch.int8)
        scales[layer, table.slots] = torch.where(is_finite, scale, torch.nan)


def _slots(table: "PageTable", first_run: int, num_runs: int) -> torch.Tensor:
    runs = table.runs[2 * first_run : 2 * (first_run + num_runs + 1)].tolist()
    pieces = zip(runs[0:-2:2], runs[1:-2:2], runs[2::2], strict=True)
    return torch.cat([torch.arange(slot, slot + end - position) for position, slot, end in pieces])


def _read(block: torch.Tensor, scales: torch.Tensor | None, layer: int, slots: torch.Tensor) -> torch.Tensor:
    values = block[layer, slots].float()
    return values if scales is None else values * scales[layer, slots][..., None]
