"""transformers' `generate`, with a cache of the prompt that is cut back after each answer."""

import time

import torch
import transformers
from transformers.generation.streamers import BaseStreamer
from wire import Times, serve, window


class Clock(BaseStreamer):
    """When each token came. The first call carries the prompt."""

    def __init__(self) -> None:
        self.times: Times = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """One token, or the prompt."""
        if self._has_prompt:
            self.times.append((time.perf_counter(), value.numel()))
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to do."""


class Transformers:
    """settings: model, dtype, attention."""

    def __init__(self, settings: dict[str, str]) -> None:
        torch.set_num_threads(int(settings["threads"]))
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"],
            dtype=getattr(torch, settings["dtype"]),
            attn_implementation=settings["attention"],
        ).eval()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
        self._kept: tuple[list[int], transformers.DynamicCache] | None = None
        self.facts = {"version": transformers.__version__, "torch": torch.__version__}

    def _generate(self, ids: torch.Tensor, tokens: int, cache: transformers.DynamicCache | None) -> tuple:
        clock = Clock()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                streamer=clock,
                past_key_values=cache,
                pad_token_id=0,
            )
        return clock.times, out[0, ids.shape[1] :]

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, object]:
        """One stream."""
        assert len(prompts) == 1, "this worker measures one stream"
        prompt = prompts[0]
        ids = torch.tensor([prompt])
        if self._kept is None or self._kept[0] != prompt:
            cache = transformers.DynamicCache(config=self._model.config)
            with torch.inference_mode():
                self._model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._kept = prompt, cache
        cache = self._kept[1]
        times, _ = self._generate(ids, tokens, cache)
        cache.crop(len(prompt) - 1 - cache.get_seq_length())  # a negative number takes so many off
        return window([times])

    def prefill(self, prompt: list[int]) -> dict[str, object]:
        """Until the first token is there."""
        started = time.perf_counter()
        times, _ = self._generate(torch.tensor([prompt]), 1, None)
        return {"seconds": times[0][0] - started, "tokens": len(prompt)}

    def text(self, prompt: str, tokens: int) -> dict[str, object]:
        """With the tokenizer."""
        started = time.perf_counter()
        ids = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        _, answer = self._generate(ids, tokens, None)
        text = self._tokenizer.decode(answer)
        return {"seconds": time.perf_counter() - started, "tokens": len(answer), "text": text}


if __name__ == "__main__":
    serve(Transformers)
