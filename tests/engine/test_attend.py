"""Attention in pieces and blocks against one dense softmax in float64."""

import pytest
import torch

from internlm2.engine.compute import attend
from internlm2.engine.compute.attend import _Merged, attention, attention_plain

SCALE = 1.0


def dense(q, k, v, *, is_causal):
    """Outputs and log-sums, in float64."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->ths", q.double(), keys) * SCALE
    if is_causal:
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
        scores.masked_fill_(hidden[:, None], -torch.inf)
    return torch.einsum("ths,shd->thd", scores.softmax(-1), values), scores.logsumexp(-1)


def tensors(num_queries, num_keys):
    generator = torch.Generator().manual_seed(num_queries + num_keys)
    return [
        torch.randn(n, h, 16, generator=generator)
        for n, h in ((num_queries, 6), (num_keys, 2), (num_keys, 2))
    ]


@pytest.mark.parametrize("compute", [attention, attention_plain])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "is_causal"),
    [(1, 1, False), (1, 77, False), (1, 9001, False), (5, 40, False), (50, 90, False), (41, 41, True)],
)
def test_outputs_and_log_sums_are_those_of_one_softmax(
    compute, num_queries, num_keys, is_causal, monkeypatch
):
    monkeypatch.setattr(attend, "_PLAIN_ROWS", 8)
    monkeypatch.setattr(attend, "_PLAIN_KEYS", 16)
    q, k, v = tensors(num_queries, num_keys)
    found = compute(q, k, v, scale=SCALE, is_causal=is_causal)
    for ours, truth in zip(found, dense(q, k, v, is_causal=is_causal), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_join_to_the_whole_whatever_their_order(dtype):
    q, k, v = (x.to(dtype) for x in tensors(7, 100))
    merged = _Merged()
    for piece in (slice(60, 100), slice(0, 1), slice(1, 60)):
        merged.add(*attention_plain(q, k[piece], v[piece], scale=SCALE))
    out, log_sum = dense(q, k, v, is_causal=False)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(merged.result(dtype).double(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(merged.log_sum().double(), log_sum, rtol=1e-5, atol=1e-5)
    assert merged.result(dtype).dtype == dtype
