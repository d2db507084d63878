"""OpenVINO GenAI through its continuous batching pipeline, which keeps prompts and says when tokens come."""

import time

import numpy as np
import openvino
import openvino_genai
from wire import serve, window


class OpenVino:
    """settings: model, properties of the compiled model, scheduler."""

    def __init__(self, settings: dict[str, object]) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        for name, value in settings["scheduler"].items():
            setattr(scheduler, name, value)
        self._pipe = openvino_genai.ContinuousBatchingPipeline(
            settings["model"], scheduler, "CPU", settings["properties"]
        )
        self._tokenizer = self._pipe.get_tokenizer()
        self._next = 0
        self.facts = {"version": openvino_genai.__version__, "openvino": openvino.__version__}

    def _config(self, tokens: int) -> openvino_genai.GenerationConfig:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.min_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        return config

    def _streams(self, prompts: list[np.ndarray], tokens: int) -> tuple[list, list[list[int]]]:
        handles = []
        for prompt in prompts:
            handles.append(self._pipe.add_request(self._next, openvino.Tensor(prompt), self._config(tokens)))
            self._next += 1
        times: list = [[] for _ in prompts]
        ids: list[list[int]] = [[] for _ in prompts]
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
            now = time.perf_counter()
            for n, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        times[n].append((now, len(output.generated_ids)))
                        ids[n].extend(output.generated_ids)
        return times, ids

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, object]:
        """Streams side by side."""
        times, ids = self._streams([np.array([prompt], dtype=np.int64) for prompt in prompts], tokens)
        assert all(len(one) == tokens for one in ids), [len(one) for one in ids]
        return window(times)

    def prefill(self, prompt: list[int]) -> dict[str, object]:
        """Until the first token is there."""
        started = time.perf_counter()
        times, _ = self._streams([np.array([prompt], dtype=np.int64)], 1)
        return {"seconds": times[0][0][0] - started, "tokens": len(prompt)}

    def text(self, prompt: str, tokens: int) -> dict[str, object]:
        """With the tokenizer."""
        started = time.perf_counter()
        encoded = self._tokenizer.encode(prompt, add_special_tokens=False).input_ids.data
        _, ids = self._streams([np.array(encoded, dtype=np.int64)], tokens)
        text = self._tokenizer.decode(ids[0])
        return {"seconds": time.perf_counter() - started, "tokens": len(ids[0]), "text": text}


if __name__ == "__main__":
    serve(OpenVino)
