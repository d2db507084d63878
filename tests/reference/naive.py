"""The network once more, in numpy float64 with loops: slow, obvious, and written apart from the package."""

import math

import numpy as np

Weights = dict[str, np.ndarray]


def logits(weights: Weights, config: dict[str, object], ids: list[int], *, length_limit: int) -> np.ndarray:
    """Logits (T, V) of one sequence from tensors under their official names."""
    heads, groups = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    dim = int(config["hidden_size"]) // heads
    per_group = heads // groups
    eps = float(config["rms_norm_eps"])
    x = weights["model.tok_embeddings.weight"][ids]  # (T, C)
    angles = _angles(config, len(ids), dim, length_limit)
    for layer in range(int(config["num_hidden_layers"])):
        name = f"model.layers.{layer}"
        normed = _rms(x, weights[f"{name}.attention_norm.weight"], eps)
        rows = normed @ weights[f"{name}.attention.wqkv.weight"].T + weights.get(
            f"{name}.attention.wqkv.bias", 0.0
        )
        out = np.zeros((len(ids), heads * dim))
        for head in range(heads):
            start = (head // per_group) * (per_group + 2) * dim
            q = _turn(rows[:, start + (head % per_group) * dim :][:, :dim], angles)
            k = _turn(rows[:, start + per_group * dim :][:, :dim], angles)
            v = rows[:, start + (per_group + 1) * dim :][:, :dim]
            out[:, head * dim : (head + 1) * dim] = _attend(q, k, v)
        x = x + out @ weights[f"{name}.attention.wo.weight"].T + weights.get(f"{name}.attention.wo.bias", 0.0)
        normed = _rms(x, weights[f"{name}.ffn_norm.weight"], eps)
        gate = normed @ weights[f"{name}.feed_forward.w1.weight"].T
        up = normed @ weights[f"{name}.feed_forward.w3.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{name}.feed_forward.w2.weight"].T
    return _rms(x, weights["model.norm.weight"], eps) @ weights["output.weight"].T


def _angles(config: dict[str, object], num_positions: int, dim: int, length_limit: int) -> np.ndarray:
    base, trained = float(config["rope_theta"]), int(config["max_position_embeddings"])
    scaling = config["rope_scaling"] or {}
    positions = np.arange(num_positions, dtype=np.float64)
    if scaling.get("type") == "linear":
        positions = positions / scaling["factor"]
    if scaling.get("type") == "dynamic" and length_limit > trained:
        factor = scaling["factor"]
        base = base * (factor * length_limit / trained - (factor - 1)) ** (dim / (dim - 2))
    return positions[:, None] * base ** (-2 * np.arange(dim // 2) / dim)


def _turn(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    half = x.shape[1] // 2
    first, second = x[:, :half], x[:, half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=1)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    out = np.zeros_like(v)
    for t in range(len(q)):
        scores = k[: t + 1] @ q[t] / math.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[t] = weights @ v[: t + 1] / weights.sum()
    return out


def _rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight
