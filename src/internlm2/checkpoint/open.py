"""Any path -> an opened checkpoint: the format is told from what lies there, never from a guess by name."""

from pathlib import Path

from internlm2.checkpoint.config_json import CONFIG_FILE, is_llama, read_json
from internlm2.checkpoint.formats.compressed_tensors import QuantizedCheckpoint
from internlm2.checkpoint.formats.internevo import InternEvoCheckpoint
from internlm2.checkpoint.formats.llama import LlamaCheckpoint
from internlm2.checkpoint.formats.official import OfficialCheckpoint
from internlm2.checkpoint.formats.quantization_config import is_quantized
from internlm2.checkpoint.source import Checkpoint
from internlm2.errors import CheckpointError


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an official or Llama-layout folder, plain or quantised, a GGUF file or folder, or InternEvo shards.

    Reads headers only. Raises CheckpointError when nothing there is a model.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{path} is a file, but not a GGUF. Give the folder that holds config.json and the weights."
            )
        return _open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist. Check the path, or give a Hugging Face id.")
    if (path / CONFIG_FILE).exists():
        data = read_json(path / CONFIG_FILE)
        if is_quantized(data):
            return QuantizedCheckpoint(path)
        if is_llama(data):
            return LlamaCheckpoint(path)
        return OfficialCheckpoint(path)
    if (path / "model_config.pt").exists():
        return InternEvoCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(
            f"{path} has {len(files)} GGUF files: {', '.join(f.name for f in files[:6])}. Give the path of one."
        )
    if files:
        return _open_gguf(files[0])
    raise CheckpointError(
        f"{path} has no {CONFIG_FILE}, so it is not a model folder. Give the folder that holds config.json and "
        "the weights, a GGUF file, or InternEvo shards with model_config.pt."
    )


def _open_gguf(path: Path) -> Checkpoint:
    # NOTE: gguf imports sentencepiece and yaml, an eighth of the time that a start takes; only GGUF files need it.
    from internlm2.checkpoint.gguf.read import GGUFCheckpoint

    return GGUFCheckpoint(path)
