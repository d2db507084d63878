"""Attention over pages: the `attend` that the network calls during inference.

On a CPU the C++ of `kernels.attention` does all of it. The rest of this file is plain torch, for other devices and
where the C++ is not built: each sequence attends on its own over the pieces of memory that its pages form; the
results of several pieces are joined by their log-sum-exp (as in flash decoding, arXiv 2205.14135), so keys are read
where they lie. Short sequences that decode are gathered into one padded call, because many small calls cost more.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from internlm2.engine.compute.batch import Batch, Span
from internlm2.engine.compute.page_cache import PageCache
from internlm2.kernels.attention import Pages, PageTable, write
from internlm2.kernels.attention import attend as attend_pages
from internlm2.kernels.library import library
from internlm2.model.attention import Attend, AttentionMeta

_SEGMENT_TOKENS = 8192  # a copied or unpacked piece is no longer than this
_SHORT_RUN = 256  # runs below this are copied together
_PADDED_KEYS = 512  # decoding sequences up to this long share one padded call
_PADDED_ROWS = 4  # when there are at least so many
_PLAIN_ROWS, _PLAIN_KEYS = 256, 2048  # a block of scores of attention that is written out
_SPLIT_KEYS = 2048  # a single query over more keys than this is cut into pieces for the threads


def table_of(batch: Batch, pages: Pages) -> PageTable:
    """The batch as the kernels take it."""
    spans = ((span.start, span.num_rows, span.first_position, span.runs) for span in batch.spans)
    return PageTable(pages, spans, batch.slots)


def make_attend(cache: PageCache, batch: Batch, *, is_alone: bool = False) -> Attend:
    """Attention of one batch, by the kernels where they are built and take such pages. is_alone: see PagedAttend."""
    if cache.pages is None or library() is None:
        return PagedAttend(cache, batch, is_alone=is_alone)
    return KernelAttend(cache.pages, table_of(batch, cache.pages))


class KernelAttend:
    """Attention of one batch by the C++ kernel; one object serves all layers of one forward pass."""

    def __init__(self, pages: Pages, table: PageTable) -> None:
        self._pages, self._table = pages, table

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta
    ) -> torch.Tensor:
        """q: (N, 1, H, D); k and v: (N, 1, K, D) -> (N, 1, H, D). Rows behind those of the table are padding."""
        num_rows = self._table.num_rows
        write(self._pages, self._table, meta.layer, k[:num_rows, 0], v[:num_rows, 0])
        out = attend_pages(self._pages, self._table, meta.layer, q[:num_rows, 0], scale=meta.scale)[:, None]
        return F.pad(out, (0, 0, 0, 0, 0, 0, 0, len(q) - num_rows)) if len(q) > num_rows else out


class PagedAttend:
    """The same in torch: attention of one batch; one object serves all layers of one forward pass.

    is_alone: never put two sequences into one call nor cut keys where pages happen to end, so that no result depends
    on its company.
    """

    def __init__(self, cache: PageCache, batch: Batch, *, is_alone: bool = False) -> None:
        self._cache = cache
        self._batch = batch
        short = [s for s in batch.spans if s.num_rows == 1 and s.num_keys <= _PADDED_KEYS]
        if is_alone or len(short) < _PADDED_ROWS:
            short = []
        padded_rows = {span.start for span in short}
        self._single = [s for s in batch.spans if s.start not in padded_rows]
        self._padded = _Padded(short, cache, batch) if short else None
        pieces = _even_pieces if is_alone else _pieces
        self._pieces = [list(pieces(s, cache)) for s in self._single]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta
    ) -> torch.Tensor:
        """q: (N, 1, H, D); k and v: (N, 1, K, D) -> (N, 1, H, D)."""
        num_rows = len(self._batch.slots)  # rows behind them are padding
        padding = q.new_zeros(len(q) - num_rows, *q.shape[1:])
        q, k, v = q[:num_rows, 0], k[:num_rows, 0], v[:num_rows, 0]
        self._cache.write(meta.layer, self._batch.slots, self._batch.first_slot, k, v)
        if len(self._single) == 1 and self._padded is None:
            out = self._attend_one(0, q, k, v, meta)[:, None]
            return torch.cat((out, padding)) if len(padding) else out
        out = torch.empty_like(q)
        for index, span in enumerate(self._single):
            rows = slice(span.start, span.start + span.num_rows)
            out[rows] = self._attend_one(index, q[rows], k[rows], v[rows], meta)
        if self._padded is not None:
            self._padded.attend(q, out, meta)
        return torch.cat((out[:, None], padding)) if len(padding) else out[:, None]

    def _attend_one(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta
    ) -> torch.Tensor:
        """One sequence. q: (T, H, D), k, v: (T, K, D) its new rows -> (T, H, D)."""
        span = self._single[index]
        merged = _Merged()
        if span.num_rows > 1:
            if self._cache.is_int8:  # what later rows will read, so that chunking changes nothing
                k, v = self._cache.read(
                    meta.layer, self._batch.slots[span.start : span.start + span.num_rows]
                )
            merged.add(*attention(q, k, v, scale=meta.scale, is_causal=True))
        for piece in self._pieces[index]:
            keys, values = self._cache.read(meta.layer, piece)
            merged.add(*attention(q, keys, values, scale=meta.scale))
        return merged.result(q.dtype)


def _pieces(span: Span, cache: PageCache) -> Iterator[slice | torch.Tensor]:
    """Where the keys before the span's own rows lie (for a single row: its own key too), piece by piece."""
    left = span.num_keys if span.num_rows == 1 else span.first_position
    longest = _SEGMENT_TOKENS if cache.is_int8 else left
    scattered: list[torch.Tensor] = []
    num_scattered = 0
    for slot, count in span.runs:
        count = min(count, left)  # noqa: PLW2901
        left -= count
        for first in range(slot, slot + count, max(longest, 1)):
            size = min(longest, slot + count - first)
            if size >= _SHORT_RUN or (len(span.runs) == 1 and size):
                yield slice(first, first + size)
            elif size:
                scattered.append(torch.arange(first, first + size))
                num_scattered += size
                if num_scattered >= _SEGMENT_TOKENS:
                    yield torch.cat(scattered).to(cache.keys.device)
                    scattered, num_scattered = [], 0
    if scattered:
        yield torch.cat(scattered).to(cache.keys.device)


