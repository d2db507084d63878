"""`internlm2 eval contamination`: whether a model has seen a benchmark."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from internlm2.cli import options
from internlm2.cli.options import RunFlags


def contamination(
    model: Annotated[str, Parameter(help="Folder, GGUF file, Hugging Face id, or `demo`.")],
    *,
    test: Annotated[Path, Parameter(help="The rows of the benchmark, such as data/gsm8k/test.jsonl.")],
    train: Annotated[Path, Parameter(help="Its training rows, such as data/gsm8k/train.jsonl.")],
    reference: Annotated[
        Path | None,
        Parameter(
            help="Fresh rows of the same kind, which no model has seen; the report's were written by GPT-4."
        ),
    ] = None,
    limit: Annotated[
        int | None, Parameter(help="At most so many rows of each file, drawn with --seed.")
    ] = None,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
    flags: RunFlags | None = None,
) -> None:
    """Compare the mean loss on test, training and fresh rows: section 5.4 of the InternLM2 report.

    Files hold JSON lines with question and answer, as GSM8K has them, or with text.
    """
    from internlm2.checkpoint.resolve import resolve_model
    from internlm2.eval.contamination import as_text, check_contamination, read_texts

    config = options.resolve(flags)
    sets = {
        name: None if path is None else read_texts(path, limit=limit, seed=config.seed or 0)
        for name, path in (("test", test), ("train", train), ("reference", reference))
    }  # before a model is loaded
    llm = options.load_llm(str(resolve_model(model)), config)
    assert sets["test"] is not None
    assert sets["train"] is not None
    found = check_contamination(
        llm,
        name=model,
        test=sets["test"],
        train=sets["train"],
        reference=sets["reference"],
        adapter=options.adapter_name(config),
    )
    if not json_output:
        print(as_text(found))
        return
    differences = {
        "test_minus_reference": None if found.leak is None else asdict(found.leak),
        "test_minus_train": asdict(found.overfit),
    }
    print(json.dumps(asdict(found) | differences, indent=2))
