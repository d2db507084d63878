"""Makes transformers' Auto classes know InternLM2, so that they take our classes and never a folder's code.

Classes registered from outside transformers win over the `auto_map` of a folder, whatever
`trust_remote_code` says. Only AutoTokenizer needs more; why is told in
docs/decisions/003-transformers-without-remote-code.md.
"""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from internlm2.checkpoint.config_json import parse_config
from internlm2.errors import InternLM2Error
from internlm2.hf.configuration import EarlyInternLM2Config, InternLM2Config
from internlm2.hf.modeling import InternLM2ForCausalLM, InternLM2ForSequenceClassification, InternLM2Model
from internlm2.hf.reward import InternLM2ForRewardModel
from internlm2.hf.tokenization import InternLM2Tokenizer

_TOKENIZER_CLASSES = ("InternLM2Tokenizer", "InternLM2TokenizerFast")
_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def register() -> None:
    """Tell the Auto classes about InternLM2. Called once, by `import internlm2.hf`."""
    AutoConfig.register("internlm2", InternLM2Config)
    AutoConfig.register("internlm", EarlyInternLM2Config)
    # Where there are several, `architectures` in config.json chooses; the first where it names none of them.
    # As in the official auto_map, AutoModel gives the language model, not its trunk.
    AutoModel.register(
        InternLM2Config,
        (InternLM2ForCausalLM, InternLM2ForRewardModel, InternLM2ForSequenceClassification, InternLM2Model),
    )
    AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM)
    AutoModelForSequenceClassification.register(
        InternLM2Config, (InternLM2ForSequenceClassification, InternLM2ForRewardModel)
    )
    AutoTokenizer.register(InternLM2Config, fast_tokenizer_class=InternLM2Tokenizer)
    _give_internlm2_folders_our_tokenizer()


def _give_internlm2_folders_our_tokenizer() -> None:
    # NOTE: AutoTokenizer runs the folder's code where tokenizer_config.json has an auto_map and the user
    # trusts it, even for a registered tokenizer. So InternLM2 folders are sent past it; others go through.
    original = AutoTokenizer.from_pretrained

    def from_pretrained(
        cls: type, pretrained_model_name_or_path: str | Path, *inputs: object, **kwargs: Any
    ) -> PreTrainedTokenizerBase | None:
        if _is_internlm2(pretrained_model_name_or_path, kwargs):
            return InternLM2Tokenizer.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)
        return original(pretrained_model_name_or_path, *inputs, **kwargs)

    AutoTokenizer.from_pretrained = classmethod(from_pretrained)  # pyrefly: ignore[bad-assignment]


def _is_internlm2(path: str | Path, kwargs: dict[str, Any]) -> bool:
    if isinstance(kwargs.get("config"), PreTrainedConfig):
        return isinstance(kwargs["config"], InternLM2Config)
    hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    try:
        data, _ = PreTrainedConfig.get_config_dict(path, **hub)
    except (OSError, ValueError):  # no config.json: tokenizers may lie alone
        data = {}
    if data.get("model_type") in (InternLM2Config.model_type, EarlyInternLM2Config.model_type):
        try:
            parse_config(data, where=str(path))
        except InternLM2Error:  # the first generation of InternLM has another tokenizer
            return False
        return True
    return get_tokenizer_config(path, **hub).get("tokenizer_class") in _TOKENIZER_CLASSES
