"""Read a GGUF file of architecture `llama` or `internlm2`: its network, its weights, its tokenizer.

Float tensors keep their dtype; quantised ones become float32 by gguf's own dequantisation. llama.cpp turns
neighbouring rows in its rotary embedding, so queries and keys are put back into halves as they are read.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

from internlm2.checkpoint.formats import wqkv
from internlm2.checkpoint.formats.names import map_official
from internlm2.checkpoint.gguf.meta import Metadata, parse_metadata
from internlm2.checkpoint.gguf.names import FLOATS, GGUF_NAMES, QUANTISED
from internlm2.checkpoint.gguf.vocab import write_tokenizer
from internlm2.checkpoint.source import TensorInfo
from internlm2.errors import CheckpointError
from internlm2.model.config import ModelConfig

_DTYPES = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}


class GGUFCheckpoint:
    """A GGUF file under the official names.

    tokenizer_folder: files made from the metadata; they vanish with this object.
    """

    def __init__(self, file: Path) -> None:
        """Map the file and read its header. Raises CheckpointError or ConfigError for what cannot be used."""
        self.path = file
        reader = open_gguf(file)
        self.metadata = Metadata(reader, where=str(file))
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config: ModelConfig = parse_metadata(self.metadata, frozenset(self._tensors))
        found = {name: _info(file, tensor) for name, tensor in self._tensors.items()}
        self.tensors: Mapping[str, TensorInfo] = map_official(file, self.config, found, GGUF_NAMES)
        folder = Path(tempfile.mkdtemp(prefix="internlm2-gguf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        has_tokenizer = write_tokenizer(self.metadata, folder)
        self.tokenizer_folder: Path | None = folder if has_tokenizer else None

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the official layout."""
        names = GGUF_NAMES.of(name)
        if len(names) == 1:
            return self._read(names[0])
        q, k, v = map(self._read, names)
        q = wqkv.half_split_rows(q, self.config.num_attention_heads)
        k = wqkv.half_split_rows(k, self.config.num_key_value_heads)
        return wqkv.fuse(wqkv.Projections(q, k, v), self.config)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            bits = torch.from_numpy(np.array(tensor.data).view(np.int16))
            return bits.view(torch.bfloat16).reshape(_shape(tensor))
        if tensor.tensor_type in FLOATS:
            return torch.from_numpy(np.array(tensor.data))
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def open_gguf(file: Path) -> gguf.GGUFReader:
    """Map a GGUF file. Raises CheckpointError when it is damaged, cut off, or one part of several."""
    try:
        reader = gguf.GGUFReader(file)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist. Check the path.") from error
    except (ValueError, IndexError, KeyError, OSError, OverflowError, TypeError, MemoryError) as error:
        # gguf raises whatever numpy raises when a file ends too early or its numbers make no sense.
        raise CheckpointError(
            f"{file} is no GGUF file, or is truncated or damaged ({type(error).__name__}: {error!s:.120}). "
            "Download it again."
        ) from error
    if end > file.stat().st_size:
        raise CheckpointError(f"{file} is truncated: {end} bytes are promised. Download it again.")
    if reader.byte_order == "S":
        raise CheckpointError(
            f"{file} was written for machines of the other byte order. Download a usual one."
        )
    return reader


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts the fastest dimension first


def _info(file: Path, tensor: gguf.ReaderTensor) -> TensorInfo:
    kind = tensor.tensor_type
    if kind not in FLOATS and kind not in QUANTISED:
        known = ", ".join(item.name for item in (*FLOATS, *QUANTISED))
        raise CheckpointError(
            f"{file}: tensor {tensor.name} is stored as {kind.name}; readable are {known}. "
            "Use a GGUF in one of these."
        )
    return TensorInfo(_shape(tensor), _DTYPES.get(kind, torch.float32), file.name)
