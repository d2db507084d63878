"""All decoder layers of a model with packed weights in one call of the C++: a small model feels every call.

There is no twin of it: the same layers, module by module, are what it is compared with and what runs without it.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from internlm2.kernels.attention import ELEMENTS, LONGEST_HEAD, Pages, PageTable
from internlm2.kernels.library import CDecoder, CLayer, Library
from internlm2.kernels.packed import PackedWeight


@dataclass(frozen=True)
class LayerWeights:
    """attention_norm, ffn_norm: (C,). wqkv: as the checkpoint interleaves it. w13: gated."""

    attention_norm: torch.Tensor
    wqkv: PackedWeight
    wo: PackedWeight
    ffn_norm: torch.Tensor
    w13: PackedWeight
    w2: PackedWeight


class Decoder:
    """Layers as the C++ takes them. Holds the weights; `run` may be called from one thread at a time.

    norm: (C,), the last one. dtype: of the model, bfloat16 or float32; queries are rounded to it.
    """

    def __init__(
        self,
        built: Library,
        layers: Sequence[LayerWeights],
        norm: torch.Tensor,
        *,
        num_heads: int,
        head_dim: int,
        eps: float,
        dtype: torch.dtype,
    ) -> None:
        assert head_dim % 2 == 0
        assert head_dim <= LONGEST_HEAD
        self._built = built
        self._layers = tuple(layers)  # whose memory the structures below point to
        self._norms = [(_as_float(layer.attention_norm), _as_float(layer.ffn_norm)) for layer in self._layers]
        self._norm = _as_float(norm)
        self._hidden_size, self._head_dim, self._dtype = len(norm), head_dim, dtype
        qkv_rows = {layer.wqkv.rows for layer in self._layers}
        assert len(qkv_rows) == 1
        self._num_kv_heads = (qkv_rows.pop() // head_dim - num_heads) // 2
        for layer in self._layers:
            self._check(layer, num_heads)
        c_layers = (CLayer * len(self._layers))(
            *(
                CLayer(
                    attention_norm=attention_norm.data_ptr(),
                    ffn_norm=ffn_norm.data_ptr(),
                    wqkv=layer.wqkv.pointer,
                    wo=layer.wo.pointer,
                    w13=layer.w13.pointer,
                    w2=layer.w2.pointer,
                )
                for layer, (attention_norm, ffn_norm) in zip(self._layers, self._norms, strict=True)
            )
        )
        self._c_struct = CDecoder(
            layers=c_layers,
            norm=self._norm.data_ptr(),
            num_layers=len(self._layers),
            hidden_size=len(norm),
            num_heads=num_heads,
            element=ELEMENTS[dtype],
            eps=eps,
            scale=head_dim**-0.5,
        )
        self._pointer = ctypes.addressof(self._c_struct)

    def run(
        self,
        pages: Pages,
        table: PageTable,
        embeddings: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """States after the last norm, (N, C) of the model's dtype; keys and values are in `pages` afterwards.

        embeddings: (N, C). cos, sin: (N, D) float32, the second half of D repeating the first.
        """
        num_rows = table.num_rows
        layers, _, heads, dim = pages.keys.shape
        assert embeddings.shape == (num_rows, self._hidden_size)
        assert cos.shape == sin.shape == (num_rows, self._head_dim)
        assert (layers, heads, dim) == (len(self._layers), self._num_kv_heads, self._head_dim)
        hidden = embeddings.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        cos, sin = _as_float(cos), _as_float(sin)
        out = torch.empty_like(hidden)
        failed = self._built.decode(
            self._pointer,
            pages.pointer,
            table.spans_pointer,
            table.num_spans,
            table.runs_pointer,
            table.slots.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            hidden.data_ptr(),
            out.data_ptr(),
            num_rows,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"No memory for {num_rows} rows of a forward pass.")
        return out.to(self._dtype)

    def _check(self, layer: LayerWeights, num_heads: int) -> None:
        size = self._hidden_size
        assert num_heads % self._num_kv_heads == 0
        assert (layer.wqkv.rows, layer.wqkv.columns) == (
            (num_heads + 2 * self._num_kv_heads) * self._head_dim,
            size,
        )
        assert (layer.wo.rows, layer.wo.columns) == (size, num_heads * self._head_dim)
        assert layer.w13.is_gated
        assert layer.w13.columns == layer.w2.rows == size
        assert layer.w2.columns == layer.w13.rows
        assert not any(weight.is_gated for weight in (layer.wqkv, layer.wo, layer.w2))
        assert len(layer.attention_norm) == len(layer.ffn_norm) == size


def _as_float(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.float32).contiguous()
