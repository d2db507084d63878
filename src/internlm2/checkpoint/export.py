"""One door to every format that can be written, so that the command line holds no logic."""

from pathlib import Path

from internlm2.checkpoint.formats.internevo import write_internevo
from internlm2.checkpoint.formats.llama import write_llama
from internlm2.checkpoint.gguf.write import write_gguf
from internlm2.checkpoint.source import Checkpoint, check_complete, parse_dtype
from internlm2.errors import ExportError


def export_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    *,
    to: str,
    dtype: str | None = None,
    tp: int = 1,
    pp: int = 1,
    adapt_hf: bool = True,
) -> None:
    """Write `checkpoint` as "llama" (folder), "gguf" (file) or "internevo" (training shards).

    dtype: None keeps the weights (gguf: float16). Raises ExportError for what a format cannot hold.
    """
    check_complete(checkpoint)
    if to == "gguf":
        if target.suffix != ".gguf":
            raise ExportError(
                f"{target} is no .gguf name. Write for example {target.with_suffix('.gguf').name}."
            )
        write_gguf(checkpoint, target, dtype=dtype or "float16")
        return
    if dtype == "q8_0":
        raise ExportError(f"q8_0 is a GGUF type; {to} folders hold float32, bfloat16 or float16.")
    if to == "llama":
        write_llama(checkpoint, target, dtype=None if dtype is None else parse_dtype(dtype))
    elif to == "internevo":
        if dtype is not None:
            raise ExportError("internevo shards keep the dtype of the weights; leave --dtype out.")
        write_internevo(checkpoint, target, tp=tp, pp=pp, adapt_hf=adapt_hf)
    else:
        raise ExportError(f"Cannot write {to!r}. Known: llama, gguf, internevo.")
