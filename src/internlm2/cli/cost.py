"""`internlm2 eval cost`: what an evaluation will cost, without running it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def cost(
    model: Annotated[
        str, Parameter(help="Folder or Hugging Face id with tokenizer and config.json, or `demo`.")
    ],
    *,
    tasks: Annotated[str, Parameter(help="As in `eval run`; default: the card's seven.")] = "",
    profile: Annotated[str, Parameter(help="card-2024-01, card-2024-02 or fixed.")] = "card-2024-02",
    data: Annotated[Path, Parameter(help="Folder in the layout of OpenCompass' data/.")] = Path("data"),
    chat: Annotated[bool, Parameter(help="As a chat model is asked, not a base model.", negative=())] = False,
    limit: Annotated[str | None, Parameter(help="As in `eval run`.")] = None,
    seed: Annotated[int, Parameter(help="Of the draw.")] = 0,
    shape: Annotated[
        str | None, Parameter(help="Count MODEL's tokens, but compute with the shape 1.8b, 7b or 20b.")
    ] = None,
    run: Annotated[
        Path | None,
        Parameter(help="A run, finished or not: answers are as long as there, not as their limit."),
    ] = None,
    device: Annotated[str, Parameter(help="h100, h200 or a100: the rates of its data sheet.")] = "h100",
    tflops: Annotated[float | None, Parameter(help="Another rate of matrix products, in TFLOP/s.")] = None,
    gbps: Annotated[float | None, Parameter(help="Another rate of memory, in GB/s.")] = None,
    reached: Annotated[float, Parameter(help="Share of both rates that is reached; 1 is the limit.")] = 1.0,
    bench: Annotated[
        Path | None,
        Parameter(help="What `internlm2 bench MODEL --json` wrote: its speed in place of a data sheet's."),
    ] = None,
    max_num_seqs: Annotated[int, Parameter(help="Answers that are written at the same time.")] = 64,
    max_model_len: Annotated[int | None, Parameter(help="Longest prompt plus answer, in tokens.")] = None,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
) -> None:
    """Count the prompts and tokens of an evaluation, and say how long a device needs at the least.

    Nothing is computed by a model; weights are not read.
    """
    from internlm2.checkpoint.open import open_checkpoint
    from internlm2.checkpoint.resolve import resolve_model
    from internlm2.errors import CheckpointError, RequestError
    from internlm2.eval.cost import as_text, count, estimate, mean_answers
    from internlm2.eval.data.folder import DataFolder
    from internlm2.eval.devices import find_device, measured_device
    from internlm2.eval.profile import find_profile
    from internlm2.eval.questions import RunSettings, choose_questions, read_limits
    from internlm2.eval.run_folder import read_samples
    from internlm2.eval.tasks import CARD_TASKS
    from internlm2.model.config import preset
    from internlm2.tokenizer import Tokenizer

    rates = find_device(device)
    rates = replace(
        rates,
        flops_per_second=rates.flops_per_second if tflops is None else tflops * 1e12,
        bytes_per_second=rates.bytes_per_second if gbps is None else gbps * 1e9,
        prefill_share=reached,
        decode_share=reached,
    )
    if bench is not None and (device, tflops, gbps, reached) != ("h100", None, None, 1.0):
        raise RequestError(
            "--bench says how fast the device is. Leave --device, --tflops, --gbps and --reached out."
        )
    names = tuple(name.strip() for name in tasks.split(",") if name.strip()) or CARD_TASKS
    all_limit, task_limits = read_limits(limit or "")
    settings = RunSettings(names, profile, chat, all_limit, seed, task_limits=task_limits)
    lengths = None if run is None else mean_answers(read_samples(run).values())
    parts = choose_questions(DataFolder(data), find_profile(profile), settings)
    path = resolve_model(model)
    if shape is None:
        checkpoint = open_checkpoint(path)
        config, folder = checkpoint.config, checkpoint.tokenizer_folder
    else:
        config = preset(shape)
        folder = path if path.is_dir() else open_checkpoint(path).tokenizer_folder
    if folder is None:
        raise CheckpointError(f"{path} has no tokenizer. Give a folder that holds one.")
    if bench is not None:
        rates = measured_device(bench, config if shape is None else open_checkpoint(path).config)
    tokenizer = Tokenizer.from_pretrained(folder)
    longest = max_model_len or config.max_position_embeddings
    loads = count(tokenizer, parts, settings, max_model_len=longest, answers=lengths, config=config)
    costs = estimate(loads, config, rates, max_num_seqs=max_num_seqs)
    if json_output:
        told = [asdict(one) | {"seconds": one.seconds} for one in costs]
        print(json.dumps({"device": asdict(rates), "tasks": told}, indent=2))
    else:
        print(as_text(costs, rates, are_answers_measured=run is not None))
