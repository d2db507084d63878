"""Keys and values of a batch of sequences in one dense block, each row growing at its own pace.

A row's slot is its position, so there is no padding: rows of different lengths decode together, and each
sees just what it would see alone.
"""

import torch

from internlm2.model.attention import AttentionMeta, sdpa
from internlm2.model.config import ModelConfig

_FIRST_SLOTS = 256


class DenseCache:
    """Storage for `num_rows` sequences; it grows by doubling up to `capacity` tokens a row."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        slots = min(_FIRST_SLOTS, capacity)
        shape = (config.num_hidden_layers, num_rows, slots, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (layers, rows, S, K, D)
        self.values = torch.zeros_like(self.keys)

    def reserve(self, num_tokens: int) -> None:
        """Make room for rows of `num_tokens`."""
        assert num_tokens <= self.capacity, f"{num_tokens} tokens in a cache of {self.capacity}"
        slots = self.keys.shape[2]
        if num_tokens <= slots:
            return
        more = min(self.capacity, max(num_tokens, 2 * slots)) - slots
        # One after the other, so that the old keys are gone before the values are copied.
        self.keys = _longer(self.keys, more)
        self.values = _longer(self.values, more)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop all rows but those in `rows` (int64), in that order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def _longer(block: torch.Tensor, num_slots: int) -> torch.Tensor:
    return torch.cat((block, block.new_zeros(*block.shape[:2], num_slots, *block.shape[3:])), dim=2)


class CacheAttend:
    """Attention of new tokens over the cache; one object for one forward pass through all layers.

    cache rows `first_row ... first_row + B - 1` receive the keys and values of `position_ids` (B, T).
    """

    def __init__(self, cache: DenseCache, position_ids: torch.Tensor, *, first_row: int = 0) -> None:
        batch, num_new = position_ids.shape
        self._num_slots = int(position_ids.max()) + 1
        cache.reserve(self._num_slots)
        self._cache = cache
        self._rows = slice(first_row, first_row + batch)
        self._position_ids = position_ids
        self._row_ids = torch.arange(first_row, first_row + batch, device=position_ids.device)[:, None]
        starts_at_zero = num_new == self._num_slots
        self._is_causal = starts_at_zero and num_new > 1
        self._mask: torch.Tensor | None = None
        if not starts_at_zero and (batch > 1 or num_new > 1):
            slots = torch.arange(self._num_slots, device=position_ids.device)
            self._mask = (slots <= position_ids[:, :, None])[:, None]  # (B, 1, T, S)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta
    ) -> torch.Tensor:
        keys, values = self._cache.keys[meta.layer], self._cache.values[meta.layer]  # (rows, S, K, D)
        keys[self._row_ids, self._position_ids] = k
        values[self._row_ids, self._position_ids] = v
        return sdpa(
            q,
            keys[self._rows, : self._num_slots],
            values[self._rows, : self._num_slots],
            scale=meta.scale,
            mask=self._mask,
            is_causal=self._is_causal,
        )
