"""Write a checkpoint in the official layout: sharded safetensors, one tensor in memory at a time, atomically."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from internlm2 import files
from internlm2.checkpoint.config_json import CONFIG_FILE, config_to_json, read_json
from internlm2.checkpoint.source import Checkpoint, TensorInfo, cast, check_complete, dtype_name, parameters
from internlm2.log import progress

MAX_SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "LICENSE",
)
_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


def save_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, safetensors and the tokenizer files to a new `folder`.

    dtype: None keeps each tensor's own. Nothing is left behind when it fails.
    Raises CheckpointError when the checkpoint is incomplete, ExportError when the folder cannot be written.
    """
    check_complete(checkpoint)
    tensors = list(parameters(checkpoint))
    stored = dtype or dict(tensors)["model.tok_embeddings.weight"].dtype
    with files.new_folder(folder, need_bytes=total_bytes(tensors, dtype)) as temporary:
        if (
            checkpoint.tokenizer_folder is not None
        ):  # first: a damaged one is told before gigabytes are written
            copy_tokenizer_files(checkpoint.tokenizer_folder, temporary)
        write_json(temporary / CONFIG_FILE, config_to_json(checkpoint.config, dtype=dtype_name(stored)))
        write_shards(temporary, tensors, checkpoint.read, dtype=dtype, max_shard_bytes=max_shard_bytes)


def total_bytes(tensors: Sequence[tuple[str, TensorInfo]], dtype: torch.dtype | None) -> int:
    """Size of all tensors in `dtype`, or in their own."""
    return sum(_stored(info, dtype).num_bytes for _, info in tensors)


def write_shards(
    folder: Path,
    tensors: Sequence[tuple[str, TensorInfo]],
    read: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write model.safetensors, or numbered shards and their index, into an existing folder."""
    shards: list[list[tuple[str, TensorInfo]]] = [[]]
    size = 0
    for name, info in tensors:
        num_bytes = _stored(info, dtype).num_bytes
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, _stored(info, dtype)))
        size += num_bytes
    weight_map: dict[str, str] = {}
    with progress("Writing weights", total=total_bytes(tensors, dtype) / 1e6) as bar:
        for number, shard in enumerate(shards, start=1):
            alone = len(shards) == 1
            file = "model.safetensors" if alone else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_safetensors(folder / file, shard, read, bar.advance)
            weight_map |= {name: file for name, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes(tensors, dtype)}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _stored(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(info.shape, (info.dtype.is_floating_point and dtype) or info.dtype, info.file)


def _write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, TensorInfo]],
    read: Callable[[str], torch.Tensor],
    report: Callable[[float], None],
) -> None:
    # NOTE: safetensors' own save_file wants every tensor of a shard at once; this keeps only one in memory.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors:
        header[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        offset += info.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned, so that mapped tensors are aligned too
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, info in tensors:
            tensor = read(name)
            if info.dtype.is_floating_point:
                tensor = cast(tensor, info.dtype, name=name)
            tensor = tensor.contiguous()
            assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)} is not {info.shape}"
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
            report(info.num_bytes / 1e6)


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy tokenizer and generation files; pointers to the folder's old Python code (`auto_map`) are dropped."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            content = (source / name).read_bytes()
            if name == "tokenizer_config.json":
                data = read_json(source / name)
                data.pop("auto_map", None)
                content = json.dumps(data, indent=2, ensure_ascii=False).encode()
            (target / name).write_bytes(content)


def write_json(path: Path, data: object) -> None:
    """Readable JSON with a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
