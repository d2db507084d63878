"""`internlm2 model`: download, info, convert, export, quantize, cache."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from internlm2.errors import CheckpointError

ModelArgument = Annotated[str, Parameter(help="Folder, GGUF file, Hugging Face id, or `demo`.")]
Dtype = Literal["float32", "bfloat16", "float16"]


def download(
    model: Annotated[str, Parameter(help="Hugging Face id, with an optional @revision, or `demo`.")],
    folder: Annotated[Path | None, Parameter(help="Put the files here instead of the shared cache.")] = None,
) -> None:
    """Fetch a model and print where it lies. Running it again continues where it stopped."""
    from internlm2.checkpoint import resolve

    if model == resolve.DEMO:
        path = resolve.resolve_model(model)
        if folder is not None:
            from internlm2.checkpoint.open import open_checkpoint
            from internlm2.checkpoint.save import save_checkpoint

            save_checkpoint(open_checkpoint(path), folder)
            path = folder
    elif Path(model).exists():
        raise CheckpointError(f"{model} is here already. `download` takes a Hugging Face id or `demo`.")
    else:
        path = resolve.download(model, local_folder=folder)
    print(path)


def info(
    model: Annotated[str, Parameter(help="A model, or the name of a published size: 1.8b, 7b, 20b.")],
    *,
    context: Annotated[
        int | None, Parameter(help="Plan for this prompt plus answer, in tokens [trained length].")
    ] = None,
    dtype: Annotated[str, Parameter(help="Of the weights: float32, bfloat16, float16.")] = "bfloat16",
    kv_dtype: Annotated[
        str | None, Parameter(help="Of keys and values: int8, or as the weights when not given.")
    ] = None,
    num_sequences: Annotated[int, Parameter(help="So many sequences of that length at once.")] = 1,
    device: Annotated[str, Parameter(help="cpu, cuda, cuda:N; auto: a GPU when there is one.")] = "auto",
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
) -> None:
    """Print sizes, and plan a context: memory, whether it fits here, the longest that fits, FLOPs, bytes read."""
    from internlm2.checkpoint.describe import describe

    data = describe(
        model, context=context, dtype=dtype, kv_dtype=kv_dtype, num_sequences=num_sequences, device=device
    )
    if json_output:
        print(json.dumps(data.as_json(), indent=2))
    else:
        print(data.as_text())


def convert(
    source: Annotated[
        str, Parameter(help="Llama-layout folder, GGUF file, .bin folder, InternEvo shards, ...")
    ],
    target: Annotated[Path, Parameter(help="New folder.")],
    *,
    dtype: Annotated[Dtype | None, Parameter(help="Cast the weights; default: as they are.")] = None,
) -> None:
    """Write any readable model as an official InternLM2 folder with safetensors."""
    from internlm2.checkpoint.open import open_checkpoint
    from internlm2.checkpoint.resolve import resolve_model
    from internlm2.checkpoint.save import save_checkpoint
    from internlm2.checkpoint.source import parse_dtype

    checkpoint = open_checkpoint(resolve_model(source))
    save_checkpoint(checkpoint, target, dtype=None if dtype is None else parse_dtype(dtype))
    print(target)


def export(
    model: ModelArgument,
    target: Annotated[Path, Parameter(help="New folder, or new .gguf file.")],
    *,
    to: Annotated[Literal["llama", "gguf", "internevo"], Parameter(help="The format to write.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "q8_0"] | None,
        Parameter(help="llama: default as it is. gguf: float16 (default), bfloat16 or q8_0."),
    ] = None,
    tp: Annotated[int, Parameter(help="internevo: tensor-parallel ranks.")] = 1,
    pp: Annotated[int, Parameter(help="internevo: pipeline stages.")] = 1,
    adapt_hf: Annotated[bool, Parameter(help="internevo: rotary layout of the official folders.")] = True,
) -> None:
    """Write a model for other tools: a Llama-layout folder for anything that reads Llama, or GGUF for llama.cpp."""
    from internlm2.checkpoint.export import export_checkpoint
    from internlm2.checkpoint.open import open_checkpoint
    from internlm2.checkpoint.resolve import resolve_model

    checkpoint = open_checkpoint(resolve_model(model))
    export_checkpoint(checkpoint, target, to=to, dtype=dtype, tp=tp, pp=pp, adapt_hf=adapt_hf)
    print(target)


def quantize(
    model: ModelArgument,
    target: Annotated[Path, Parameter(help="New folder.")],
    *,
    to: Annotated[Literal["int8", "int4"], Parameter(help="Bits of each weight.")],
    method: Annotated[
        Literal["awq+gptq", "gptq", "awq", "rtn"],
        Parameter(
            help="rtn: to the nearest; quick. With a text, awq scales columns by what they meet, gptq corrects errors."
        ),
    ] = "gptq",
    group: Annotated[int, Parameter(help="Columns that share a scale: 32, 64 or 128.")] = 32,
    symmetric: Annotated[
        bool, Parameter(help="int4 without zeros: more programs read it, more is lost.", negative=())
    ] = False,
    calibration: Annotated[
        Path | None,
        Parameter(help="Text for all but rtn; default: a small one of English, Chinese and code."),
    ] = None,
    calibration_tokens: Annotated[int, Parameter(help="So much of it, at most.")] = 16_384,
    layout: Annotated[
        Literal["llama", "internlm2"], Parameter(help="llama: what vLLM and transformers read.")
    ] = "llama",
    dtype: Annotated[
        Dtype | None,
        Parameter(help="Of embedding, norms and head; default: as they are, float32 as bfloat16."),
    ] = None,
    report: Annotated[
        bool, Parameter(help="Measure and print what was lost, and keep it as loss.json.", negative=())
    ] = False,
    text: Annotated[Path | None, Parameter(help="Text for the report; default: a small one of ours.")] = None,
    report_tokens: Annotated[int, Parameter(help="So much of it, at most.")] = 8_192,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
) -> None:
    """Write a model with its linears in int8 or int4, as compressed-tensors; one layer at a time is in memory."""
    from internlm2.checkpoint.quantize import QuantizeOptions
    from internlm2.checkpoint.quantize_command import quantize_model_folder
    from internlm2.checkpoint.source import parse_dtype

    options = QuantizeOptions(
        kind=to,
        method=method,
        group=group,
        symmetric=symmetric,
        layout=layout,
        dtype=None if dtype is None else parse_dtype(dtype),
    )
    loss = quantize_model_folder(
        model,
        target,
        options,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        report=report,
        text=text,
        report_tokens=report_tokens,
    )
    if json_output:
        print(json.dumps({"folder": str(target), "loss": None if loss is None else loss.as_json()}, indent=2))
        return
    if loss is not None:
        print(loss.as_text() + "\n")
    print(target)


def cache(
    *,
    clear: Annotated[bool, Parameter(help="Remove them all.", negative=())] = False,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
) -> None:
    """Show or remove the packed weights that are kept so that models start quickly."""
    from internlm2.checkpoint.load_packed import default_cache
    from internlm2.checkpoint.packed_cache import MAX_CACHE_BYTES

    packed = default_cache()
    freed = packed.clear() if clear else 0
    entries = packed.entries()
    total = sum(entry.num_bytes for entry in entries)
    if json_output:
        data = {"folder": str(packed.root), "num_files": len(entries), "bytes": total, "freed_bytes": freed}
        print(json.dumps(data | {"max_bytes": MAX_CACHE_BYTES}, indent=2))
        return
    if clear:
        print(f"{freed / 1e6:,.1f} MB freed.")
    print(
        f"{packed.root}: {len(entries)} files, {total / 1e6:,.1f} MB of at most {MAX_CACHE_BYTES / 1e6:,.0f} MB."
    )
