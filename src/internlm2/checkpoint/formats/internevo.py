"""InternEvo's own training shards, model_tp{t}_pp{p}.pt with model_config.pt: read, and written back.

Tensor-parallel ranks hold slices of each tensor, pipeline stages hold runs of layers counted from 0. With
`adapt_hf` false, queries and keys keep rotary pairs side by side. Source: InternEvo's
transformers/convert2hf_internlm2.py, whose defaults are taken for absent keys.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from internlm2 import files
from internlm2.checkpoint.formats import wqkv
from internlm2.checkpoint.save import copy_tokenizer_files
from internlm2.checkpoint.source import Checkpoint, TensorInfo, check_complete, expected_shapes
from internlm2.checkpoint.stores import load_torch_file, load_torch_object
from internlm2.errors import CheckpointError, ConfigError, ExportError
from internlm2.model.config import ModelConfig, RopeScaling

MODEL_CONFIG_FILE = "model_config.pt"
_SHARD = re.compile(r"model_tp(\d+)_pp(\d+)\.pt")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
# The dimension along which tensor-parallel ranks are joined; what is not listed is the same on every rank.
_JOINED: dict[str, int] = {
    "attention.wqkv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w3.weight": 0,
    "feed_forward.w2.weight": 1,
    "output.weight": 0,
}
_EMBEDDING = "tok_embeddings.weight"


class InternEvoCheckpoint:
    """Training shards under the official names, joined one tensor at a time."""

    def __init__(
        self, folder: Path, *, max_position_embeddings: int = 32768, rope_scaling: RopeScaling | None = None
    ) -> None:
        """Map every shard and read its index.

        max_position_embeddings, rope_scaling: what the shards do not say. Raises CheckpointError when a rank
        is missing, ranks contradict each other, or model_config.pt describes another architecture.
        """
        self.path = folder
        self._settings = _read_settings(folder / MODEL_CONFIG_FILE)
        self._ranks = [_join_stages(folder, files_of_rank) for files_of_rank in _shard_files(folder)]
        _check_ranks(folder, self._ranks)
        self.config = _parse_settings(
            self._settings,
            self._ranks,
            max_position_embeddings=max_position_embeddings,
            rope_scaling=rope_scaling,
            where=str(folder / MODEL_CONFIG_FILE),
        )
        self.tensors: Mapping[str, TensorInfo] = {
            _official(name): self._info(name, tensor) for name, tensor in self._ranks[0].items()
        }
        has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
        self.tokenizer_folder: Path | None = folder if has_tokenizer else None

    def _info(self, name: str, tensor: torch.Tensor) -> TensorInfo:
        shape = list(tensor.shape)
        dim = self._joined_dim(name)
        if dim is not None:
            shape[dim] *= len(self._ranks)
        return TensorInfo(tuple(shape), tensor.dtype, "model_tp0_pp*.pt")

    def _joined_dim(self, name: str) -> int | None:
        if name == _EMBEDDING:
            return 1 if self._settings.get("embed_split_hidden", False) else 0
        match = _LAYER.fullmatch(name)
        return _JOINED.get(match.group(2) if match else name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, joined from all ranks and in the official layout."""
        own = name if name == "output.weight" else name.removeprefix("model.")
        parts = [rank[own] for rank in self._ranks]
        dim = self._joined_dim(own)
        if dim is None:
            if not all(torch.equal(parts[0], part) for part in parts[1:]):
                raise CheckpointError(
                    f"{self.path}: {own} differs between tensor-parallel ranks, but every rank must hold "
                    "the same. "
                    "The shards belong to different training steps; collect them again."
                )
            return parts[0]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
        if own.endswith("attention.wqkv.weight") and not self._settings.get("adapt_hf", False):
            return half_split_wqkv(tensor, self.config)
        if own == "output.weight" and self._settings.get("norm_head", False):
            # The 1.8B models: training normalises each row of the head, so a finished model holds unit rows.
            return torch.nn.functional.normalize(tensor, dim=-1)
        return tensor


