"""Attention of rows over keys and values that lie in pages: one new row for each line of a page table.

The keys of a line are cut into `num_splits` ranges that work side by side; a second kernel joins them in order (flash
decoding, arXiv 2205.14135 and 2311.01282). How they are cut depends on the number of rows alone, so one launch serves
lengths that are known only on the GPU, as a CUDA graph needs, and gives the same bits every time.
"""

from dataclasses import dataclass

import torch

from internlm2.kernels.gpu.available import num_multiprocessors, runs_triton

MOST_SPLITS = 32


@dataclass(frozen=True)
class LayerPages:
    """Keys and values of one layer.

    keys, values: (slots, K, D), float or int8; slot = page * page_size + offset. key_scales, value_scales: (slots, K)
    float32 for int8, else None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    page_size: int
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


def attend_rows(
    q: torch.Tensor, pages: LayerPages, table: torch.Tensor, lengths: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """q: (R, H, D). table: (R, W) int32, the pages of each row's sequence. lengths: (R,) int32, how many keys a row
    sees; 0 gives zeros. Returns (R, H, D) of the dtype of q; softmax and sums are float32.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = pages.keys.shape[1]
    assert pages.keys.shape[2] == head_dim
    assert num_heads % num_kv_heads == 0
    assert table.shape[0] == num_rows == len(lengths)
    assert table.dtype == lengths.dtype == torch.int32
    if not runs_triton(q):
        return attend_rows_twin(q, pages, table, lengths, scale=scale)
    from internlm2.kernels.gpu import attention_triton

    splits = plan_splits(num_rows, num_kv_heads, num_multiprocessors(q.device))
    return attention_triton.attend_rows(q, pages, table, lengths, scale=scale, num_splits=splits)


def plan_splits(num_rows: int, num_kv_heads: int, num_sms: int) -> int:
    """Ranges that keys are cut into: a power of two with which at least about two blocks meet each multiprocessor."""
    wanted = max(1, 2 * num_sms // (num_rows * num_kv_heads))
    return min(MOST_SPLITS, 1 << (wanted.bit_length() - 1))


def attend_rows_twin(
    q: torch.Tensor, pages: LayerPages, table: torch.Tensor, lengths: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """As `attend_rows`, row by row in float32."""
    out = torch.zeros_like(q)
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        positions = torch.arange(length, device=q.device)
        page = table[row, positions // pages.page_size].long()
        slots = page * pages.page_size + positions % pages.page_size
        k = _read(pages.keys, pages.key_scales, slots)  # (S, K, D) float32
        v = _read(pages.values, pages.value_scales, slots)
        grouped = q[row].float().view(k.shape[1], -1, q.shape[2])  # (K, G, D)
        weights = (torch.einsum("kgd,skd->kgs", grouped, k) * scale).softmax(-1)
        out[row] = torch.einsum("kgs,skd->kgd", weights, v).reshape(q.shape[1:]).to(q.dtype)
    return out


def _read(block: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
    values = block[slots].float()
    return values if scales is None else values * scales[slots][..., None]
