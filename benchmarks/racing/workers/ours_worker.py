"""internlm2 through its engine: `LLM`, and `AsyncLLM` for streams side by side."""

import asyncio
import time

import torch
from wire import Times, serve, window

import internlm2
from internlm2 import LLM, AsyncLLM, SamplingParams
from internlm2.kernels.library import library
from internlm2.quant.linear import PackedLinear


class Ours:
    """settings: model, quantization (None: as the folder says), max_model_len, memory_gib, max_num_seqs."""

    def __init__(self, settings: dict[str, object]) -> None:
        self.llm = LLM(**settings)
        built = library()
        packed = [m.packed.num_bytes for m in self.llm.model.modules() if isinstance(m, PackedLinear)]
        self.facts = {
            "version": internlm2.__version__,
            "instructions": "torch" if built is None else built.level_name,
            "threads": str(torch.get_num_threads()),
            "weight_bytes": str(sum(packed)),
        }

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, object]:
        """Streams side by side."""
        return window(asyncio.run(self._streams(prompts, tokens)))

    async def _streams(self, prompts: list[list[int]], tokens: int) -> list[Times]:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)

        async def one(prompt: list[int]) -> Times:
            times: Times = []
            async for piece in twin.stream(prompt, params):
                if piece.token_ids:
                    times.append((time.perf_counter(), len(piece.token_ids)))
            return times

        async with AsyncLLM.of(self.llm) as twin:
            return await asyncio.gather(*(one(prompt) for prompt in prompts))

    def prefill(self, prompt: list[int]) -> dict[str, object]:
        """Until the first token is there."""
        started = time.perf_counter()
        self.llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
        return {"seconds": time.perf_counter() - started, "tokens": len(prompt)}

    def text(self, prompt: str, tokens: int) -> dict[str, object]:
        """With the tokenizer."""
        started = time.perf_counter()
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        # The prompt is a finished chat, so its markers are markers.
        ids = self.llm.tokenizer.encode(prompt, allow_special=True)
        out = self.llm.generate([ids], params)[0]
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": len(out.token_ids), "text": out.text}

    def score(self, chunks: list[list[int]], start: int) -> dict[str, object]:
        """The negative log-likelihood of what follows the first `start` ids of each chunk."""
        started = time.perf_counter()
        scores = self.llm.score([c[:start] for c in chunks], [c[start:] for c in chunks])
        count = sum(len(score.token_ids) for score in scores)
        loss = -sum(score.logprob for score in scores)
        return {"seconds": time.perf_counter() - started, "tokens": count, "loss": loss}


if __name__ == "__main__":
    serve(Ours)
