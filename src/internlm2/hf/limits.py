"""How long each sequence may become: with dynamic NTK scaling this fixes its rotary base, once.

The base must not change while keys are in a cache, or prefill and decode would disagree. `generate` knows
the limit of a request from the start (prompt + new tokens). A cache that a user holds remembers the limits
of its first call, on the cache object: no state in the model, so a long request never changes a short one.
"""

import torch
from transformers import Cache

from internlm2.errors import RequestError
from internlm2.hf.configuration import InternLM2Config

# The attribute of a cache object that holds the limits of the sequences in it, (B,) or (1,) int64.
_ATTRIBUTE = "internlm2_length_limits"


def remembered(cache: Cache | None) -> torch.Tensor | None:
    """The limits of the sequences in `cache`; None where it is empty or never saw any."""
    if cache is None:
        return None
    limits = vars(cache).get(_ATTRIBUTE)
    return limits if limits is not None and int(cache.get_seq_length()) > 0 else None


def remember(cache: Cache | None, limits: torch.Tensor) -> None:
    """Keep `limits` with the sequences in `cache`."""
    if cache is not None:
        setattr(cache, _ATTRIBUTE, limits)


def of_forward(
    config: InternLM2Config,
    position_ids: torch.Tensor,
    *,
    given: torch.Tensor | None,
    attention_mask: object,
    cache: Cache | None,
) -> torch.Tensor:
    """Limits of one forward pass, (B,) or (1,) int64.

    position_ids: (B, T). given: (B,) from the caller, or None. attention_mask: (B, S) where it is 2-d.
    Raises RequestError when `cache` remembers another number of sequences than there are rows.
    """
    if not config.has_dynamic_rope:
        return position_ids.new_ones(1)
    if config.rope_mode == "reference":
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            total = attention_mask.shape[1]
        else:
            total = position_ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        return position_ids.new_ones(1) * total
    if given is None:
        given = remembered(cache)
    if given is None:
        given = position_ids.amax(-1) + 1  # (B,)
    if given.shape[0] not in (1, position_ids.shape[0]):
        raise RequestError(
            f"length_limits are of {given.shape[0]} sequences, but the batch has {position_ids.shape[0]} "
            "rows. Pass length_limits (one number per row) with the first call on a cache and after every "
            "change of its rows."
        )
    given = given.to(position_ids.device)
    if not torch.compiler.is_compiling():
        remember(cache, given)
    return given


def of_request(position_ids: torch.Tensor, *, max_length: int) -> torch.Tensor:
    """Limits of one `generate` request: attended prompt + new tokens, (B,) int64.

    position_ids: (B, T) of the prompt, counted over attended positions. max_length: of the padded row, prompt
    and new tokens.
    """
    num_new_tokens = max(0, max_length - position_ids.shape[1])
    return position_ids.amax(-1) + 1 + num_new_tokens