def _even_pieces(span: Span, cache: PageCache) -> Iterator[torch.Tensor]:
    """The same keys in pieces that do not depend on where the pages lie: for results that must not change by a bit."""
    left = span.num_keys if span.num_rows == 1 else span.first_position
    slots = torch.cat([torch.arange(slot, slot + count) for slot, count in span.runs])[:left]
    if left:
        yield from slots.to(cache.keys.device).split(_SEGMENT_TOKENS)


class _Merged:
    """Attention over several sets of keys, joined as they come: each weighs by the sum of its exponentials."""

    def __init__(self) -> None:
        self._num_sets = 0
        # (T, H, D), (T, H), (T, H); float32 once there are two sets.
        self._out = self._total = self._most = torch.empty(0)

    def add(self, out: torch.Tensor, log_sum: torch.Tensor) -> None:
        """out: (T, H, D), log_sum: (T, H) float32."""
        self._num_sets += 1
        if self._num_sets == 1:
            self._out, self._total, self._most = out, torch.ones_like(log_sum), log_sum
            return
        # NOTE: weights are taken from the largest log-sum and not from the joined one, whose rounding would add up.
        most = torch.maximum(self._most, log_sum)
        old, new = (self._most - most).exp(), (log_sum - most).exp()
        self._out = self._out * old[..., None] + out * new[..., None]
        self._total = self._total * old + new
        self._most = most

    def log_sum(self) -> torch.Tensor:
        """Of all sets together, (T, H)."""
        return self._most + self._total.log()

    def result(self, dtype: torch.dtype) -> torch.Tensor:
        """(T, H, D)."""
        assert self._num_sets > 0
        if self._num_sets == 1:
            return self._out.to(dtype)
        return (self._out / self._total[..., None]).to(dtype)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the log-sum-exp of its scores.

    q: (T, H, D); k, v: (S, K, D). is_causal: T == S, row t sees keys up to t. Returns (T, H, D), (T, H) float32.
    """
    if q.device.type != "cpu":
        return attention_plain(q, k, v, scale=scale, is_causal=is_causal)
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if num_queries == 1:
        # The queries of a group become rows, so that each key is read once; many keys are cut for the threads.
        queries = q.view(num_kv_heads, -1, head_dim)  # (K, G, D)
        num_cuts = min(8, num_keys // _SPLIT_KEYS * 2)
        if num_cuts > 1:
            return _attention_in_cuts(queries, k, v, scale=scale, num_cuts=num_cuts)
        out, log_sum = flash(
            queries[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], 0.0, scale=scale
        )
        return out.reshape(1, num_heads, head_dim), log_sum.reshape(1, num_heads)
    out, log_sum = flash(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], 0.0, is_causal, scale=scale
    )
    return out[0].transpose(0, 1), log_sum[0].transpose(0, 1)


def _attention_in_cuts(
    queries: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, num_cuts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A single position over many keys: equal cuts side by side as a batch, and the rest. queries: (K, G, D)."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    num_kv_heads, group, head_dim = queries.shape
    size = k.shape[0] // num_cuts
    cut = (num_cuts, size, num_kv_heads, head_dim)
    keys, values = (x[: num_cuts * size].view(cut).transpose(1, 2) for x in (k, v))  # (cuts, K, size, D)
    out, log_sum = flash(queries.expand(num_cuts, -1, -1, -1), keys, values, 0.0, scale=scale)
    merged = _Merged()
    shape = (1, num_kv_heads * group)
    for piece in range(num_cuts):
        merged.add(out[piece].reshape(*shape, head_dim), log_sum[piece].reshape(shape))
    if num_cuts * size < k.shape[0]:
        rest = slice(num_cuts * size, None)
        out, log_sum = flash(
            queries[None], k[rest].transpose(0, 1)[None], v[rest].transpose(0, 1)[None], 0.0, scale=scale
        )
        merged.add(out.reshape(*shape, head_dim), log_sum.reshape(shape))
    return merged.result(queries.dtype), merged.log_sum()


def attention_plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention`, written out; the twin for devices without the fused kernel, and for the tests.

    Scores are made for blocks of queries and keys, so that its memory does not grow with the context.
    """
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for first in range(0, len(q), _PLAIN_ROWS):
        queries = q[first : first + _PLAIN_ROWS]
        merged = _Merged()
        num_keys = first + len(queries) if is_causal else len(k)
        for begin in range(0, num_keys, _PLAIN_KEYS):
            block = slice(begin, min(begin + _PLAIN_KEYS, num_keys))
            num_seen = first - begin if is_causal and block.stop > first else None
            merged.add(*_attention_block(queries, k[block], v[block], scale=scale, num_seen=num_seen))
        parts.append((merged.result(q.dtype), merged.log_sum()))
    outs, log_sums = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(log_sums)


