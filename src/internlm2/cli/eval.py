"""`internlm2 eval`: prompt, data, run, show, table."""

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from internlm2.cli import options
from internlm2.cli.options import RunConfig, RunFlags

if TYPE_CHECKING:
    from internlm2.eval.model import LanguageModel
    from internlm2.tokenizer import Tokenizer

DataArgument = Annotated[Path, Parameter(help="Folder in the layout of OpenCompass' data/.")]
DEFAULT_DATA = Path("data")
INCOMPLETE = 1


def prompt(
    item: Annotated[
        str, Parameter(help="TASK:INDEX or TASK.SUBSET:INDEX, such as gsm8k:0 or mmlu.anatomy:3.")
    ],
    *,
    profile: Annotated[str, Parameter(help="card-2024-01, card-2024-02 or fixed.")] = "card-2024-01",
    data: DataArgument = DEFAULT_DATA,
    chat: Annotated[bool, Parameter(help="As a chat model is asked, not a base model.", negative=())] = False,
    label: Annotated[
        str | None, Parameter(help="Put this answer behind it, where answers are compared.")
    ] = None,
) -> None:
    """Print the exact prompt of one item, and nothing else: no line break is added at its end."""
    from internlm2.eval.data.folder import DataFolder
    from internlm2.eval.profile import find_profile
    from internlm2.eval.tasks import find_item

    text = find_item(item, find_profile(profile), DataFolder(data), is_chat=chat).text(label)
    if isinstance(sys.stdout, io.TextIOWrapper):  # bytes, because some prompts hold carriage returns
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
    else:
        sys.stdout.write(text)


def data(
    *,
    data: DataArgument = DEFAULT_DATA,
    source: Annotated[
        Path | None,
        Parameter(
            "--from", help="Import from here first: an OpenCompass data/ folder, its code, or parquet files."
        ),
    ] = None,
    copy: Annotated[bool, Parameter(help="Copy files instead of linking to them.", negative=())] = False,
    show_all: Annotated[
        bool, Parameter("--all", help="List every file with its sha256.", negative=())
    ] = False,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
) -> int:
    """Say which benchmark files are needed, where they go, their licence and sha256, and what is missing.

    Exit code 1 while a file of the model card's benchmarks is missing.
    """
    from internlm2.eval.data.importing import import_folder
    from internlm2.eval.data.published import OPTIONAL
    from internlm2.eval.data.status import as_text, examine

    if source is not None:
        done = import_folder(source, data, copy=copy)
        print(f"{len(done.added)} files imported, {len(done.skipped)} were there already.", file=sys.stderr)
    found = examine(data)
    if json_output:
        print(json.dumps({"folder": str(data), "benchmarks": [asdict(one) for one in found]}, indent=2))
    else:
        print(as_text(data, found, show_all=show_all))
    return INCOMPLETE if any(one.missing for one in found if one.name not in OPTIONAL) else 0


