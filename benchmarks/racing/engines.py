"""Who races, with which files and settings. A peer's settings are the fastest of those that were tried here."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from internlm2.quant.weight import FORMATS
from racing.models import Models
from racing.peers import Peers

OURS = "internlm2"
THREADS = len(os.sched_getaffinity(0))
# llama.cpp: huge pages for weights that are repacked at load, which mapped files cannot be.
_LLAMA_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_LLAMA_OPTIONS = ("--load-mode", "none", "--cache-ram", "0", "--no-ui")
_OPENVINO_PROPERTIES = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
_WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class EngineSpec:
    """name: in tables and samples, for one shape. bits: of a weight in the layers. form: the file, see Models.path."""

    name: str
    peer: str
    shape: str
    bits: float
    form: str
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    threads: int = THREADS

    @property
    def is_ours(self) -> bool:
        """Whether the project is measured, not a peer."""
        return self.peer == OURS

    def files(self) -> tuple[str, ...]:
        """Forms that must exist, in the order in which they are made."""
        return (self.form,) if self.form == "llama" or self.shape == "7b" else ("llama", self.form)

    def launch(self, models: Models, peers: Peers) -> tuple[str, str, dict[str, object], dict[str, str]]:
        """Interpreter, worker, its settings, and what is added to the environment."""
        path = str(models.path(self.shape, self.form))
        environment = {"OMP_NUM_THREADS": str(self.threads)}
        if self.is_ours:
            settings = {"path": path, "memory_gib": 1.0, "max_num_seqs": 16, **self.options}
            return sys.executable, str(_WORKERS / "ours_worker.py"), settings, environment
        if self.peer == "llama.cpp":
            command = [str(peers.llama_binary("llama-server")), "-m", path]
            command += ["-t", str(self.threads), "-tb", str(self.threads), *_LLAMA_OPTIONS]
            command += [str(word) for pair in self.options.items() for word in pair]
            settings = {"command": command}
            worker = str(_WORKERS / "llama_cpp_worker.py")
            return sys.executable, worker, settings, environment | _LLAMA_ENVIRONMENT
        llama = str(models.path(self.shape, "llama"))
        settings = {
            "openvino": {"model": path, "properties": _OPENVINO_PROPERTIES, **self.options},
            "ctranslate2": {"model": path, "tokenizer": llama, **self.options},
            "transformers": {"model": path, "threads": str(self.threads), **self.options},
        }[self.peer]
        return str(peers.python(self.peer)), str(_WORKERS / f"{self.peer}_worker.py"), settings, environment

    def described(self) -> str:
        """The settings, for the result file."""
        shown = ", ".join(f"{key} {value}" for key, value in self.options.items())
        if self.peer == "llama.cpp":
            shown = f"llama-server -t {self.threads} {' '.join(_LLAMA_OPTIONS)} {shown.replace(',', '')}, huge pages"
        elif self.peer == "openvino":
            properties = ", ".join(f"{key} {value}" for key, value in _OPENVINO_PROPERTIES.items())
            shown = f"{shown}; {properties}"
        return f"{self.form}; {shown}"


def _ours(shape: str, kind: str, **more: object) -> EngineSpec:
    options: dict[str, object] = {"quantization": kind, "max_model_len": 2304, **more}
    form = "Q8_0.gguf" if shape == "7b" else "llama"
    return EngineSpec(f"internlm2 {_SHORT.get(kind, kind)}", OURS, shape, FORMATS[kind].bits, form, options)


# A slot for prompts that are not kept, and one for each that is.
def _llama(shape: str, kind: str, bits: float, *, slots: int = 2, context: int = 2304) -> EngineSpec:
    options = {"-c": slots * context, "-np": slots, "-fa": "on"}
    return EngineSpec(f"llama.cpp {kind}", "llama.cpp", shape, bits, f"{kind}.gguf", options)


def _openvino(shape: str, kind: str, bits: float) -> EngineSpec:
    scheduler = {"max_num_batched_tokens": 2048, "cache_size": 1, "enable_prefix_caching": True}
    form = f"openvino-{kind}"
    return EngineSpec(f"OpenVINO {kind}", "openvino", shape, bits, form, {"scheduler": scheduler})


def _ctranslate2(shape: str) -> EngineSpec:
    generator = {"compute_type": "int8", "intra_threads": THREADS, "inter_threads": 1}
    return EngineSpec("CTranslate2 int8", "ctranslate2", shape, 8.0, "ctranslate2", {"generator": generator})


def _transformers(shape: str, dtype: str = "bfloat16") -> EngineSpec:
    bits = {"bfloat16": 16.0, "float32": 32.0}[dtype]
    options = {"dtype": dtype, "attention": "sdpa"}
    return EngineSpec(
        f"transformers {_SHORT.get(dtype, dtype)}", "transformers", shape, bits, "llama", options
    )


_SHORT = {"bfloat16": "bf16", "float32": "fp32"}

ENGINES: tuple[EngineSpec, ...] = (
    _ours("1.8b", "int4"),
    _ours("1.8b", "int4-symmetric"),
    _ours("1.8b", "int8"),
    _ours("1.8b", "bfloat16"),
    _llama("1.8b", "Q4_0", 4.5, slots=18, context=768),
    _llama("1.8b", "Q8_0", 8.5, context=768),
    _llama("1.8b", "bf16", 16.0, context=768),
    _openvino("1.8b", "int4", 4.125),
    _openvino("1.8b", "int8", 8.0),
    _ctranslate2("1.8b"),
    _transformers("1.8b"),
    _ours("demo", "int4"),
    _ours("demo", "int8"),
    _llama("demo", "own", 5.0, context=1024),
    # With a core busy, two OpenMP threads wait for each other: one may do better, and a user would find that out.
    dataclasses.replace(_llama("demo", "own", 5.0, context=1024), name="llama.cpp own, 1 thread", threads=1),
    _openvino("demo", "int4", 4.125),
    _ctranslate2("demo"),
    _transformers("demo"),
    _ours("7b", "int4-symmetric", max_model_len=1024, memory_gib=0.5),
    _llama("7b", "Q4_0", 4.5, context=768),
)


def find(shape: str, name: str) -> EngineSpec:
    """One of ENGINES."""
    return next(spec for spec in ENGINES if spec.shape == shape and spec.name == name)
