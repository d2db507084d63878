"""out = x W^T with both in e4m3: a scale for each row of the weights, and one for each row of x, found on the way.

The product is `torch._scaled_mm` with a scale a row, which GPUs from compute capability 8.9 on have (Ada, Hopper).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from internlm2.kernels.gpu.available import runs_triton

LARGEST = 448.0  # of e4m3
DTYPE = torch.float8_e4m3fn
COLUMN_MULTIPLE = 16  # of the product
LEAST_CAPABILITY = (8, 9)
_SMALLEST_SCALE = 1e-20


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """data: (N, C) e4m3. scales: (N, 1) float32."""

    data: torch.Tensor
    scales: torch.Tensor

    @property
    def rows(self) -> int:
        """N."""
        return self.data.shape[0]

    @property
    def columns(self) -> int:
        """C."""
        return self.data.shape[1]

    @property
    def num_bytes(self) -> int:
        """What one product reads."""
        return self.data.nbytes + self.scales.nbytes


def pack(weight: torch.Tensor) -> Fp8Weight:
    """weight: (N, C) of any floating dtype, both multiples of 16."""
    assert weight.shape[0] % COLUMN_MULTIPLE == weight.shape[1] % COLUMN_MULTIPLE == 0
    return Fp8Weight(*quantize_rows_twin(weight))


def has_product(x: torch.Tensor) -> bool:
    """Whether the GPU of `x` multiplies in e4m3."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= LEAST_CAPABILITY


def linear(x: torch.Tensor, weight: Fp8Weight, *, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: (M, C) bfloat16, float16 or float32 -> (M, N) of the same dtype; sums are float32, rounded to bfloat16."""
    if not has_product(x):
        out = linear_twin(x, weight)
    else:
        rounded, scales = quantize_rows(x)
        out = torch._scaled_mm(
            rounded, weight.data.t(), scale_a=scales, scale_b=weight.scales.t(), out_dtype=torch.bfloat16
        ).to(x.dtype)
    return out if bias is None else out + bias


def linear_twin(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """As `linear`, the same roundings and float32."""
    rounded, scales = quantize_rows_twin(x)
    product = F.linear(rounded.float(), weight.data.float())
    return (product * scales * weight.scales.t()).to(torch.bfloat16).to(x.dtype)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x: (M, C) -> (M, C) e4m3 and (M, 1) float32: the largest magnitude of a row becomes 448."""
    if not runs_triton(x):
        return quantize_rows_twin(x)
    from internlm2.kernels.gpu import fp8_triton

    return fp8_triton.quantize_rows(x)


def quantize_rows_twin(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_rows`."""
    scales = (x.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=_SMALLEST_SCALE)
    # Rounding of the quotient may pass the largest number, beyond which e4m3 has NaN.
    return (x.float() / scales).clamp(-LARGEST, LARGEST).to(DTYPE), scales
