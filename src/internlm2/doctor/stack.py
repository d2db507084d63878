"""The installed packages, and what is known of the official remote code on each version of transformers.

The ladder was measured on 2026-11-23 with the code of March 2024 on one folder under eleven versions.
"""

import platform
from importlib import metadata

import torch

from internlm2.checkpoint import memory
from internlm2.checkpoint.inference import choose_weights
from internlm2.doctor.finding import Finding
from internlm2.engine.options import EngineOptions
from internlm2.kernels.library import library
from internlm2.sandbox import SandboxError, examine_isolation

PACKAGES = (
    "internlm2",
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "huggingface-hub",
    "accelerate",
    "peft",
)


def installed(package: str) -> str | None:
    """Version of an installed package, without importing it; None when it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def examine_stack() -> list[Finding]:
    """Packages, processor and memory."""
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES if installed(name))
    findings = [Finding("packages", "ok", f"Python {platform.python_version()}, {versions}")]
    transformers = installed("transformers")
    if transformers is None:
        findings.append(
            Finding(
                "transformers",
                "note",
                "not installed; only `import internlm2.hf` needs it.",
                "pip install 'internlm2[hf]'",
            )
        )
    else:
        findings.append(remote_code_finding(transformers))
    findings.append(_processor())
    findings.append(_kernels())
    findings.append(_packing())
    findings.append(_sandbox())
    return findings


def _kernels() -> Finding:
    """Which C++ kernels compute with packed weights and attend over pages; built now if they never were."""
    built = library()
    threads = f"{torch.get_num_threads()} threads"
    if built is None:
        remedy = "apt install g++ (or name a compiler in CXX), then start again."
        what = f"plain torch, {threads}, also for attention: right, but slow with packed weights."
        return Finding("kernels", "note", what, remedy)
    uses = f"products, attention over pages and whole packed layers in C++ ({built.level_name}), {threads}"
    return Finding("kernels", "ok", f"{uses}; {built.path}")


def _packing() -> Finding:
    """How an `LLM` whose options nobody changed holds the weights of files that are not quantised."""
    options = EngineOptions()
    choice = choose_weights(wanted=options.wanted_weights, dtype=options.dtype, device=options.device)
    return Finding("packing", "ok", f"unasked, weights of unquantised files are {choice.held}")


def _sandbox() -> Finding:
    """Whether code that a model wrote can be kept apart here."""
    try:
        isolation = examine_isolation()
    except SandboxError as error:
        return Finding("sandbox", "note", str(error), "Code written by a model cannot be run here.")
    remedy = "" if isolation.is_complete else "See docs/sandbox.md before you let a model run code here."
    what = [line for line in isolation.describe() if not line.startswith("Never")]
    return Finding("sandbox", "ok" if isolation.is_complete else "note", " ".join(what), remedy)


def remote_code_finding(version: str) -> Finding:
    """What the official Python files of a model folder do under this version of transformers, if run."""
    number = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    name = f"transformers {version}"
    ours = "import internlm2.hf before AutoTokenizer and AutoModel; the folder's Python files then never run."
    if number >= (5,):
        return Finding(
            name,
            "note",
            "with a folder's own Python files (trust_remote_code) this version makes other token ids, leaves the "
            "rotary tables uninitialised and fails in generate().",
            ours,
        )
    if number >= (4, 54):
        return Finding(
            name, "note", "with a folder's own Python files generate() and chat() fail from 4.54 on.", ours
        )
    if number < (4, 34):
        return Finding(
            name,
            "note",
            "with a folder's own Python files the chat markers get ids outside the vocabulary.",
            "pip install 'transformers>=5,<6' and import internlm2.hf",
        )
    return Finding(
        name,
        "note",
        "a folder's own Python files of early 2024 work with this version; internlm2.hf needs 5.x.",
        "pip install 'internlm2[hf]'",
    )


def _processor() -> Finding:
    available = memory.available_bytes()
    room = "" if available is None else f", {available / memory.GIB:.1f} GiB of memory available"
    if torch.cuda.is_available():
        return Finding("device", "ok", f"{torch.cuda.get_device_name()}{room}")
    fast = "bfloat16 in hardware" if torch.cpu._is_avx512_bf16_supported() else "no bfloat16 in hardware"
    return Finding("device", "ok", f"CPU with {torch.get_num_threads()} threads, {fast}{room}")
