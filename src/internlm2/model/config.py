"""The shape of a network: one frozen dataclass, checked when it is made, and the published sizes.

Values: report arXiv 2403.17297, table 3, and the configs of the released checkpoints.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from internlm2.errors import ConfigError

Head = Literal["language", "reward", "value", "classification"]

# `[UNUSED_TOKEN_130]`: the token whose output the published reward models score.
REWARD_TOKEN_ID = 92527

# Far beyond any model; what is larger is a damaged file, and would exhaust memory before it is noticed.
MAX_SIZE = 1 << 31
MAX_LAYERS = 10_000
MAX_NUMBER = 1e30


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles change beyond (dynamic) or at (linear) the trained length.

    kind: "linear" divides positions by `factor`; "dynamic" enlarges the base once a sequence is longer
    than `max_position_embeddings`. factor: at least 1.
    """

    kind: Literal["linear", "dynamic"]
    factor: float

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "dynamic"):
            raise ConfigError(f"rope_scaling type is {self.kind!r}, but must be 'linear' or 'dynamic'.")
        if not math.isfinite(self.factor) or self.factor < 1:
            raise ConfigError(f"rope_scaling factor is {self.factor}, but must be a number of at least 1.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes the mathematics of an InternLM2 network. The defaults are InternLM2-7B.

    head_dim: width of one head; 0 means hidden_size / num_attention_heads, as in every release.
    bias: whether wqkv and wo carry a bias. num_labels: outputs of the classification head.
    Raises ConfigError when a value is impossible or contradicts another.
    """

    vocab_size: int = 92544
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 0
    max_position_embeddings: int = 32768
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    head: Head = "language"
    num_labels: int = 2
    reward_token_id: int = REWARD_TOKEN_ID
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_value(field.name, getattr(self, field.name))
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ConfigError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}: "
                "every key/value head must serve the same number of query heads."
            )
        if self.head_dim == 0:
            if self.hidden_size % heads:
                raise ConfigError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}, "
                    "so the width of a head is unknown. Mend one of the two, or state head_dim."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd, but rotary embeddings turn pairs.")

    def _check_value(self, name: str, value: object) -> None:
        if name.startswith(("vocab_", "hidden_", "intermediate_", "num_", "max_")):
            limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise ConfigError(f"{name} is {_short(value)}, but must be a whole number from 1 to {limit}.")
        elif name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value <= MAX_NUMBER:
                raise ConfigError(f"{name} is {_short(value)}, but must be a finite number above 0.")
        elif name == "head_dim":
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SIZE:
                raise ConfigError(f"head_dim is {_short(value)}, but must be a whole number above 0.")
        elif name in ("bias", "tie_word_embeddings") and not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}, but must be true or false.")

    @property
    def queries_per_group(self) -> int:
        """G: how many query heads share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the fused wqkv: (H + 2 K) D."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of over 30 digits"
    return text[:80]


PRESETS: dict[str, ModelConfig] = {
    "1.8b": ModelConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16
    ),
    "7b": ModelConfig(),
    "20b": ModelConfig(
        hidden_size=6144, intermediate_size=16384, num_hidden_layers=48, num_attention_heads=48
    ),
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        reward_token_id=510,
    ),
}


def preset(name: str) -> ModelConfig:
    """The published shape called "1.8b", "7b" or "20b", or "tiny" for tests. Raises ConfigError otherwise."""
    if name.lower() not in PRESETS:
        raise ConfigError(f"No preset called {name!r}. Known: {', '.join(PRESETS)}.")
    return PRESETS[name.lower()]
