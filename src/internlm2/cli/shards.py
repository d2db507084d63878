"""`internlm2 eval merge`, and how `eval run` splits its questions over workers and shards."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from internlm2.cli import options
from internlm2.cli.options import RunConfig

if TYPE_CHECKING:
    from internlm2.eval.model import LanguageModel
    from internlm2.eval.results import Results
    from internlm2.eval.shards import Shard

INCOMPLETE = 1


def merge(
    run: Annotated[Path, Parameter(help="The --output folder that the shards were given.")],
    *,
    data: Annotated[Path, Parameter(help="The data folder that they were given.")] = Path("data"),
) -> int:
    """Bring the shards of a run together, and print the table.

    Exit code 1 when questions are left without a verdict; 2 when some were not asked yet.
    """
    from internlm2.eval.data.folder import DataFolder
    from internlm2.eval.shards import merge as merge_shards
    from internlm2.eval.table import FinishedRun
    from internlm2.eval.table import table as as_table

    results = merge_shards(run, DataFolder(data))
    print(as_table([FinishedRun.load(run)]))
    return INCOMPLETE if results.num_errors else 0


@contextmanager
def on_workers(
    make: "Callable[[], LanguageModel]", config: RunConfig, count: int
) -> "Iterator[LanguageModel]":
    """The model, in this process where one is enough, else `count` of them on Ray."""
    if count == 1:
        yield make()
        return
    from internlm2.eval.backends.ray_workers import RayModel

    is_gpu = options.device_of(config).startswith("cuda")
    num_gpus = config.tensor_parallel if is_gpu else 0
    with RayModel(make, num_workers=count, num_cpus=max(1, config.threads), num_gpus=num_gpus) as model:
        yield model


def finish_shard(results: "Results", folder: Path, shard: "Shard") -> int:
    """Say what a shard has done; its scores mean nothing by themselves."""
    num_questions = sum(task.num_questions for task in results.tasks.values())
    print(
        f"Shard {shard.number} of {shard.count} is done: {num_questions} questions. When all are: "
        f"internlm2 eval merge {folder}",
        file=sys.stderr,
    )
    return INCOMPLETE if results.num_errors else 0
