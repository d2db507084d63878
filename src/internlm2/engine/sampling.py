"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, seeds.

The order and the meaning of each step are those of transformers' logits processors, which the tests compare with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from internlm2.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is answered.

    max_tokens: at most so many new tokens. min_tokens: no stop before. temperature: 0 is greedy. top_k: 0 is off.
    top_p, min_p: probability mass kept (1 and 0 are off). repetition_penalty: above 1 discourages tokens that the
    prompt or the answer holds already (arXiv 1909.05858). seed: None draws a fresh one. stop: texts that end the
    answer and are not part of it. stop_token_ids: ids that end it besides the model's own. ignore_eos: go on past
    the model's own stop tokens. Raises RequestError for values outside their range.
    """

    max_tokens: int = 512
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "from 0 to max_tokens")
        is_usable = self.temperature == 0 or 1e-4 <= self.temperature <= 1e4
        _check(is_usable, "temperature", self.temperature, "0 (greedy) or from 0.0001 to 10000")
        _check(self.seed is None or 0 <= self.seed < 1 << 63, "seed", self.seed, "from 0 to 2^63 - 1")
        _check(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 is off)")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        penalty = self.repetition_penalty
        _check(0.01 <= penalty <= 100, "repetition_penalty", penalty, "from 0.01 to 100")
        _check(all(self.stop), "stop", self.stop, "texts of at least one character")


def _check(is_good: bool, name: str, value: object, allowed: str) -> None:
    if not is_good:
        raise RequestError(f"{name} is {value!r}, but must be {allowed}.")


class Sampler:
    """The sampling state of one request: what it has seen, and its own random stream.

    vocab_size: ids from here on are never chosen; an embedding may have more rows than the tokenizer has tokens.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], *, vocab_size: int) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._seen[torch.as_tensor(prompt, dtype=torch.long)] = True

    def next_token(self, logits: torch.Tensor) -> int:
        """Choose from logits (V,) float32 on any device, and remember the choice."""
        logits = penalise(logits[: self._seen.numel()].cpu(), self._seen, self.params.repetition_penalty)
        if not math.isfinite(logits.max()):
            raise RequestError(
                "The model's logits are not finite, so no token can be chosen. In float16 values overflow easily: "
                "try bfloat16 or float32. Otherwise the weights are damaged."
            )
        if self.params.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = filtered(logits, self.params).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self._seen[token] = True
        return token


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Push down the logits of tokens in `seen` (V,) bool: divided when positive, multiplied when negative."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Temperature, then top-k, top-p, min-p: what is cut becomes -inf. logits: (V,) float32."""
    logits = logits / params.temperature
    if 0 < params.top_k < logits.numel():
        smallest_kept = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=False)
        cut = ordered.softmax(-1).cumsum(-1) <= 1 - params.top_p
        cut[-1] = False  # the best token always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(0, order, cut), -math.inf)
    if params.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    return logits
