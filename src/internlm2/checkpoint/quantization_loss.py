"""Compare a checkpoint with a quantised form of it, as the kernels compute it, on a text; two layers in memory."""

from pathlib import Path

import torch
from torch import nn

from internlm2.checkpoint.formats.compressed_tensors import QuantizedCheckpoint
from internlm2.checkpoint.load_packed import Packer
from internlm2.checkpoint.quantize import embed, plain_layer
from internlm2.checkpoint.source import Checkpoint, check_complete
from internlm2.errors import RequestError
from internlm2.log import progress
from internlm2.model.layers import DecoderLayer, RMSNorm
from internlm2.quant import report
from internlm2.quant.layerwise import Stream, sequences
from internlm2.tokenizer import Tokenizer

TEXTS = Path(report.__file__).parent / "text"
CALIBRATION_TEXT = TEXTS / "calibration.txt"
EVALUATION_TEXT = TEXTS / "evaluation.txt"


def read_text(checkpoint: Checkpoint, path: Path, *, max_tokens: int | None = None) -> torch.Tensor:
    """A text file as sequences of ids, (S, T), by the checkpoint's own tokenizer. Raises RequestError."""
    if checkpoint.tokenizer_folder is None:
        raise RequestError(
            f"{checkpoint.path} has no tokenizer to read a text with. Put its files beside the weights."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"Cannot read {path} as UTF-8 text: {error}.") from error
    tokenizer = Tokenizer.from_pretrained(checkpoint.tokenizer_folder)
    ids = tokenizer.encode(text)[:max_tokens]
    return sequences([i for i in ids if i < checkpoint.config.vocab_size])


@torch.no_grad()
def measure_loss(
    checkpoint: Checkpoint, other: Checkpoint, text: torch.Tensor, *, quantization: str | None = None
) -> report.LossReport:
    """What `other` loses against `checkpoint` on `text`, (S, T) ids.

    quantization: how `other` is to be packed; None: as its files are quantised. Both compute in float32 but for what
    packed weights do to activations. Raises CheckpointError, RequestError.
    """
    config = checkpoint.config
    for one in (checkpoint, other):
        check_complete(one)
    if (config.head, config.hidden_size, config.vocab_size, config.num_hidden_layers) != (
        "language", other.config.hidden_size, other.config.vocab_size, other.config.num_hidden_layers,
    ):  # fmt: skip
        raise RequestError(
            f"{other.path} is not a quantised form of {checkpoint.path}, or not a language model, so nothing can be "
            "compared."
        )
    packer = Packer(other, dtype="float32", quantization=quantization)
    streams = Stream(config, embed(checkpoint, text)), Stream(config, embed(other, text))
    errors: dict[str, float] = {}
    with progress("Comparing", total=config.num_hidden_layers + 1, unit="layers") as bar:
        for index in range(config.num_hidden_layers):
            with torch.device("meta"):
                layer = DecoderLayer(config, index)
            packer.fill_layer(layer, index)
            found = report.compare_layers(plain_layer(checkpoint, index), layer, *streams)
            errors |= {f"{index}.{name}": error for name, error in found.items()}
            bar.advance(1)
        norms = _final_norm(checkpoint), _final_norm(other)
        heads = _plain_head(checkpoint), packer.head()
        compared = report.OutputComparison()
        for number, ids in enumerate(text):
            hidden = [norm(stream.hidden[number]) for norm, stream in zip(norms, streams, strict=True)]
            compared.add(ids, (hidden[0], hidden[1]), heads)
        bar.advance(1)
    return compared.report(linear_errors=errors, weight_bytes=(_file_bytes(checkpoint), _file_bytes(other)))


def _final_norm(checkpoint: Checkpoint) -> RMSNorm:
    norm = RMSNorm(checkpoint.config.hidden_size, checkpoint.config.rms_norm_eps)
    norm.weight = nn.Parameter(checkpoint.read("model.norm.weight").float(), requires_grad=False)
    return norm


def _plain_head(checkpoint: Checkpoint) -> report.Logits:
    is_tied = checkpoint.config.tie_word_embeddings
    weight = checkpoint.read("model.tok_embeddings.weight" if is_tied else "output.weight").float()
    return lambda hidden: nn.functional.linear(hidden, weight)


def _file_bytes(checkpoint: Checkpoint) -> int:
    """Of the weight files; of a model in memory, of its tensors."""
    if checkpoint.path.is_file():
        return checkpoint.path.stat().st_size
    names = {info.file for info in checkpoint.tensors.values()}
    paths = [checkpoint.path / name for name in names]
    if all(path.is_file() for path in paths):
        return sum(path.stat().st_size for path in paths)
    assert not isinstance(checkpoint, QuantizedCheckpoint)
    return sum(info.num_bytes for info in checkpoint.tensors.values())
