"""What stands between the products of a layer: norm with residual, rotation with writing into pages, SwiGLU.

Statistics, angles and products are float32; a result is rounded once, to the dtype of the model.
"""

import torch
import torch.nn.functional as F

from internlm2.kernels.gpu.attention import LayerPages
from internlm2.kernels.gpu.available import runs_triton

_LARGEST = 127
_SMALLEST_SCALE = 1e-20  # of an all-zero head; as `quant.kv`


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, add: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x: (N, C), the stream; add: (N, C), put onto it first. Returns the stream and its normalised rows, both (N, C)
    of the dtype of x; the stream is `x` itself without `add`.
    """
    assert add is None or add.shape == x.shape
    if not runs_triton(x):
        return rms_norm_twin(x, weight, eps=eps, add=add)
    from internlm2.kernels.gpu import elementwise_triton

    return elementwise_triton.rms_norm(x, weight, eps=eps, add=add)


def rms_norm_twin(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, add: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rms_norm`."""
    x = x if add is None else x + add
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return x, weight * x32.to(x.dtype)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x: (N, 2 F), w1 x and then w3 x -> silu of the first times the second, (N, F)."""
    assert x.shape[1] % 2 == 0
    if not runs_triton(x):
        return swiglu_twin(x)
    from internlm2.kernels.gpu import elementwise_triton

    return elementwise_triton.swiglu(x)


def swiglu_twin(x: torch.Tensor) -> torch.Tensor:
    """As `swiglu`."""
    gate, value = x.float().chunk(2, dim=1)
    return (F.silu(gate) * value).to(x.dtype)


def rotate_and_store(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pages: LayerPages, slots: torch.Tensor
) -> torch.Tensor:
    """Turn queries and keys by their angles, put keys and values into their slots, and return the queries.

    qkv: (N, (H + 2 K) D) as the checkpoint interleaves it: for each key/value head its G query heads, its key, its
    value. cos, sin: (N, D) float32, the second half of D repeating the first. slots: (N,) int64; a row with a negative
    one is padding and writes nothing. Returns (N, H, D).
    """
    num_kv_heads, head_dim = pages.keys.shape[1:]
    assert qkv.shape[1] % (num_kv_heads * head_dim) == 0
    assert cos.shape == sin.shape == (len(qkv), head_dim)
    assert slots.shape == (len(qkv),)
    if not runs_triton(qkv):
        return rotate_and_store_twin(qkv, cos, sin, pages, slots)
    from internlm2.kernels.gpu import elementwise_triton

    return elementwise_triton.rotate_and_store(qkv, cos, sin, pages, slots)


def rotate_and_store_twin(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pages: LayerPages, slots: torch.Tensor
) -> torch.Tensor:
    """As `rotate_and_store`."""
    num_kv_heads, head_dim = pages.keys.shape[1:]
    parts = qkv.view(len(qkv), num_kv_heads, -1, head_dim)  # (N, K, G + 2, D)
    turned = parts[:, :, :-1].float()
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned = (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(qkv.dtype)
    rows = slots >= 0
    for new, block, scales in (
        (turned[:, :, -1], pages.keys, pages.key_scales),
        (parts[:, :, -1], pages.values, pages.value_scales),
    ):
        if scales is None:
            block[slots[rows]] = new[rows].to(block.dtype)
            continue
        x = new[rows].float()
        scale = (x.abs().amax(-1) / _LARGEST).clamp(min=_SMALLEST_SCALE)
        block[slots[rows]] = (x / scale[..., None]).round().to(torch.int8)
        scales[slots[rows]] = scale
    return turned[:, :, :-1].reshape(len(qkv), -1, head_dim)
