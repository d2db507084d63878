"""Perplexity of the demo model beside the speed: llama.cpp's files and our formats on the same tokens, the same way.

The way is llama-perplexity's: chunks of 512 tokens, of each the second half counts.
"""

import json
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import internlm2.quant
from internlm2.tokenizer import Tokenizer
from racing.engines import THREADS, find
from racing.models import Models
from racing.peers import Peers
from racing.workers.process import Worker, WorkerError

TEXT = Path(internlm2.quant.__file__).parent / "text" / "evaluation.txt"
CHUNK = 512
START = CHUNK // 2 + 1  # the first token that counts
PATIENCE_SECONDS = 3600.0  # for all chunks, on a busy machine
LLAMA_FORMS = ("f32", "Q8_0", "own", "Q4_0")
OUR_FORMS: dict[str, dict[str, object]] = {
    "fp32": {"dtype": "float32", "quantization": None},
    "bf16": {"quantization": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int4-symmetric": {"quantization": "int4-symmetric"},
}


@dataclass(frozen=True)
class Quality:
    """perplexity by the name of the engine. num_tokens: how many counted."""

    perplexity: dict[str, float]
    num_tokens: int

    def rise(self, name: str) -> float | None:
        """Against the same program with unrounded weights; None where one of the two is missing."""
        base = "internlm2 fp32" if name.startswith("internlm2") else "llama.cpp f32"
        if name not in self.perplexity or base not in self.perplexity:
            return None
        return self.perplexity[name] / self.perplexity[base] - 1


def read_quality(path: Path) -> Quality | None:
    """What was measured before."""
    return Quality(**json.loads(path.read_text())) if path.exists() else None


def measure_quality(models: Models, peers: Peers, path: Path, *, is_fresh: bool = False) -> None:
    """Measure what is missing and keep it in `path`. The speed of the machine does not matter here."""
    found = None if is_fresh else read_quality(path)
    perplexity = {} if found is None else dict(found.perplexity)
    chunks = chunks_of(Tokenizer.from_pretrained(models.path("demo", "llama")).encode(TEXT.read_text()))
    tasks: dict[str, Callable[[], float]] = {
        f"internlm2 {form}": partial(_ours, models, peers, options, chunks)
        for form, options in OUR_FORMS.items()
    }
    if peers.is_ready("llama.cpp"):
        tasks |= {
            f"llama.cpp {form}": partial(_llama, models, peers, form, num_chunks=len(chunks))
            for form in LLAMA_FORMS
        }
    for name, task in tasks.items():
        if name in perplexity:
            continue
        try:
            perplexity[name] = task()
        except WorkerError as error:
            print(f"perplexity: {error}", flush=True)
            continue
        print(f"perplexity: {name}: {perplexity[name]:.4f}", flush=True)
        # Kept at once, so that a run that is broken off goes on here.
        text = json.dumps({"perplexity": perplexity, "num_tokens": len(chunks) * (CHUNK - START)}, indent=1)
        path.write_text(text, encoding="utf-8")


def chunks_of(ids: list[int]) -> list[list[int]]:
    """Whole chunks; what is left over is not scored."""
    return [ids[n : n + CHUNK] for n in range(0, len(ids) - CHUNK + 1, CHUNK)]


def _ours(models: Models, peers: Peers, options: dict[str, object], chunks: list[list[int]]) -> float:
    spec = find("demo", "internlm2 int4")
    worker = Worker(spec, models, peers, peers.root / "logs" / "quality.log", options=options)
    try:
        answer = worker.ask(
            {"do": "score", "chunks": chunks, "start": START}, patience_seconds=PATIENCE_SECONDS
        )
    finally:
        worker.close()
    assert answer["tokens"] == len(chunks) * (CHUNK - START), answer
    return math.exp(answer["loss"] / answer["tokens"])


def _llama(models: Models, peers: Peers, form: str, *, num_chunks: int) -> float:
    models.make("demo", ("llama", f"{form}.gguf"))
    command = [str(peers.llama_binary("llama-perplexity")), "-m", str(models.path("demo", f"{form}.gguf"))]
    command += ["-f", str(TEXT), "-c", str(CHUNK), "-t", str(THREADS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    text = done.stdout + done.stderr
    final = re.search(r"Final estimate: PPL = ([\d.]+)", text)
    if done.returncode or final is None:
        raise WorkerError(f"{' '.join(command)} ended with {done.returncode}:\n{text[-3000:]}")
    counted = re.search(r"over (\d+) chunks", text)
    if counted is not None and int(counted[1]) != num_chunks:
        raise WorkerError(
            f"llama.cpp finds {counted[1]} chunks in the text, we {num_chunks}: the tokens differ."
        )
    return float(final[1])
