"""config.json as transformers sees it: the official field names, and the checks of our own `ModelConfig`.

Fields are those of the official `configuration_internlm2.py`; the defaults are InternLM2-7B. Nothing here
follows `auto_map`: it points to Python files in the folder, which this package never runs.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from internlm2.checkpoint.config_json import parse_config
from internlm2.errors import RequestError
from internlm2.model import ModelConfig
from internlm2.model.heads import ROPE_MODES, RopeMode

# Why not to keep these of the file: `auto_map` names remote code; `attn_implementation: eager` was the only
# choice when the files were written, and would cost memory that grows with the square of the length.
_STALE_KEYS = ("auto_map", "attn_implementation")

_NETWORK_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rms_norm_eps", "bias", "tie_word_embeddings", "initializer_range", "hidden_act",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


class InternLM2Config(PreTrainedConfig):
    """The configuration of an InternLM2 model in transformers. Defaults: InternLM2-7B.

    rope_scaling: None or {"type": "linear" | "dynamic", "factor": float}. rope_mode: "stateless" fixes one
    rotary base per sequence from its length limit; "reference" follows the official full prefill. They differ
    only with dynamic scaling beyond max_position_embeddings. See docs/transformers.md.
    """

    model_type = "internlm2"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - read by transformers as a class attribute
    # Where AutoTokenizer looks when tokenizer_config.json is absent.
    tokenizer_class = "InternLM2Tokenizer"
    # NOTE: without this line the base class turns `rope_scaling` into an alias of its own `rope_parameters`.
    rope_scaling: dict[str, object] | None = None

    def __init__(  # noqa: PLR0917 - the official signature
        self,
        vocab_size: int = 92544,
        hidden_size: int = 4096,
        intermediate_size: int = 14336,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 8,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        use_cache: bool = True,
        pad_token_id: int | None = 2,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        bias: bool = False,
        rope_theta: float = 1_000_000.0,
        rope_scaling: dict[str, object] | None = None,
        head_dim: int | None = None,
        reward_token_id: int | None = None,
        rope_mode: RopeMode = "stateless",
        **kwargs: Any,
    ) -> None:
        """Unknown keyword arguments go to transformers. Raises ConfigError for values that cannot be."""
        kwargs.pop("auto_map", None)
        parameters = kwargs.pop("rope_parameters", None)  # how other transformers 5 models spell the two
        if isinstance(parameters, Mapping):
            rope_theta = parameters.get("rope_theta", rope_theta)
            kind = parameters.get("rope_type") or parameters.get("type")
            if kind not in (None, "default") and rope_scaling is None:
                rope_scaling = {"type": kind, "factor": parameters.get("factor")}
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.bias = bias
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling or None
        self.head_dim = head_dim or hidden_size // max(1, num_attention_heads)
        if reward_token_id is not None:
            self.reward_token_id = reward_token_id
        self.rope_mode = rope_mode
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)
        self.network()

    def network(self) -> ModelConfig:
        """The mathematics of this configuration.

        Raises ConfigError when a value is impossible, RequestError for an unknown rope_mode.
        """
        if self.rope_mode not in ROPE_MODES:
            raise RequestError(
                f"rope_mode is {self.rope_mode!r}, but must be one of {', '.join(ROPE_MODES)}."
            )
        values = {name: self.__dict__[name] for name in _NETWORK_FIELDS}
        return parse_config({"model_type": "internlm2", **values}, where="InternLM2Config")

    @property
    def has_dynamic_rope(self) -> bool:
        """Whether the rotary base depends on how long a sequence may become."""
        return self.rope_scaling is not None and "dynamic" in self.rope_scaling.values()

    @classmethod
    def from_dict(cls, config_dict: dict[str, object], **kwargs: Any) -> "InternLM2Config":
        """Read config.json. Raises CheckpointError when it describes another architecture."""
        parse_config({"model_type": cls.model_type, **config_dict}, where="config.json")
        kept = {key: value for key, value in config_dict.items() if key not in _STALE_KEYS}
        return super().from_dict(kept | {"model_type": InternLM2Config.model_type}, **kwargs)

    def to_dict(self) -> dict[str, object]:
        """As config.json holds it; values that every official reader takes for granted are left out."""
        data = super().to_dict()
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            data.pop("head_dim", None)
        if self.rope_mode == "stateless":
            data.pop("rope_mode", None)
        return data


class EarlyInternLM2Config(InternLM2Config):
    """The folders of January 2024 say `model_type: internlm`; reading one gives an `InternLM2Config`."""

    model_type = "internlm"

    @classmethod
    def from_dict(cls, config_dict: dict[str, object], **kwargs: Any) -> InternLM2Config:
        """Read config.json. Raises CheckpointError for the first generation of InternLM."""
        parse_config({"model_type": cls.model_type, **config_dict}, where="config.json")
        return InternLM2Config.from_dict(dict(config_dict) | {"model_type": "internlm2"}, **kwargs)
