"""The layers of a model whose weights are packed, as one call of the kernels instead of module by module."""

import torch
from torch import nn

from internlm2.engine.compute.batch import Batch
from internlm2.kernels.attention import Pages, PageTable
from internlm2.kernels.decoder import Decoder, LayerWeights
from internlm2.kernels.library import library
from internlm2.model.attention import Attention
from internlm2.model.heads import Model
from internlm2.model.layers import DecoderLayer, RMSNorm
from internlm2.model.rope import rotary
from internlm2.quant.linear import PackedFeedForward, PackedLinear


class PackedLayers:
    """What `Model.hidden_states` does, for rows of a batch over pages. Hooks of modules are not called."""

    def __init__(self, model: Model, decoder: Decoder) -> None:
        self._model, self._decoder = model, decoder

    def forward(self, batch: Batch, pages: Pages, table: PageTable) -> torch.Tensor:
        """Final hidden states (N, C); the keys and values of the batch are in `pages` afterwards."""
        angles = rotary(self._model.config, batch.positions[:, None], batch.limits)
        embeddings = self._model.model.tok_embeddings(batch.input_ids)
        return self._decoder.run(pages, table, embeddings, angles.cos[:, 0], angles.sin[:, 0])


def packed_layers(model: Model) -> PackedLayers | None:
    """None for a model that is not exactly as `quantize_model` leaves it, or without the C++."""
    built = library()
    layers = [_weights(layer) for layer in model.model.layers] if built is not None else []
    if built is None or not layers or not isinstance(model.model.norm, RMSNorm):
        return None
    config = model.config
    found = [layer for layer in layers if layer is not None]
    if len(found) < len(layers) or config.head_dim % 2 != 0:
        return None
    decoder = Decoder(
        built,
        found,
        model.model.norm.weight,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        dtype=model.model.tok_embeddings.weight.dtype,
    )
    return PackedLayers(model, decoder)


def _weights(layer: nn.Module) -> LayerWeights | None:
    if type(layer) is not DecoderLayer or type(layer.attention) is not Attention:
        return None
    linears = (layer.attention.wqkv, layer.attention.wo)
    feed_forward: nn.Module = layer.feed_forward
    if not isinstance(feed_forward, PackedFeedForward) or any(type(x) is not PackedLinear for x in linears):
        return None
    wqkv, wo = (linear.packed for linear in linears if isinstance(linear, PackedLinear))
    return LayerWeights(
        attention_norm=layer.attention_norm.weight,
        wqkv=wqkv,
        wo=wo,
        ffn_norm=layer.ffn_norm.weight,
        w13=feed_forward.w13.packed,
        w2=feed_forward.w2.packed,
    )
