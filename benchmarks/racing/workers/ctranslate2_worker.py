"""CTranslate2 through its generator. Its tokens are strings; a static prompt is computed once and kept."""

import time
from pathlib import Path

import ctranslate2
import transformers
from wire import Times, serve, window


class CTranslate2:
    """settings: model, tokenizer (folder), generator (arguments of it)."""

    def __init__(self, settings: dict[str, object]) -> None:
        self._generator = ctranslate2.Generator(settings["model"], device="cpu", **settings["generator"])
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(Path(str(settings["tokenizer"])))
        self.facts = {"version": ctranslate2.__version__, "compute_type": self._generator.compute_type}

    def _tokens(self, ids: list[int]) -> list[str]:
        return self._tokenizer.convert_ids_to_tokens(ids)

    def _streams(
        self, prompts: list[list[str]], tokens: int, *, static: list[str] | None = None
    ) -> tuple[list[Times], list[list[int]]]:
        times: list[Times] = [[] for _ in prompts]

        def note(step: ctranslate2.GenerationStepResult) -> bool:
            times[step.batch_id].append((time.perf_counter(), 1))
            return False

        results = self._generator.generate_batch(
            prompts,
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            static_prompt=static,
            cache_static_prompt=True,
            callback=note,
        )
        return times, [result.sequences_ids[0] for result in results]

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, object]:
        """All streams continue the first prompt, the only one that can be kept; what it says costs nothing."""
        prompt = self._tokens(prompts[0])
        times, ids = self._streams([prompt[-1:]] * len(prompts), tokens, static=prompt[:-1])
        assert all(len(one) == tokens for one in ids), [len(one) for one in ids]
        return window(times)

    def prefill(self, prompt: list[int]) -> dict[str, object]:
        """Until the first token is there."""
        started = time.perf_counter()
        times, _ = self._streams([self._tokens(prompt)], 1)
        return {"seconds": times[0][0][0] - started, "tokens": len(prompt)}

    def text(self, prompt: str, tokens: int) -> dict[str, object]:
        """With the tokenizer."""
        started = time.perf_counter()
        ids = self._tokenizer(prompt, add_special_tokens=False).input_ids
        _, answers = self._streams([self._tokens(ids)], tokens)
        text = self._tokenizer.decode(answers[0])
        return {"seconds": time.perf_counter() - started, "tokens": len(answers[0]), "text": text}


if __name__ == "__main__":
    serve(CTranslate2)
