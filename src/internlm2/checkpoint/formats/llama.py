"""The Llama layout of Hugging Face: plain `LlamaForCausalLM` folders, read and written.

The mathematics is the same as InternLM2's; only names differ, and queries, keys and values lie apart. Both
directions are bit-exact. Source: InternLM tools/convert2llama.py for the correspondence of the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from internlm2 import files
from internlm2.checkpoint.config_json import CONFIG_FILE, Json, is_llama, parse_config, read_json
from internlm2.checkpoint.formats import wqkv
from internlm2.checkpoint.formats.names import NameTable, map_official, part_shapes
from internlm2.checkpoint.save import MAX_SHARD_BYTES, total_bytes, write_json, write_shards
from internlm2.checkpoint.source import Checkpoint, TensorInfo, check_complete, dtype_name, expected_shapes
from internlm2.checkpoint.stores import open_store
from internlm2.errors import CheckpointError, ConfigError, ExportError
from internlm2.model.config import ModelConfig

LLAMA_NAMES = NameTable(
    outer={
        "model.tok_embeddings.weight": "model.embed_tokens.weight",
        "model.norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "score.weight": "score.weight",
    },
    layer_prefix="model.layers.{}.",
    inner={
        "attention_norm": ("input_layernorm",),
        "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.wo": ("self_attn.o_proj",),
        "ffn_norm": ("post_attention_layernorm",),
        "feed_forward.w1": ("mlp.gate_proj",),
        "feed_forward.w3": ("mlp.up_proj",),
        "feed_forward.w2": ("mlp.down_proj",),
    },
)

ARCHITECTURES = {"language": "LlamaForCausalLM", "classification": "LlamaForSequenceClassification"}


class LlamaCheckpoint:
    """A Llama-layout folder under the official names."""

    def __init__(self, folder: Path) -> None:
        """Read headers only. Raises CheckpointError or ConfigError when InternLM2 cannot be this model."""
        self.path = folder
        data = read_json(folder / CONFIG_FILE)
        self.config: ModelConfig = parse_llama_config(data, where=str(folder / CONFIG_FILE))
        self._store = open_store(folder)
        self.tensors: Mapping[str, TensorInfo] = map_official(
            folder, self.config, self._store.tensors, LLAMA_NAMES
        )
        self.tokenizer_folder: Path | None = folder

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the official layout; wqkv is fused as it is read."""
        names = LLAMA_NAMES.of(name)
        if len(names) == 1:
            return self._store.read(names[0])
        q, k, v = map(self._store.read, names)
        return wqkv.fuse(wqkv.Projections(q, k, v), self.config)


def parse_llama_config(data: Json, *, where: str) -> ModelConfig:
    """The network of a Llama-layout config.json.

    Raises ConfigError for what InternLM2 cannot express, CheckpointError for another architecture.
    """
    if not is_llama(data):
        raise CheckpointError(f"{where}: model_type is {data.get('model_type')!r}, but must be 'llama'.")
    limits: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("mlp_bias", (None, False)),
        ("sliding_window", (None,)),
        ("partial_rotary_factor", (None, 1, 1.0)),
    )
    for key, allowed in limits:
        if data.get(key) not in allowed:
            raise ConfigError(
                f"{where}: {key} is {data[key]!r}, which InternLM2 cannot express: it has no feed-forward "
                "bias, full attention and rotary embedding over the whole head. Give another model."
            )
    return parse_config(data, where=where)


def write_llama(
    checkpoint: Checkpoint,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a new folder that plain transformers loads as Llama: config, safetensors, tokenizer.

    dtype: None keeps each tensor's own. Raises CheckpointError when the checkpoint is incomplete, ExportError
    when the head has no Llama form or the folder cannot be written.
    """
    config = checkpoint.config
    if config.head not in ARCHITECTURES:
        raise ExportError(
            f"The Llama layout has no {config.head} head. Convert a language or classification model, "
            "or keep the InternLM2 layout."
        )
    check_complete(checkpoint)
    source = LlamaTensors(checkpoint)
    tensors = list(source.tensors.items())
    stored = dtype or source.tensors["model.embed_tokens.weight"].dtype
    with files.new_folder(target, need_bytes=total_bytes(tensors, dtype)) as folder:
        write_shards(folder, tensors, source.read, dtype=dtype, max_shard_bytes=max_shard_bytes)
        write_json(folder / CONFIG_FILE, llama_config(config, dtype=dtype_name(stored)))
        write_generation(checkpoint, folder)


def write_generation(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the tokenizer, if there is one, and generation_config.json as plain transformers reads them."""
    config = checkpoint.config
    stop_ids = _write_tokenizer(checkpoint, folder)
    ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    write_json(folder / "generation_config.json", {"eos_token_id": stop_ids} | ids)


def llama_config(config: ModelConfig, *, dtype: str) -> dict[str, object]:
    """config.json of a Llama-layout folder, in the keys that transformers 4 and 5 both read."""
    scaling = config.rope_scaling
    data: dict[str, object] = {
        "architectures": [ARCHITECTURES[config.head]],
        "attention_bias": config.bias,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        # Before 4.43 the key was `type`, since then it is `rope_type`; each version ignores the other.
        "rope_scaling": None
        if scaling is None
        else {"type": scaling.kind, "rope_type": scaling.kind, "factor": scaling.factor},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.head == "classification":
        data["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        data["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    return data


@dataclass(frozen=True)
class _Part:
    official: str
    index: int | None  # which of queries, keys, values; None for a tensor that stays whole


class LlamaTensors:
    """A checkpoint under Llama's names. A fused wqkv is read once for its three parts."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._fused: tuple[str, wqkv.Projections] | None = None
        self._parts: dict[str, _Part] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for official, shape in expected_shapes(checkpoint.config).items():
            info = checkpoint.tensors[official]
            names = LLAMA_NAMES.of(official)
            shapes = part_shapes(checkpoint.config, official, shape)
            for index, (name, part_shape) in enumerate(zip(names, shapes, strict=True)):
                self._parts[name] = _Part(official, index if len(names) > 1 else None)
                self.tensors[name] = TensorInfo(part_shape, info.dtype, info.file)

    def read(self, name: str) -> torch.Tensor:
        """One tensor under its Llama name."""
        part = self._parts[name]
        if part.index is None:
            return self._checkpoint.read(part.official)
        if self._fused is None or self._fused[0] != part.official:
            fused = self._checkpoint.read(part.official)
            self._fused = part.official, wqkv.split(fused, self._checkpoint.config)
        parts = self._fused[1]
        return (parts.q, parts.k, parts.v)[part.index]


def has_tokenizer(folder: Path | None) -> bool:
    """Whether tokenizer files lie in a folder."""
    return folder is not None and any(
        (folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")
    )


def stop_token_ids(config: ModelConfig, stop_ids: frozenset[int]) -> list[int]:
    """The ids that end an answer, the configuration's own first; ids beyond the model's rows are left out."""
    own = [] if config.eos_token_id is None else [config.eos_token_id]
    return own + sorted(i for i in stop_ids if i not in own and i < config.vocab_size)


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[int]:
    """Write the tokenizer, if there is one, in the form that plain transformers reads; the ids that stop."""
    source = checkpoint.tokenizer_folder
    if source is None or not has_tokenizer(source):
        return stop_token_ids(checkpoint.config, frozenset())
    from internlm2.tokenizer import Tokenizer
    from internlm2.tokenizer.export import save_tokenizer

    tokenizer = Tokenizer.from_pretrained(source)
    save_tokenizer(tokenizer, folder, for_transformers=True)
    return stop_token_ids(checkpoint.config, tokenizer.stop_ids)
