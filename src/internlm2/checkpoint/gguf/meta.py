"""The metadata of a GGUF file: typed access, and the network that it describes.

What InternLM2 cannot express (experts, yarn, partial rotary, sliding windows) is refused by name, never
ignored.
"""

import numpy as np
from gguf import GGUFReader

from internlm2.checkpoint.gguf.names import ARCHITECTURES, DYNAMIC_FACTOR_KEY
from internlm2.errors import CheckpointError, ConfigError
from internlm2.model.config import ModelConfig, RopeScaling


class Metadata:
    """Values by key. where: the file's name, for messages. Wrong types raise CheckpointError."""

    def __init__(self, reader: GGUFReader, *, where: str) -> None:
        self._fields = reader.fields
        self._values: dict[str, object] = {}  # long lists take gguf a while
        self.where = where

    def get(self, key: str) -> object:
        """The value, or None when the key is absent. Lists come as lists."""
        field = self._fields.get(key)
        if field is None:
            return None
        try:
            if key not in self._values:
                self._values[key] = field.contents()
            return self._values[key]
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{self.where}: metadata {key} is damaged ({error}). Download it again."
            ) from error

    def integer(self, key: str) -> int | None:
        """A whole number, or None."""
        value = self.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise CheckpointError(
                f"{self.where}: metadata {key} is {value!r:.60}, but must be a whole number."
            )
        return value

    def need_integer(self, key: str) -> int:
        """A whole number that must be there."""
        value = self.integer(key)
        if value is None:
            raise CheckpointError(f"{self.where}: metadata {key} is missing. Convert the model again.")
        return value

    def number(self, key: str) -> float | None:
        """A number, or None. float32 values come as the shortest decimal that gives them: 1e-05."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{self.where}: metadata {key} is {value!r:.60}, but must be a number.")
        return float(str(np.float32(value)))

    def text(self, key: str) -> str | None:
        """A text, or None."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self.where}: metadata {key} is {value!r:.60}, but must be a text.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        return default if value is None else bool(value)

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty when the key is absent."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CheckpointError(
                f"{self.where}: metadata {key} must be a list of texts. Convert the model again."
            )
        return value

    def numbers(self, key: str) -> list[float]:
        """A list of numbers; empty when the key is absent."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
            raise CheckpointError(
                f"{self.where}: metadata {key} must be a list of numbers. Convert the model again."
            )
        return value


def parse_metadata(meta: Metadata, tensor_names: frozenset[str]) -> ModelConfig:
    """The network of a GGUF file. tensor_names: as the file calls them.

    Raises CheckpointError for another architecture or a split file, ConfigError for what InternLM2 cannot
    express.
    """
    architecture = meta.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{meta.where}: architecture {architecture!r} is not InternLM2. "
            f"Readable: {', '.join(ARCHITECTURES)}."
        )
    parts = meta.integer("split.count") or 1
    if parts > 1:
        raise CheckpointError(
            f"{meta.where} is one of {parts} parts. Join them with llama.cpp's "
            "`llama-gguf-split --merge`, and give the joined file."
        )
    prefix = f"{architecture}."
    heads = meta.need_integer(f"{prefix}attention.head_count")
    hidden_size = meta.need_integer(f"{prefix}embedding_length")
    head_dim = meta.integer(f"{prefix}attention.key_length") or hidden_size // max(heads, 1)
    _check_expressible(meta, prefix, head_dim, tensor_names)
    eps = meta.number(f"{prefix}attention.layer_norm_rms_epsilon")
    if eps is None:
        raise CheckpointError(f"{meta.where}: metadata {prefix}attention.layer_norm_rms_epsilon is missing.")
    theta = meta.number(f"{prefix}rope.freq_base")
    try:
        return ModelConfig(
            vocab_size=meta.integer(f"{prefix}vocab_size") or len(meta.texts("tokenizer.ggml.tokens")),
            hidden_size=hidden_size,
            intermediate_size=meta.need_integer(f"{prefix}feed_forward_length"),
            num_hidden_layers=meta.need_integer(f"{prefix}block_count"),
            num_attention_heads=heads,
            num_key_value_heads=meta.integer(f"{prefix}attention.head_count_kv") or heads,
            head_dim=head_dim,
            max_position_embeddings=meta.need_integer(f"{prefix}context_length"),
            rope_theta=10000.0 if theta is None else theta,
            rope_scaling=_rope_scaling(meta, prefix),
            rms_norm_eps=eps,
            bias="blk.0.attn_q.bias" in tensor_names,
            tie_word_embeddings="output.weight" not in tensor_names,
            bos_token_id=bos_id(meta),
            eos_token_id=document_end_id(meta),
            pad_token_id=meta.integer("tokenizer.ggml.padding_token_id"),
        )
    except ConfigError as error:
        raise ConfigError(f"{meta.where}: {error}") from error


def bos_id(meta: Metadata) -> int | None:
    """The id that starts every sequence; None when the tokenizer adds none (byte-level BPE, by default)."""
    adds = meta.flag("tokenizer.ggml.add_bos_token", meta.text("tokenizer.ggml.model") != "gpt2")
    return meta.integer("tokenizer.ggml.bos_token_id") if adds else None


def document_end_id(meta: Metadata) -> int | None:
    """The id that ends a document.

    NOTE: for InternLM2 chat models llama.cpp's converter puts `<|im_end|>` where other formats have `</s>`.
    """
    eos = meta.integer("tokenizer.ggml.eos_token_id")
    tokens = meta.texts("tokenizer.ggml.tokens")
    if eos is not None and eos < len(tokens) and tokens[eos] == "<|im_end|>" and tokens[2:3] == ["</s>"]:
        return 2
    return eos


def _check_expressible(meta: Metadata, prefix: str, head_dim: int, tensor_names: frozenset[str]) -> None:
    allowed = {
        "expert_count": (None, 0),
        "attention.sliding_window": (None, 0),
        "attention.value_length": (None, head_dim),
        "rope.dimension_count": (None, head_dim),
    }
    for key, values in allowed.items():
        if meta.integer(prefix + key) not in values:
            raise ConfigError(
                f"{meta.where}: {prefix}{key} is {meta.integer(prefix + key)}, which InternLM2 cannot "
                f"express (head width {head_dim}, no experts, no sliding window). Give another model."
            )
    if any(name.startswith("rope_freqs") or name.startswith("rope_factors") for name in tensor_names):
        raise ConfigError(
            f"{meta.where} has rotary frequencies of its own (Llama 3.1 or longrope scaling), which "
            "InternLM2 cannot express. Give another model."
        )


def _rope_scaling(meta: Metadata, prefix: str) -> RopeScaling | None:
    dynamic = meta.number(DYNAMIC_FACTOR_KEY)
    if dynamic is not None:
        return RopeScaling("dynamic", dynamic)
    kind = meta.text(f"{prefix}rope.scaling.type")
    factor = meta.number(f"{prefix}rope.scaling.factor") or meta.number(f"{prefix}rope.scale_linear")
    if kind not in (None, "none", "linear"):
        raise ConfigError(
            f"rope.scaling.type is {kind!r}, but InternLM2 has only linear and dynamic scaling."
        )
    if kind == "none" or not factor or factor == 1.0:
        return None
    return RopeScaling("linear", factor)