def half_split_wqkv(tensor: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Queries and keys with rotary pairs side by side -> evens first, then odds; values as they are."""
    parts = wqkv.split(tensor, config)
    q = wqkv.half_split_rows(parts.q, config.num_attention_heads)
    k = wqkv.half_split_rows(parts.k, config.num_key_value_heads)
    return wqkv.fuse(wqkv.Projections(q, k, parts.v), config)


def paired_wqkv(tensor: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Undo `half_split_wqkv`."""
    parts = wqkv.split(tensor, config)
    q = wqkv.paired_rows(parts.q, config.num_attention_heads)
    k = wqkv.paired_rows(parts.k, config.num_key_value_heads)
    return wqkv.fuse(wqkv.Projections(q, k, parts.v), config)


def _read_settings(path: Path) -> Mapping[str, object]:
    data = load_torch_object(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, but must hold a dict of settings.")
    return data


def _shard_files(folder: Path) -> list[list[Path]]:
    """[tensor-parallel rank][pipeline stage] -> file."""
    found = {
        (int(match.group(1)), int(match.group(2)))
        for path in folder.iterdir()
        if (match := _SHARD.fullmatch(path.name))
    }
    if not found:
        raise CheckpointError(
            f"{folder} has no model_tp0_pp0.pt. Copy the shards next to {MODEL_CONFIG_FILE}."
        )
    num_ranks, num_stages = (1 + max(ids) for ids in zip(*found, strict=True))
    for rank in range(num_ranks):
        for stage in range(num_stages):
            if (rank, stage) not in found:
                raise CheckpointError(
                    f"{folder}: model_tp{rank}_pp{stage}.pt is missing; the other files belong to "
                    f"{num_ranks} "
                    f"tensor-parallel ranks and {num_stages} pipeline stages. Copy all of them."
                )
    return [[folder / f"model_tp{r}_pp{s}.pt" for s in range(num_stages)] for r in range(num_ranks)]


def _join_stages(folder: Path, paths: list[Path]) -> dict[str, torch.Tensor]:
    """The tensors of one tensor-parallel rank, layers numbered through all pipeline stages."""
    joined: dict[str, torch.Tensor] = {}
    first_layer = 0
    for path in paths:
        num_layers = 0
        for key, tensor in load_torch_file(path).items():
            if key.endswith(".inv_freq"):
                continue
            name = key.removeprefix("model.").replace("tok_embeddings.word_embeddings.", "tok_embeddings.")
            match = _LAYER.fullmatch(name)
            if match is not None:
                num_layers = max(num_layers, int(match.group(1)) + 1)
                name = f"layers.{int(match.group(1)) + first_layer}.{match.group(2)}"
            if name in joined:
                raise CheckpointError(
                    f"{path}: tensor {name} is in two pipeline stages. Copy the shards of one training "
                    "run only."
                )
            joined[name] = tensor
        first_layer += num_layers
    return joined


def _check_ranks(folder: Path, ranks: list[dict[str, torch.Tensor]]) -> None:
    for number, rank in enumerate(ranks[1:], start=1):
        for name in sorted(rank.keys() ^ ranks[0].keys()):
            holder = number if name in rank else 0
            raise CheckpointError(
                f"{folder}: only tensor-parallel rank {holder} holds {name}. A shard is incomplete; copy "
                "it again."
            )
        for name, tensor in rank.items():
            first = ranks[0][name]
            if tensor.shape != first.shape or tensor.dtype != first.dtype:
                raise CheckpointError(
                    f"{folder}: {name} is {list(first.shape)} {first.dtype} on tensor-parallel rank 0, but "
                    f"{list(tensor.shape)} {tensor.dtype} on rank {number}. The shards belong to "
                    "different runs."
                )


def _official(name: str) -> str:
    return name if name == "output.weight" else f"model.{name}"


def _parse_settings(
    settings: Mapping[str, object],
    ranks: list[dict[str, torch.Tensor]],
    *,
    max_position_embeddings: int,
    rope_scaling: RopeScaling | None,
    where: str,
) -> ModelConfig:
    if settings.get("no_bias", True) is not True:
        raise CheckpointError(
            f"{where}: no_bias is {settings['no_bias']!r}, but InternEvo's InternLM2 has no biases. This "
            "is another "
            "architecture, perhaps the first InternLM."
        )
    w1 = ranks[0].get("layers.0.feed_forward.w1.weight")
    if w1 is None:
        raise CheckpointError(
            f"{where}: no shard holds layers.0.feed_forward.w1.weight, so this is not InternLM2. Give the "
            "folder "
            "of an InternLM2 training run."
        )
    heads = _integer(settings, "num_attention_heads", where)
    has_groups = "num_kv_attention_heads" in settings
    try:
        return ModelConfig(
            vocab_size=_integer(settings, "vocab_size", where),
            hidden_size=_integer(settings, "hidden_size", where),
            intermediate_size=w1.shape[0] * len(ranks),  # mlp_ratio was rounded up in training
            num_hidden_layers=_integer(settings, "num_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=(
                _integer(settings, "num_kv_attention_heads", where) if has_groups else heads
            ),
            max_position_embeddings=max_position_embeddings,
            rope_theta=_number(settings, "rope_base", where) if "rope_base" in settings else 10000.0,
            rope_scaling=rope_scaling,
            rms_norm_eps=_number(settings, "layer_norm_epsilon", where),
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _number(settings: Mapping[str, object], key: str, where: str) -> float:
    value = settings.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {value!r}, but must be a number. Is it InternEvo's?")
    return value


def _integer(settings: Mapping[str, object], key: str, where: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {value!r}, but must be a whole number. Is it InternEvo's?")
    return value


@dataclass(frozen=True)
class Partition:
    """How a model is cut for training. adapt_hf: keep rotary halves apart (the 1.8B and 20B configs)."""

    tp: int
    pp: int
    adapt_hf: bool

    def check(self, config: ModelConfig) -> None:
        """Raise ExportError when InternEvo cannot hold the model, or cannot cut it so."""
        if config.head != "language" or config.bias or config.tie_word_embeddings:
            raise ExportError(
                "InternEvo shards hold language models without biases and with an output of their own; "
                "this is "
                f"a {config.head} model, bias {config.bias}, tied embeddings {config.tie_word_embeddings}."
            )
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            raise ExportError(
                "InternEvo has no head_dim of its own: it must be hidden_size / num_attention_heads."
            )
        sizes = {
            "num_key_value_heads": config.num_key_value_heads,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
        }
        for name, size in sizes.items():
            if self.tp < 1 or size % self.tp:
                raise ExportError(f"tp is {self.tp}, but must divide {name}={size}.")
        if not 1 <= self.pp <= config.num_hidden_layers:
            raise ExportError(
                f"pp is {self.pp}, but must be from 1 to num_hidden_layers={config.num_hidden_layers}."
            )


def write_internevo(checkpoint: Checkpoint, folder: Path, *, tp: int, pp: int, adapt_hf: bool) -> None:
    """Write a new folder of training shards for `tp` tensor-parallel ranks and `pp` pipeline stages.

    adapt_hf: False stores rotary pairs side by side, as the 7B training did. One shard is in memory at once.
    Raises ExportError when InternEvo cannot hold the model so, or the folder cannot be written.
    """
    partition = Partition(tp, pp, adapt_hf)
    partition.check(checkpoint.config)
    check_complete(checkpoint)
    need_bytes = sum(checkpoint.tensors[name].num_bytes for name in expected_shapes(checkpoint.config))
    with files.new_folder(folder, need_bytes=need_bytes) as temporary:
        torch.save(_settings(checkpoint, partition), temporary / MODEL_CONFIG_FILE)
        for stage in range(pp):
            names = _stage_names(checkpoint.config, stage, pp)
            for rank in range(tp):
                shard = {f"model.{own}": _slice(checkpoint, n, rank, partition) for n, own in names.items()}
                torch.save(shard, temporary / f"model_tp{rank}_pp{stage}.pt")
        if checkpoint.tokenizer_folder is not None:
            copy_tokenizer_files(checkpoint.tokenizer_folder, temporary)


def _stage_names(config: ModelConfig, stage: int, pp: int) -> dict[str, str]:
    """Official name -> name within one pipeline stage."""
    per_stage, rest = divmod(config.num_hidden_layers, pp)
    first = stage * per_stage + min(stage, rest)
    last = first + per_stage + (stage < rest)
    names: dict[str, str] = {}
    for official in expected_shapes(config):
        own = official if official == "output.weight" else official.removeprefix("model.")
        match = _LAYER.fullmatch(own)
        if match is not None:
            if first <= int(match.group(1)) < last:
                names[official] = f"layers.{int(match.group(1)) - first}.{match.group(2)}"
        elif (stage == 0) if own == _EMBEDDING else (stage == pp - 1):
            names[official] = own
    return names


def _slice(checkpoint: Checkpoint, official: str, rank: int, partition: Partition) -> torch.Tensor:
    tensor = checkpoint.read(official)
    own = official if official == "output.weight" else official.removeprefix("model.")
    match = _LAYER.fullmatch(own)
    inner = match.group(2) if match else own
    if inner == "attention.wqkv.weight" and not partition.adapt_hf:
        tensor = paired_wqkv(tensor, checkpoint.config)
    dim = 1 if inner == _EMBEDDING else _JOINED.get(inner)
    # NOTE: torch.save writes the whole storage behind a view, so every slice must own its memory.
    return tensor.clone() if dim is None else tensor.chunk(partition.tp, dim=dim)[rank].clone()


def _settings(checkpoint: Checkpoint, partition: Partition) -> dict[str, object]:
    config = checkpoint.config
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_attention_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "layer_norm_epsilon": config.rms_norm_eps,
        "rope_base": config.rope_theta,
        "embed_split_hidden": True,
        "no_bias": True,
        "norm_head": False,
        "adapt_hf": partition.adapt_hf,
        "dtype": str(checkpoint.tensors["model.tok_embeddings.weight"].dtype),
    }
