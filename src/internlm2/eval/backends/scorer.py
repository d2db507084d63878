"""Our engine as the model whose perplexity is measured."""

from collections.abc import Sequence

from internlm2.engine.llm import LLM


class EngineScorer:
    """An `LLM` as a `TokenScorer`. adapter: the LoRA adapter that is measured."""

    def __init__(self, llm: LLM, *, adapter: str | None = None) -> None:
        self._llm = llm
        self._adapter = adapter
        self.start_ids: Sequence[int] = () if llm.tokenizer.bos_id is None else (llm.tokenizer.bos_id,)
        self.max_tokens = llm.max_model_len

    def encode(self, text: str) -> list[int]:
        """See `TokenScorer`."""
        return self._llm.tokenizer.encode(text)

    def score(self, contexts: Sequence[list[int]], targets: Sequence[list[int]]) -> list[list[float]]:
        """See `TokenScorer`."""
        return [
            one.token_logprobs
            for one in self._llm.score(list(contexts), list(targets), adapter=self._adapter)
        ]
