"""Rotary position embedding (arXiv 2104.09864), half-split layout, with linear and dynamic NTK scaling.

Nothing here is remembered between calls: the base of a sequence depends on that sequence's own
length limit alone, so a long request can never change a later short one, and there is no buffer
that a loader could leave uninitialised.
"""

from dataclasses import dataclass

import torch

from internlm2.model.config import ModelConfig


@dataclass(frozen=True)
class Rotary:
    """Angles of one forward pass.

    cos, sin: (B or 1, T, D) float32, the second half of D repeating the first.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def inverse_frequencies(config: ModelConfig, length_limits: torch.Tensor) -> torch.Tensor:
    """Angle per position and dimension pair.

    length_limits: (B,) int64, the longest that each sequence may become, in tokens. With dynamic scaling a
    limit s above L = max_position_embeddings makes the base b (f s / L - (f - 1)) ** (D / (D - 2)); up to L
    the base is b. Returns (B, D/2) float32.
    """
    dim = config.head_dim
    base = torch.full_like(length_limits, 1, dtype=torch.float64) * config.rope_theta  # (B,)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and dim > 2:
        beyond = length_limits.clamp(min=config.max_position_embeddings).double()
        growth = scaling.factor * beyond / config.max_position_embeddings - (scaling.factor - 1)
        base = base * growth ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, device=length_limits.device).float() / dim  # (D/2,)
    # NOTE: float32 power, as in the official code: float64 would differ by up to 0.01 rad at 200K tokens.
    return 1.0 / (base.float()[:, None] ** exponents)  # (B, D/2)


def rotary(config: ModelConfig, position_ids: torch.Tensor, length_limits: torch.Tensor) -> Rotary:
    """Angles for `position_ids`.

    position_ids: (B, T) int64 from 0. length_limits: (B,) int64, see `inverse_frequencies`.
    """
    positions = position_ids.float()
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        positions = positions / config.rope_scaling.factor
    angles = positions[:, :, None] * inverse_frequencies(config, length_limits)[:, None, :]  # (B, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, T, D)
    return Rotary(angles.cos(), angles.sin())


def rotate(x: torch.Tensor, angles: Rotary) -> torch.Tensor:
    """Turn each pair (i, i + D/2) of every head by its angle. x: (B, T, heads, D); same shape and dtype back."""
    cos = angles.cos[:, :, None, :].to(x.dtype)  # (B, T, 1, D)
    sin = angles.sin[:, :, None, :].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
