"""InternLM2, whole: checkpoints, tokenizer, network, inference and tools under one roof.

Names load on first use, so `import internlm2` costs nothing and `internlm2 --help` never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internlm2.checkpoint.load import load_model
    from internlm2.checkpoint.resolve import resolve_model
    from internlm2.engine.async_llm import AsyncLLM
    from internlm2.engine.llm import LLM
    from internlm2.engine.reward import RewardScorer
    from internlm2.engine.sampling.params import SamplingParams
    from internlm2.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "Tokenizer": "internlm2.tokenizer",
    "load_model": "internlm2.checkpoint.load",
    "resolve_model": "internlm2.checkpoint.resolve",
    "AsyncLLM": "internlm2.engine.async_llm",
    "LLM": "internlm2.engine.llm",
    "RewardScorer": "internlm2.engine.reward",
    "SamplingParams": "internlm2.engine.sampling.params",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "RewardScorer",
    "SamplingParams",
    "Tokenizer",
    "__version__",
    "load_model",
    "resolve_model",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'internlm2' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
