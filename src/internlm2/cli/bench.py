"""`internlm2 bench`: speed and memory of a model on this machine."""

import json
from typing import Annotated

from cyclopts import Parameter

from internlm2.cli import options
from internlm2.cli.model import ModelArgument
from internlm2.cli.options import RunFlags
from internlm2.errors import RequestError


def bench(
    model: ModelArgument,
    *,
    only: Annotated[
        str | None, Parameter(help="Some of latency,throughput,rate,prefill,memory, with commas [all].")
    ] = None,
    prompt_tokens: Annotated[int, Parameter(help="Length of the prompts.")] = 128,
    output_tokens: Annotated[int, Parameter(help="Length of the answers.")] = 64,
    num_prompts: Annotated[int, Parameter(help="At once for throughput, in all for rate.")] = 16,
    rate: Annotated[float, Parameter(help="Requests that arrive per second, at random times.")] = 4.0,
    prefill_tokens: Annotated[str, Parameter(help="Lengths of the prompts for prefill.")] = "128,512",
    repeats: Annotated[int, Parameter(help="How often everything is measured.")] = 5,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
    flags: RunFlags | None = None,
) -> None:
    """Measure a model and print medians with their spread. Close other programs before."""
    if flags is not None and (flags.max_tokens is not None or flags.stop is not None):
        raise RequestError(
            "bench fixes where answers end. Give --output-tokens in place of --max-tokens and --stop."
        )
    config = options.resolve(flags)
    if config.adapter is not None:
        raise RequestError("bench measures the model itself. Leave --adapter off.")
    params = options.sampling(config)
    lengths = _numbers(prefill_tokens)

    from internlm2.engine.bench import PARTS, BenchOptions, measure

    asked = BenchOptions(
        only=PARTS if only is None else tuple(only.split(",")),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        num_prompts=num_prompts,
        rate_per_second=rate,
        prefill_tokens=lengths,
        repeats=repeats,
        seed=config.seed or 0,
    )
    report = measure(options.load_llm(model, config), asked, params, name=model)
    print(json.dumps(report.as_json(), indent=2) if json_output else report.as_text())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"prefill-tokens is {text!r}, but must be whole numbers with commas, as in 128,512."
        ) from None