def _attention_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, num_seen: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """num_seen: row t sees the first num_seen + t + 1 keys; None: all of them. Returns both in float32."""
    num_queries, num_heads, head_dim = q.shape
    grouped = q.view(num_queries, k.shape[1], -1, head_dim).float()
    scores = torch.einsum("tkgd,skd->tkgs", grouped, k.float()) * scale  # (T, K, G, S)
    if num_seen is not None:
        seen = torch.ones(num_queries, len(k), dtype=torch.bool, device=q.device).tril(num_seen)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    log_sum = scores.logsumexp(-1)  # (T, K, G)
    out = torch.einsum("tkgs,skd->tkgd", (scores - log_sum[..., None]).exp(), v.float())
    return out.reshape(q.shape), log_sum.reshape(num_queries, num_heads)


class _Padded:
    """Short sequences with one new row each, attending in one padded call."""

    def __init__(self, spans: list[Span], cache: PageCache, batch: Batch) -> None:
        self._cache = cache
        self._rows = torch.tensor([s.start for s in spans], device=batch.slots.device)
        longest = max(s.num_keys for s in spans)
        slots = torch.zeros(len(spans), longest, dtype=torch.int64)
        for row, span in enumerate(spans):
            first = 0
            for slot, count in span.runs:
                slots[row, first : first + count] = torch.arange(slot, slot + count)
                first += count
            slots[row, first:] = span.runs[0][0]  # any slot that holds numbers; the mask hides it
        self._slots = slots.to(batch.slots.device)  # (B, S)
        lengths = torch.tensor([s.num_keys for s in spans])
        mask = torch.arange(longest) < lengths[:, None]
        self._mask = mask[:, None, None].to(batch.slots.device)  # (B, 1, 1, S)

    def attend(self, q: torch.Tensor, out: torch.Tensor, meta: AttentionMeta) -> None:
        """Fill the rows of these sequences in `out` (N, H, D)."""
        keys, values = self._cache.read(meta.layer, self._slots)  # (B, S, K, D)
        num_kv_heads, head_dim = keys.shape[2:]
        queries = q[self._rows].view(len(self._rows), num_kv_heads, -1, head_dim)  # (B, K, G, D)
        answer = F.scaled_dot_product_attention(
            queries, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=self._mask, scale=meta.scale
        )
        out[self._rows] = answer.reshape(len(self._rows), *q.shape[1:])
