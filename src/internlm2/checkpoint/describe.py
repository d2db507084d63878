"""`model info`: what a model is and what it needs, from headers alone; no weight is read."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from internlm2.checkpoint import memory
from internlm2.checkpoint.inference import AUTO, WeightChoice, choose_for, choose_weights
from internlm2.checkpoint.load import file_dtype, parse_device
from internlm2.checkpoint.memory import ParameterCount
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.plan import (
    Plan,
    check_options,
    context_limit,
    kv_bytes_per_token,
    longest_context,
    plan,
)
from internlm2.checkpoint.resolve import resolve_model
from internlm2.checkpoint.source import check_complete, dtype_name, expected_shapes
from internlm2.model.config import PRESETS, ModelConfig

CONTEXTS_TOKENS = (4_096, 32_768, 200_000)
# Bytes per value of a weight. int8 weights carry scales besides, about 1 to 3 % more.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Fit:
    """A plan on this machine.

    context_limit: what the model is made for; None: any length. available_bytes: None where the system does not
    tell. longest_tokens: dtype of keys and values -> the longest context beside the weights; empty then.
    """

    plan: Plan
    context_limit: int | None
    device: str
    available_bytes: int | None
    longest_tokens: dict[str, int]

    def as_json(self) -> dict[str, object]:
        """For programs."""
        available = self.available_bytes
        return {
            "plan": asdict(self.plan),
            "context_limit": self.context_limit,
            "machine": {
                "device": self.device,
                "available_bytes": available,
                "fits": None if available is None else self.plan.total_bytes <= available,
                "longest_context": self.longest_tokens,
            },
        }

    def as_text(self) -> str:
        """For people; memory in GiB, traffic in GB (10^9 bytes), as bandwidths are."""
        p = self.plan
        many = "1 sequence" if p.num_sequences == 1 else f"{p.num_sequences:,} sequences"
        lines = [
            f"Plan: {many} of {p.num_tokens:,} tokens, {p.dtype}, keys and values {p.kv_dtype}",
            f"  weights           {p.weight_bytes / memory.GIB:>10.2f} GiB",
            f"  keys and values   {p.kv_bytes / memory.GIB:>10.2f} GiB   {p.kv_bytes_per_token:,} bytes a token",
            f"  working memory    {p.activation_bytes / memory.GIB:>10.2f} GiB   prefill chunk of {p.chunk_tokens}",
            f"  total             {p.total_bytes / memory.GIB:>10.2f} GiB   {self._verdict()}",
        ]
        if self.longest_tokens:
            lines.append(f"  longest that fits  {self._longest()}")
        prefill, decode = (
            _scaled(linear + attention, "FLOP") + f" ({_scaled(attention, 'FLOP')} of it attention)"
            for linear, attention in (
                (p.prefill_linear_flops, p.prefill_attention_flops),
                (p.decode_linear_flops, p.decode_attention_flops),
            )
        )
        lines += [
            f"  prefill            {prefill}",
            f"  decode, last token {decode}, reads {_scaled(p.decode_read_bytes, 'B')}",
        ]
        if self.context_limit is not None and p.num_tokens > self.context_limit:
            lines.append(
                f"  NOTE: the model is made for {self.context_limit:,} tokens; config.json needs dynamic "
                "rope_scaling for more"
            )
        return "\n".join(lines)

    def _longest(self) -> str:
        if not any(self.longest_tokens.values()):
            return "none: the weights leave no room"
        each = " each" if self.plan.num_sequences > 1 else ""
        return ", ".join(f"{n:,} tokens{each} in {dtype}" for dtype, n in self.longest_tokens.items())

    def _verdict(self) -> str:
        if self.available_bytes is None:
            return f"{self.device} does not tell what is available"
        spare = self.available_bytes - self.plan.total_bytes
        short = f"does not fit, {-spare / memory.GIB:.2f} GiB too little"
        outcome = short if spare < 0 else f"fits, {spare / memory.GIB:.2f} GiB to spare"
        return f"{self.device} has {self.available_bytes / memory.GIB:.2f} GiB available: {outcome}"


def fit(
    config: ModelConfig,
    *,
    num_tokens: int,
    dtype: str,
    kv_dtype: str | None,
    num_sequences: int,
    device: torch.device,
) -> Fit:
    """Plan a run and compare it with what `device` has left; see `plan.plan`."""
    needed = plan(config, num_tokens=num_tokens, dtype=dtype, kv_dtype=kv_dtype, num_sequences=num_sequences)
    available = memory.available_on(device)
    longest: dict[str, int] = {}
    if available is not None:
        longest = {
            name: longest_context(
                config,
                memory_bytes=available - needed.weight_bytes,
                dtype=dtype,
                kv_dtype=name,
                num_sequences=num_sequences,
            )
            for name in (dtype, "int8")
        }
    return Fit(needed, context_limit(config), str(device), available, longest)


def _scaled(value: int, unit: str) -> str:
    """13_280_000_000_000_000 -> "13.3 PFLOP"."""
    number = float(value)
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:,.0f} E{unit}"


@dataclass(frozen=True)
class Description:
    """What `model info` prints. stored_dtype: of the files; None for a published shape without files.

    weights: how an `LLM` would hold them here, unasked.
    """

    name: str
    format: str
    stored_dtype: str | None
    config: ModelConfig
    parameters: ParameterCount
    contexts_tokens: tuple[int, ...]
    weights: WeightChoice
    fit: Fit

    def weight_bytes(self, dtype: str) -> int:
        """Memory of all weights in `dtype`."""
        return self.parameters.total * DTYPE_BYTES[dtype]

    def cache_bytes(self, dtype: str, num_tokens: int) -> int:
        """Memory of the keys and values of one sequence in `dtype`."""
        return num_tokens * kv_bytes_per_token(self.config, dtype)

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
            "weights": asdict(self.weights),
            "weight_bytes": {dtype: self.weight_bytes(dtype) for dtype in DTYPE_BYTES},
            "kv_cache_bytes": {
                dtype: {str(n): self.cache_bytes(dtype, n) for n in self.contexts_tokens}
                for dtype in DTYPE_BYTES
            },
            **self.fit.as_json(),
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
            f"  unasked, weights are {self.weights.held}",
            "",
            "Memory in GiB   weights" + "".join(f"{f'KV {n:,}':>13}" for n in self.contexts_tokens),
        ]
        for dtype in DTYPE_BYTES:
            sizes = [self.cache_bytes(dtype, n) / memory.GIB for n in self.contexts_tokens]
            row = "".join(f"{size:>13.2f}" for size in sizes)
            lines.append(f"  {dtype:<12}{self.weight_bytes(dtype) / memory.GIB:>9.2f}{row}")
        return "\n".join([*lines, "", self.fit.as_text()])


def describe(
    model: str,
    *,
    context: int | None = None,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    num_sequences: int = 1,
    device: str = "auto",
) -> Description:
    """Describe a model, or a published shape by name (1.8b or internlm2-1.8b, 7b, 20b) without any files.

    context: the length to plan for, in tokens; None: the trained length. dtype, kv_dtype, num_sequences: see
    `plan.plan`. device: where it shall run: "cpu", "cuda", "cuda:N"; "auto": a GPU when there is one.
    Raises CheckpointError, ConfigError, RequestError.
    """
    check_options(
        num_tokens=1 if context is None else context,
        dtype=dtype,
        kv_dtype=kv_dtype,
        num_sequences=num_sequences,
    )
    place = parse_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    size = model.lower().removeprefix("internlm2-")
    if size in PRESETS and not Path(model).exists():
        name, kind, stored, config = (
            f"InternLM2 {size.upper()}",
            "published shape, no files",
            None,
            PRESETS[size],
        )
        weights = choose_weights(wanted=AUTO, dtype=dtype, device=str(place))
    else:
        checkpoint = open_checkpoint(resolve_model(model))
        check_complete(checkpoint)
        name, kind = model, type(checkpoint).__name__.removesuffix("Checkpoint")
        stored, config = dtype_name(file_dtype(checkpoint)), checkpoint.config
        weights = choose_for(checkpoint, wanted=AUTO, dtype=dtype, device=str(place))
    length = config.max_position_embeddings if context is None else context
    return Description(
        name=name,
        format=kind,
        stored_dtype=stored,
        config=config,
        parameters=memory.count_parameters(expected_shapes(config)),
        contexts_tokens=CONTEXTS_TOKENS if context is None else tuple(sorted({*CONTEXTS_TOKENS, context})),
        weights=weights,
        fit=fit(
            config,
            num_tokens=length,
            dtype=dtype,
            kv_dtype=kv_dtype,
            num_sequences=num_sequences,
            device=place,
        ),
    )
