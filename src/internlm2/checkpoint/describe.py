"""`model info`: what a model is and what it needs, from headers alone; no weight is read."""

from dataclasses import asdict, dataclass
from pathlib import Path

from internlm2.checkpoint import memory
from internlm2.checkpoint.memory import ParameterCount
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import resolve_model
from internlm2.checkpoint.source import check_complete, dtype_name, expected_shapes
from internlm2.errors import RequestError
from internlm2.model.config import PRESETS, ModelConfig

CONTEXTS_TOKENS = (4_096, 32_768, 200_000)
# Bytes per value. int8 weights and keys/values carry scales besides, about 1 to 3 % more.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Description:
    """What `model info` prints. stored_dtype: of the files; None for a published shape without files."""

    name: str
    format: str
    stored_dtype: str | None
    config: ModelConfig
    parameters: ParameterCount
    contexts_tokens: tuple[int, ...]

    def weight_bytes(self, dtype: str) -> int:
        """Memory of all weights in `dtype`."""
        return self.parameters.total * DTYPE_BYTES[dtype]

    def cache_bytes(self, dtype: str, num_tokens: int) -> int:
        """Memory of the keys and values of one sequence in `dtype`."""
        return memory.kv_cache_bytes(self.config, num_tokens, bytes_per_value=DTYPE_BYTES[dtype])

    def as_json(self) -> dict[str, object]:
        """For programs; sizes in bytes."""
        return {
            "name": self.name,
            "format": self.format,
            "stored_dtype": self.stored_dtype,
            "config": asdict(self.config),
            "parameters": {
                "total": self.parameters.total,
                "embedding": self.parameters.embedding,
                "non_embedding": self.non_embedding,
            },
            "weight_bytes": {dtype: self.weight_bytes(dtype) for dtype in DTYPE_BYTES},
            "kv_cache_bytes": {
                dtype: {str(n): self.cache_bytes(dtype, n) for n in self.contexts_tokens}
                for dtype in DTYPE_BYTES
            },
        }

    @property
    def non_embedding(self) -> int:
        """Parameters besides the embedding and the output matrix."""
        output = 0 if self.config.tie_word_embeddings or self.config.head != "language" else 1
        return self.parameters.total - self.parameters.embedding * (1 + output)

    def as_text(self) -> str:
        """For people; sizes in GiB (2^30 bytes)."""
        config = self.config
        scaling = config.rope_scaling
        rope = f"base {config.rope_theta:,.0f}"
        if scaling is not None:
            rope += f", {scaling.kind} scaling, factor {scaling.factor:g}"
        lines = [
            f"{self.name}: {self.format}" + (f", {self.stored_dtype}" if self.stored_dtype else ""),
            f"  {config.head} head; {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
            f"feed-forward {config.intermediate_size}, vocabulary {config.vocab_size}",
            f"  {config.num_attention_heads} query heads, {config.num_key_value_heads} key/value heads of "
            f"{config.head_dim}; trained length {config.max_position_embeddings:,}; rope {rope}",
            f"  parameters {self.parameters.total:,} ({self.non_embedding:,} without embedding and output)",
            "",
            "Memory in GiB   weights" + "".join(f"{f'KV {n:,}':>13}" for n in self.contexts_tokens),
        ]
        for dtype in DTYPE_BYTES:
            sizes = [self.cache_bytes(dtype, n) / memory.GIB for n in self.contexts_tokens]
            row = "".join(f"{size:>13.2f}" for size in sizes)
            lines.append(f"  {dtype:<12}{self.weight_bytes(dtype) / memory.GIB:>9.2f}{row}")
        available = memory.available_bytes()
        if available is not None:
            lines.append(f"This machine has {available / memory.GIB:.1f} GiB available.")
        return "\n".join(lines)


def describe(model: str, *, context: int | None = None) -> Description:
    """Describe a model, or a published shape by name (1.8b, 7b, 20b) without any files.

    context: one more context length for the table, in tokens. Raises CheckpointError, ConfigError.
    """
    if context is not None and context < 1:
        raise RequestError(f"context is {context}, but must be at least 1 token.")
    contexts = CONTEXTS_TOKENS if context is None else tuple(sorted({*CONTEXTS_TOKENS, context}))
    if model.lower() in PRESETS and not Path(model).exists():
        config = PRESETS[model.lower()]
        count = memory.count_parameters(expected_shapes(config))
        return Description(
            f"InternLM2 {model.upper()}", "published shape, no files", None, config, count, contexts
        )
    checkpoint = open_checkpoint(resolve_model(model))
    check_complete(checkpoint)
    config = checkpoint.config
    return Description(
        name=model,
        format=type(checkpoint).__name__.removesuffix("Checkpoint"),
        stored_dtype=dtype_name(checkpoint.tensors["model.tok_embeddings.weight"].dtype),
        config=config,
        parameters=memory.count_parameters(expected_shapes(config)),
        contexts_tokens=contexts,
    )
