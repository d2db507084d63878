"""config.json <-> ModelConfig, for every generation of official folders and for Llama-layout ones.

Old folders say `model_type: internlm`, null or over-full `rope_scaling`; newer ones add keys that do not
matter here. Only keys that fix the mathematics are read, and those are checked.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from internlm2.errors import CheckpointError, ConfigError
from internlm2.model.config import MAX_NUMBER, Head, ModelConfig, RopeScaling

CONFIG_FILE = "config.json"
ARCHITECTURES: dict[Head, str] = {
    "language": "InternLM2ForCausalLM",
    "reward": "InternLM2ForRewardModel",
    "value": "InternLM2ForValueModel",
    "classification": "InternLM2ForSequenceClassification",
}

Json = Mapping[str, object]


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises CheckpointError when it is missing, damaged, or not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}, so it is not a model folder. Give the folder that holds "
            "config.json and the weights."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Download that file again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, but must hold a JSON object.")
    return data


def is_llama(data: Json) -> bool:
    """Whether a config.json describes a Llama-layout folder."""
    return data.get("model_type") == "llama"


def parse_config(data: Json, *, where: str) -> ModelConfig:
    """The network that a config.json describes.

    data: the parsed file, of InternLM2 (any generation) or Llama layout. where: its name, for messages.
    Raises CheckpointError for another architecture, ConfigError for values that cannot be.
    """
    _check_architecture(data, where)
    values = _Values(data)
    try:
        num_heads = values.integer("num_attention_heads")
        return ModelConfig(
            vocab_size=values.integer("vocab_size"),
            hidden_size=values.integer("hidden_size"),
            intermediate_size=values.integer("intermediate_size"),
            num_hidden_layers=values.integer("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=values.integer("num_key_value_heads", num_heads),
            head_dim=values.integer("head_dim", 0),
            max_position_embeddings=values.integer("max_position_embeddings"),
            rope_theta=_rope_theta(data),
            rope_scaling=_rope_scaling(data),
            rms_norm_eps=values.number("rms_norm_eps"),
            bias=values.flag("attention_bias" if is_llama(data) else "bias"),
            tie_word_embeddings=values.flag("tie_word_embeddings"),
            initializer_range=values.number("initializer_range", 0.02),
            head=_head(data),
            num_labels=_num_labels(data),
            reward_token_id=values.integer("reward_token_id", ModelConfig.reward_token_id),
            bos_token_id=_token_id(data, "bos_token_id"),
            eos_token_id=_token_id(data, "eos_token_id"),
            pad_token_id=_token_id(data, "pad_token_id"),
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def config_to_json(config: ModelConfig, *, dtype: str) -> dict[str, object]:
    """config.json of an official-layout folder. dtype: "float32", "bfloat16" or "float16", of the weights."""
    scaling = config.rope_scaling
    data: dict[str, object] = {
        "architectures": [ARCHITECTURES[config.head]],
        "attn_implementation": "eager",
        "bias": config.bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "internlm2",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None if scaling is None else {"type": scaling.kind, "factor": scaling.factor},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        data["head_dim"] = config.head_dim  # no official folder has it; ours and Llama's may
    if config.head == "reward":
        data["reward_token_id"] = config.reward_token_id
    if config.head == "classification":
        data["num_labels"] = config.num_labels
        data["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        data["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    return data


def _check_architecture(data: Json, where: str) -> None:
    model_type = data.get("model_type")
    architectures = str(data.get("architectures") or "")
    # NOTE: the first folders of January 2024 said `internlm`; the first generation had no grouped heads.
    is_early = model_type == "internlm" and ("InternLM2" in architectures or "num_key_value_heads" in data)
    if model_type not in ("internlm2", "llama") and not is_early:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} with architectures {architectures or 'not stated'} is not "
            "InternLM2. Supported: InternLM2 and InternLM2.5 (language, reward, classification), and the "
            "Llama layout."
        )
    activation = data.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{where}: hidden_act is {activation!r}, but InternLM2 has only 'silu'.")
    if "quantization_config" in data:
        raise CheckpointError(
            f"{where}: these weights are already quantised by another tool (quantization_config). "
            "Give the original folder, or a GGUF file."
        )


class _Values:
    """Reads values of a stated type; null counts as absent, and absent without a default is an error."""

    def __init__(self, data: Json) -> None:
        self._data = data

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{key} is {value!r}, but must be a whole number.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{key} is {value!r}, but must be a number.")
        return value

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is {value!r}, but must be true or false.")
        return value

    def _get(self, key: str, default: object) -> object:
        value = self._data.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{key} is missing. Download config.json again, or add the key.")
        return value


def _rope_theta(data: Json) -> float:
    parameters = data.get("rope_parameters")  # transformers 5
    if isinstance(parameters, Mapping) and "rope_theta" in parameters:
        return _Values(parameters).number("rope_theta")
    return _Values(data).number("rope_theta", 10000.0)


def _rope_scaling(data: Json) -> RopeScaling | None:
    raw = data.get("rope_scaling")
    raw = data.get("rope_parameters") if raw is None else raw
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"rope_scaling is {raw!r}, but must be null or an object with type and factor.")
    kind = raw.get("type") or raw.get("rope_type")
    if kind == "default" or (kind is None and "factor" not in raw):
        return None
    if kind not in ("linear", "dynamic"):
        raise ConfigError(f"rope_scaling type is {kind!r}, but must be 'linear' or 'dynamic'.")
    factor = raw.get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or factor > MAX_NUMBER:
        raise ConfigError(f"rope_scaling factor is {factor!r}, but must be a number of at least 1.")
    return RopeScaling(kind, float(factor))


def _head(data: Json) -> Head:
    architectures = str(data.get("architectures") or "")
    for head, ending in (
        ("reward", "ForRewardModel"),
        ("value", "ForValueModel"),
        ("classification", "ForSequenceClassification"),
    ):
        if ending in architectures:
            return head
    return "language"


def _num_labels(data: Json) -> int:
    labels = data.get("id2label")
    if isinstance(labels, Mapping) and labels:
        return len(labels)
    return _Values(data).integer("num_labels", 2)


def _token_id(data: Json, key: str) -> int | None:
    value = data.get(key)
    if isinstance(value, list):  # several end tokens: the first is the tokenizer's own
        value = value[0] if value else None
    if value == -1:  # how some folders write "none"
        return None
    if value is None:
        return None
    vocab_size = _Values(data).integer("vocab_size")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ConfigError(f"{key} is {value!r}, but must be a token id from 0 to {vocab_size - 1}.")
    return value
