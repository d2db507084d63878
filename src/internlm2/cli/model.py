"""`internlm2 model`: download, info, convert, export."""

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
