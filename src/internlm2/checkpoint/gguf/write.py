"""Write a GGUF file as llama.cpp's converter does for InternLM2, so that llama.cpp runs it.

Matrices in the asked type, vectors in float32; queries and keys with rotary pairs side by side. One official
tensor is in memory at a time. Source: llama.cpp conversion/internlm.py and conversion/base.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quant

from internlm2 import files
from internlm2.checkpoint.formats import wqkv
from internlm2.checkpoint.formats.llama import has_tokenizer
from internlm2.checkpoint.formats.names import part_shapes
from internlm2.checkpoint.gguf.names import DYNAMIC_FACTOR_KEY, GGUF_NAMES, choose_architecture
from internlm2.checkpoint.gguf.vocab_write import add_tokenizer
from internlm2.checkpoint.source import Checkpoint, check_complete, expected_shapes
from internlm2.errors import ExportError
from internlm2.log import logger, progress
from internlm2.model.config import ModelConfig

_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_QUANTS = {"float32": Quant.F32, "float16": Quant.F16, "bfloat16": Quant.BF16, "q8_0": Quant.Q8_0}
_TORCH_DTYPES = {Quant.F32: torch.float32, Quant.F16: torch.float16, Quant.BF16: torch.bfloat16}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file to be."""

    name: str
    shape: tuple[int, ...]
    quant: Quant

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.quant]
        return int(np.prod(self.shape)) // block * size


def write_gguf(checkpoint: Checkpoint, target: Path, *, dtype: str) -> None:
    """Write the new file `target`.

    dtype: of the matrices: "float32", "float16", "bfloat16" or "q8_0". Rows that q8_0 cannot cut into blocks
    of 32 are stored as float16, as llama.cpp does. Raises CheckpointError when the checkpoint is incomplete;
    ExportError when GGUF or `dtype` cannot hold it, or the file cannot be written.
    """
    if dtype not in _QUANTS:
        raise ExportError(f"A GGUF of dtype {dtype!r} cannot be written. Choose {', '.join(_QUANTS)}.")
    config = checkpoint.config
    if config.head != "language":
        raise ExportError(
            f"GGUF holds language models; this one has a {config.head} head. Keep it in safetensors."
        )
    check_complete(checkpoint)
    plan = plan_tensors(config, _QUANTS[dtype])
    total_bytes = sum(tensor.num_bytes for tensors in plan.values() for tensor in tensors)
    with files.new_file(target, need_bytes=total_bytes) as temporary:
        writer = gguf.GGUFWriter(None, choose_architecture(config))
        try:
            _add_metadata(writer, config, name=target.stem, file_type=_FILE_TYPES[dtype])
            if checkpoint.tokenizer_folder is not None and has_tokenizer(checkpoint.tokenizer_folder):
                add_tokenizer(writer, checkpoint.tokenizer_folder, config)
            else:
                _add_ids(writer, config)
            for tensors in plan.values():
                for tensor in tensors:
                    writer.add_tensor_info(
                        tensor.name,
                        tensor.shape,
                        np.dtype(np.float32),
                        tensor.num_bytes,
                        raw_dtype=tensor.quant,
                    )
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_weights(writer, checkpoint, plan, total_bytes)
        finally:
            writer.close()


def _add_ids(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """No tokenizer: llama.cpp then takes ids as they are."""
    writer.add_tokenizer_model("none")
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_id is not None:
        writer.add_eos_token_id(config.eos_token_id)
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)


def plan_tensors(config: ModelConfig, quant: Quant) -> dict[str, list[PlannedTensor]]:
    """Official name -> what is written for it, in order."""
    plan: dict[str, list[PlannedTensor]] = {}
    for official, shape in expected_shapes(config).items():
        shapes = part_shapes(config, official, shape)
        plan[official] = [
            PlannedTensor(name, part, _quant_of(part, quant))
            for name, part in zip(GGUF_NAMES.of(official), shapes, strict=True)
        ]
    return plan


def _quant_of(shape: tuple[int, ...], quant: Quant) -> Quant:
    if len(shape) == 1:
        return Quant.F32
    if quant == Quant.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[Quant.Q8_0][0]:
        return Quant.F16
    return quant


def _write_weights(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, plan: dict[str, list[PlannedTensor]], total_bytes: int
) -> None:
    num_rounded = 0
    with progress("Writing weights", total=total_bytes / 1e6) as bar:
        for official, planned in plan.items():
            for tensor, part in zip(planned, _parts(checkpoint, official), strict=True):
                assert tuple(part.shape) == tensor.shape, (
                    f"{tensor.name}: {tuple(part.shape)} is not {tensor.shape}"
                )
                data, is_exact = encode(part, tensor)
                num_rounded += not is_exact
                writer.write_tensor_data(data)
                bar.advance(tensor.num_bytes / 1e6)
    if num_rounded:
        count = sum(map(len, plan.values()))
        logger.info("%d of %d tensors do not fit the new type exactly and were rounded.", num_rounded, count)


def _parts(checkpoint: Checkpoint, official: str) -> Iterator[torch.Tensor]:
    tensor = checkpoint.read(official)
    if ".wqkv." not in official:
        yield tensor
        return
    config = checkpoint.config
    parts = wqkv.split(tensor, config)
    yield wqkv.paired_rows(parts.q, config.num_attention_heads)
    yield wqkv.paired_rows(parts.k, config.num_key_value_heads)
    yield parts.v


def encode(tensor: torch.Tensor, planned: PlannedTensor) -> tuple[np.ndarray, bool]:
    """The bytes to write, and whether they hold every value exactly.

    Raises ExportError when values are beyond float16, which would become infinite without a word.
    """
    if planned.quant == Quant.Q8_0:
        return gguf.quants.quantize(tensor.float().numpy(), Quant.Q8_0), False
    stored = tensor.to(_TORCH_DTYPES[planned.quant]).contiguous()
    if (
        planned.quant == Quant.F16
        and bool(torch.isfinite(tensor).all())
        and not bool(torch.isfinite(stored).all())
    ):
        raise ExportError(
            f"Tensor {planned.name} holds values up to {tensor.abs().max():.3g}, beyond float16's 65504. "
            "Choose bfloat16."
        )
    is_exact = torch.equal(stored.to(tensor.dtype), tensor)
    return (stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored).numpy(), is_exact


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig, *, name: str, file_type: int) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling is not None:
        writer.add_float32(DYNAMIC_FACTOR_KEY, scaling.factor)
        logger.info(
            "llama.cpp has no dynamic scaling: this file is exact up to %d tokens.",
            config.max_position_embeddings,
        )
