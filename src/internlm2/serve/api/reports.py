"""Reports beside the text: log-probabilities and counts of tokens, in OpenAI's shapes."""

from collections.abc import Sequence

from internlm2.engine.sampling.sampler import TokenLogprobs
from internlm2.serve.api.schema import Json
from internlm2.serve.guard import Exchange
from internlm2.serve.talk.reader import TokenReport
from internlm2.serve.talk.run import Run
from internlm2.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no minus infinity; OpenAI writes this


def usage(exchange: Exchange, runs: Sequence[Run]) -> Json:
    """How many tokens came in and went out."""
    cached = sum(run.stream.num_cached_tokens for run in runs)
    return {
        "prompt_tokens": exchange.num_prompt_tokens,
        "completion_tokens": exchange.num_output_tokens,
        "total_tokens": exchange.num_prompt_tokens + exchange.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def token_text(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int]]:
    """A token as text, with U+FFFD for half characters, and its bytes."""
    if not 0 <= token_id < tokenizer.vocab_size:
        return "", []
    raw = bytes(tokenizer.token_bytes[token_id])
    return raw.decode("utf-8", "replace"), list(raw)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenReport]) -> Json:
    """The log-probabilities of chat completions."""
    return {"content": token_logprobs(tokenizer, tokens), "refusal": None}


def token_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenReport]) -> list[Json]:
    """Each token with those that were likely instead."""
    return [
        {
            **_entry(tokenizer, token.token_id, token.logprobs.logprob),
            "top_logprobs": [_entry(tokenizer, *each) for each in token.logprobs.top],
        }
        for token in tokens
    ]


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, _LEAST)


def text_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[TokenLogprobs | None], *, start: int
) -> Json:
    """The log-probabilities of text completions. found: None where there is none. start: where the text begins."""
    tokens = [token_text(tokenizer, token)[0] for token in ids]
    offsets, at = [], start
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if each is None else finite(each.logprob) for each in found],
        "top_logprobs": [
            None if each is None else {token_text(tokenizer, i)[0]: finite(p) for i, p in each.top}
            for each in found
        ],
        "text_offset": offsets,
    }


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> Json:
    text, raw = token_text(tokenizer, token_id)
    return {"token": text, "logprob": finite(logprob), "bytes": raw}
