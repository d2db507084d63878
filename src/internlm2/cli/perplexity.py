"""`internlm2 eval perplexity`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from internlm2.cli import options
from internlm2.cli.options import RunFlags

if TYPE_CHECKING:
    from internlm2.eval.tasks.perplexity import Likelihood, Perplexity


def perplexity(
    model: Annotated[str, Parameter(help="Folder, GGUF file, Hugging Face id, or `demo`.")],
    *files: Annotated[Path, Parameter(help="UTF-8 texts; of .jsonl files the field `text` of each line.")],
    window: Annotated[int, Parameter(help="Tokens of context.")] = 2048,
    stride: Annotated[
        int | None, Parameter(help="New tokens of each window; default: all, that is chunks.")
    ] = None,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
    flags: RunFlags | None = None,
) -> None:
    """Print the perplexity of texts: by token, by word between blanks, by byte, and bits per byte."""
    from internlm2.errors import check
    from internlm2.eval.backends.scorer import EngineScorer
    from internlm2.eval.task import EvalError
    from internlm2.eval.tasks.perplexity import Window, measure

    if not files:
        raise EvalError("No text is given. Name one or more files.")
    check(window >= 2, "window", window, "at least 2")
    check(stride is None or stride >= 1, "stride", stride, "at least 1, or left out")
    texts = list(_texts(files))  # before a model is loaded
    config = options.resolve(flags)
    llm = options.load_llm(model, config)
    scorer = EngineScorer(llm, adapter=options.adapter_name(config))
    found = measure(scorer, texts, Window(window, stride))
    print(_as_json(found) if json_output else _as_text(found))


def _texts(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    from internlm2.eval.data.folder import DataFolder

    for path in files:
        folder = DataFolder(path.parent, is_own=True)
        if path.suffix == ".jsonl":
            for n, row in enumerate(folder.rows(path.name, ("text",)), 1):
                yield f"{path}:{n}", str(row["text"])
        else:
            yield str(path), folder.text(path.name)


def _numbers(one: "Likelihood") -> dict[str, float]:
    names = ("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
    return {name: getattr(one, name) for name in names}


def _as_json(found: "Perplexity") -> str:
    return json.dumps(
        {
            "window": asdict(found.window),
            "total": asdict(found.total) | _numbers(found.total),
            "texts": {name: asdict(one) | _numbers(one) for name, one in found.texts.items()},
            "by_position": {str(at): loss for at, loss in found.by_position.items()},
        },
        indent=2,
        ensure_ascii=False,
    )


def _as_text(found: "Perplexity") -> str:
    window = found.window
    how = "chunks" if window.stride is None else f"a stride of {window.stride}"
    lines = [f"Windows of {window.size} tokens with {how}. Perplexity:"]
    rows = [*found.texts.items()] if len(found.texts) <= 20 else []
    for name, one in [*rows, ("all texts", found.total)]:
        numbers = ", ".join(
            f"{value:.4f} {label}" for label, value in zip(_LABELS, _numbers(one).values(), strict=True)
        )
        lines.append(f"{name}: {numbers} ({one.num_tokens} tokens, {one.num_bytes} bytes)")
    lines.append("Mean loss by the length of the context, in nats:")
    lines += [f"  {at:>7} tokens and more  {loss:.4f}" for at, loss in found.by_position.items()]
    return "\n".join(lines)


_LABELS = ("by token", "by word", "by byte", "bits per byte")