def run(
    model: Annotated[
        str,
        Parameter(help="Folder, GGUF file, Hugging Face id, or `demo`; with --endpoint its name there."),
    ],
    *,
    output: Annotated[Path, Parameter(help="Folder of the run. One that was begun is gone on with.")],
    tasks: Annotated[
        str,
        Parameter(
            help="Benchmarks, or subsets such as mmlu.anatomy, with commas; default: the card's seven."
        ),
    ] = "",
    profile: Annotated[str, Parameter(help="card-2024-01, card-2024-02 or fixed.")] = "card-2024-02",
    data: DataArgument = DEFAULT_DATA,
    chat: Annotated[bool, Parameter(help="As a chat model is asked, not a base model.", negative=())] = False,
    limit: Annotated[
        str | None,
        Parameter(
            help="At most so many questions of each subset, drawn with --seed; "
            "20,gsm8k=100 gives one benchmark another limit."
        ),
    ] = None,
    early_stop: Annotated[
        bool,
        Parameter(help="End answers that go on after their end: quicker, seldom another score.", negative=()),
    ] = False,
    endpoint: Annotated[
        str | None, Parameter(help="An OpenAI endpoint, such as http://localhost:8000/v1.")
    ] = None,
    api_key_env: Annotated[
        str | None, Parameter(help="Environment variable that holds the key of the endpoint.")
    ] = None,
    concurrency: Annotated[int, Parameter(help="Questions to the endpoint at the same time.")] = 8,
    no_self_check: Annotated[
        bool, Parameter(help="Leave out the look at tokenizer, template and a first answer.", negative=())
    ] = False,
    workers: Annotated[
        int, Parameter(help="So many models at once, on the machines of a Ray cluster or on this one.")
    ] = 1,
    shard: Annotated[
        str | None, Parameter(help="Only share I of N, as 2/8; `internlm2 eval merge` makes one run of all.")
    ] = None,
    flags: RunFlags | None = None,
) -> int:
    """Evaluate a model, keep every sample in the output folder, and print the table.

    Exit code 1 when questions are left without a verdict; the same command asks them again.
    """
    from internlm2.cli.shards import finish_shard, on_workers
    from internlm2.eval.data.folder import DataFolder
    from internlm2.eval.profile import find_profile
    from internlm2.eval.questions import RunSettings, choose_questions, read_limits
    from internlm2.eval.run_folder import check_folder
    from internlm2.eval.runner import evaluate, identity_of
    from internlm2.eval.shards import Shard, evaluate_shard
    from internlm2.eval.table import FinishedRun
    from internlm2.eval.table import table as as_table
    from internlm2.eval.tasks import CARD_TASKS

    config = options.resolve(flags)
    names = tuple(name.strip() for name in tasks.split(",") if name.strip()) or CARD_TASKS
    count, task_limits = read_limits(limit or "")
    settings = RunSettings(names, profile, chat, count, config.seed or 0, early_stop, task_limits)
    parts = choose_questions(DataFolder(data), find_profile(profile), settings)  # before a model is loaded
    share = None if shard is None else Shard.parse(shard)
    check_folder(output if share is None else share.folder(output), identity_of({}, parts, settings))
    has_labels = any(item.labels for part in parts for item in part.items)
    check = None if no_self_check else partial(_self_check, is_chat=chat, has_labels=has_labels)
    with ExitStack() as stack:
        if endpoint is not None:
            _refuse_workers(workers, "an endpoint has its own; see --concurrency")
            answers = _endpoint(endpoint, model, config, key_name=api_key_env, concurrency=concurrency)
            if check is not None:
                check(answers, None)
        else:
            _refuse_key(api_key_env)
            answers = stack.enter_context(
                on_workers(partial(_checked, model, config, check), config, workers)
            )
        if share is not None:
            return finish_shard(evaluate_shard(answers, parts, output, settings, shard=share), output, share)
        results = evaluate(answers, parts, output, settings)
    print(as_table([FinishedRun.load(output)]))
    return INCOMPLETE if results.num_errors else 0


def show(
    run: Annotated[Path, Parameter(help="Folder of a run; it need not be finished.")],
    *,
    wrong: Annotated[bool, Parameter(help="Only answers that are not right.", negative=())] = False,
    errors: Annotated[bool, Parameter(help="Only questions without a verdict.", negative=())] = False,
    task: Annotated[str | None, Parameter(help="Only this task, or TASK.SUBSET.")] = None,
    limit: Annotated[int | None, Parameter(help="At most so many.")] = None,
    whole: Annotated[bool, Parameter(help="All of each prompt, not only its end.", negative=())] = False,
) -> None:
    """Print samples of a run: prompt, answer, what was read as the answer, and the verdict."""
    from internlm2.errors import check
    from internlm2.eval.run_folder import chosen_samples, read_samples
    from internlm2.eval.table import sample_text

    check(limit is None or limit >= 1, "limit", limit, "at least 1, or left out for all")
    found = chosen_samples(read_samples(run), task=task, is_wrong=wrong, is_error=errors)
    for sample in found[:limit]:
        print(sample_text(sample, is_whole=whole) + "\n")
    if not found:
        print("There is no such sample.", file=sys.stderr)


def table(
    *runs: Annotated[Path, Parameter(help="Folders of finished runs.")],
    markdown: Annotated[bool, Parameter(help="As a Markdown table.", negative=())] = False,
    latex: Annotated[bool, Parameter(help="As a LaTeX table with booktabs.", negative=())] = False,
) -> None:
    """Print the model card's table for one or more runs, with the published numbers; two runs are also compared."""
    from internlm2.eval.table import FinishedRun
    from internlm2.eval.table import table as as_table
    from internlm2.eval.task import EvalError

    if not runs:
        raise EvalError("No run is given. Name the folders that `internlm2 eval run` wrote.")
    if markdown and latex:
        raise EvalError("--markdown and --latex cannot both be given. Leave one out.")
    form = "markdown" if markdown else "latex" if latex else "text"
    print(as_table([FinishedRun.load(folder) for folder in runs], form=form))


