"""InternLM2 in transformers: `import internlm2.hf`, then use transformers as usual. No remote code is run."""

from internlm2.errors import MissingDependencyError

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        "internlm2.hf needs transformers 5, which is not installed. "
        "Install it with: pip install 'internlm2[hf]'"
    ) from error

from internlm2.hf.configuration import InternLM2Config
from internlm2.hf.modeling import InternLM2ForCausalLM, InternLM2ForSequenceClassification, InternLM2Model
from internlm2.hf.register import register as _register
from internlm2.hf.reward import InternLM2ForRewardModel
from internlm2.hf.tokenization import InternLM2Tokenizer, InternLM2TokenizerFast

_register()

__all__ = [
    "InternLM2Config",
    "InternLM2ForCausalLM",
    "InternLM2ForRewardModel",
    "InternLM2ForSequenceClassification",
    "InternLM2Model",
    "InternLM2Tokenizer",
    "InternLM2TokenizerFast",
]