def _engine(model: str, config: RunConfig) -> "tuple[LanguageModel, _Look]":
    """A model of our engine, described by all that may change its answers, and what its self-check looks at."""
    from internlm2.checkpoint.resolve import resolve_model
    from internlm2.eval.backends.engine import EngineModel, fingerprint

    defaults = RunConfig()
    fixed = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
    _refuse(
        config,
        [name for name in fixed if getattr(config, name) != getattr(defaults, name)],
        "benchmarks fix it",
    )
    path = resolve_model(model)
    llm = options.load_llm(str(path), config)
    weights = next(llm.model.parameters())
    facts = {
        "sha256": fingerprint(path),
        "dtype": str(weights.dtype).removeprefix("torch."),
        "device": weights.device.type,
        "max_model_len": str(llm.max_model_len),
        "quantization": llm.weights.label,
        "kv_dtype": config.kv_dtype,
        "speculative": config.speculative,
        "adapter": config.adapter,
        "adapter_sha256": None if config.adapter is None else fingerprint(Path(config.adapter)),
        "deterministic": "yes" if config.deterministic else None,
        "tensor_parallel": str(config.tensor_parallel) if config.tensor_parallel > 1 else None,
    }
    settings = {name: fact for name, fact in facts.items() if fact is not None}
    answers = EngineModel(llm, name=model, settings=settings, adapter=options.adapter_name(config))
    return answers, _Look(path, llm.tokenizer, llm.model.config.vocab_size)


def _checked(
    model: str, config: RunConfig, check: "Callable[[LanguageModel, _Look], None] | None"
) -> "LanguageModel":
    """A model of our engine that has passed its self-check."""
    answers, look = _engine(model, config)
    if check is not None:
        check(answers, look)
    return answers


def _refuse_workers(workers: int, why: str) -> None:
    from internlm2.errors import RequestError

    if workers != 1:
        raise RequestError(f"workers is {workers}, but {why}. Leave --workers out.")


@dataclass(frozen=True)
class _Look:
    """What of an engine's model can be looked at before it answers. num_rows: of its embedding."""

    path: Path
    tokenizer: "Tokenizer"
    num_rows: int


def _self_check(answers: "LanguageModel", look: _Look | None, *, is_chat: bool, has_labels: bool) -> None:
    """Raises SelfCheckError where scores would mean nothing. look: None for an endpoint."""
    from internlm2.doctor.folder import examine_folder
    from internlm2.doctor.probes import PROBES
    from internlm2.eval.self_check import check_answers, check_tokenizer, require
    from internlm2.log import logger

    if look is not None:
        for finding in examine_folder(look.path):
            if finding.level == "wrong":
                logger.warning("Self-check, %s: %s %s", finding.check, finding.text, finding.remedy)
        require([*check_tokenizer(look.tokenizer, PROBES, num_rows=look.num_rows, is_chat=is_chat)])
    require([*check_answers(answers, is_chat=is_chat, has_labels=has_labels)])


def _refuse_key(name: str | None) -> None:
    from internlm2.errors import RequestError

    if name is not None:
        raise RequestError(
            f"--api-key-env is {name!r}, but no endpoint is given. Give --endpoint, or leave it out."
        )


def _endpoint(
    url: str, model: str, config: RunConfig, *, key_name: str | None, concurrency: int
) -> "LanguageModel":
    from internlm2.endpoint import EndpointError
    from internlm2.eval.backends.endpoint import EndpointModel

    given = [one.name for one in fields(config) if getattr(config, one.name) != one.default]
    _refuse(config, [name for name in given if name != "seed"], "an endpoint decides it")
    key = None if key_name is None else os.environ.get(key_name)
    if key_name is not None and not key:
        raise EndpointError(f"The environment variable {key_name} is not set. Put the key of {url} into it.")
    return EndpointModel(url, model, api_key=key, concurrency=concurrency)


def _refuse(config: RunConfig, names: list[str], why: str) -> None:
    from internlm2.errors import RequestError

    if names:
        flag = f"--{names[0].replace('_', '-')}"
        raise RequestError(f"{names[0]} is {getattr(config, names[0])!r}, but {why}. Leave {flag} out.")
