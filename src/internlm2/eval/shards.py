"""A run that is split: each machine asks its share of the questions, and one folder holds all in the end.

Questions are dealt in small blocks of neighbours, which share their worked examples: shares are equally hard, and
each still computes common beginnings once. No machine needs to know of another. `backends/ray_workers.py` is the other
way: there one program deals, and does not wait for the slowest.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from internlm2 import files
from internlm2.config import from_dict
from internlm2.errors import ConfigError
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.model import LanguageModel
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import Part, RunSettings, choose_questions
from internlm2.eval.results import Results, collect
from internlm2.eval.run_folder import RESULTS, RUN, RunFolder, Sample, read_json, read_samples
from internlm2.eval.runner import evaluate, identity_of
from internlm2.eval.task import EvalError, Item, ProgramRunner
from internlm2.files import write_text

SHARDS = "shards"
_BLOCK = 16  # questions; as many as make a common beginning worth while, few enough to balance


@dataclass(frozen=True)
class Shard:
    """One of several equal shares: number from 1 to count. Raises EvalError for anything else."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise EvalError(
                f"The shard is {self.number}/{self.count}, but must be I/N with I from 1 to N, such as 2/8."
            )

    @staticmethod
    def parse(text: str) -> "Shard":
        """Read "I/N"."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None:
            raise EvalError(f"The shard is {text!r}, but must be I/N with I from 1 to N, such as 2/8.")
        return Shard(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.number}-of-{self.count}"

    def folder(self, run: Path) -> Path:
        """Where its share of a run lies."""
        return run / SHARDS / self.name

    def share(self, parts: Sequence[Part]) -> list[Part]:
        """Its questions: of all tasks, every `count`-th block. Blocks of few questions are smaller."""
        total = sum(len(items) for part in parts for items in part.subsets.values())
        block, place = max(1, min(_BLOCK, math.ceil(total / self.count))), 0
        shares: list[Part] = []
        for part in parts:
            subsets: dict[str, Sequence[Item]] = {}
            for name, items in part.subsets.items():
                places = range(place, place + len(items))
                place += len(items)
                subsets[name] = [
                    item
                    for n, item in zip(places, items, strict=True)
                    if n // block % self.count == self.number - 1
                ]
            shares.append(replace(part, subsets=subsets))
        return shares


def evaluate_shard(
    model: LanguageModel,
    parts: Sequence[Part],
    folder: Path,
    settings: RunSettings,
    *,
    shard: Shard,
    run: ProgramRunner | None = None,
) -> Results:
    """As `runner.evaluate`, for one share of the questions, in a folder of its own under `folder`.

    The results are those of the share; `merge` makes those of the run.
    """
    return evaluate(model, shard.share(parts), shard.folder(folder), settings, run=run)


def merge(folder: Path, data: DataFolder) -> Results:
    """Bring together what the shards under `folder` have, and write and return the results of the whole run.

    data: the same as the shards had; it says which questions there are. Shards may be split differently, and the run
    may hold answers of its own already. Raises EvalError for shards of different runs, other data, and questions that
    nobody has answered; what was brought together until then is kept.
    """
    shards = sorted(path for path in (folder / SHARDS).glob("*-of-*") if (path / RUN).exists())
    if not shards:
        raise EvalError(
            f"There are no shards in {folder / SHARDS}. Run `internlm2 eval run ... --output {folder} --shard I/N` "
            "for each I first."
        )
    identity = read_json(shards[0] / RUN)
    settings, description = _read_identity(identity, shards[0] / RUN)
    if not (folder / RUN).exists():
        write_text(folder / RUN, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
    for shard in shards:
        with RunFolder(folder, read_json(shard / RUN)):
            pass  # it refuses another identity by name
    parts = choose_questions(data, find_profile(settings.profile), settings)
    with RunFolder(folder, identity_of(description, parts, settings)) as kept:
        for shard in shards:
            _take(kept, read_samples(shard))
        missing = [item.key for part in parts for item in part.items if item.key not in kept.samples]
        finished = [shard for shard in shards if (shard / RESULTS).exists()]
        if missing or not finished:
            raise EvalError(_incomplete(folder, missing, [path for path in shards if path not in finished]))
        keeps_limit = Results.load(finished[0]).keeps_context_limit
        results = collect(description, settings, parts, kept.samples, keeps_context_limit=keeps_limit)
        files.write_text(folder / RESULTS, results.as_json())
    return results


def _take(kept: RunFolder, samples: Mapping[str, Sample]) -> None:
    """Add what is new, or better than an error."""
    for key, sample in samples.items():
        before = kept.samples.get(key)
        if before is None or (before.error and not sample.error):
            kept.add(sample, is_timed=True)


def _read_identity(identity: Mapping[str, object], path: Path) -> tuple[RunSettings, dict[str, str]]:
    try:
        settings, model = identity["settings"], identity["model"]
        if not isinstance(settings, dict) or not isinstance(model, dict):
            raise KeyError("settings")
        return from_dict(RunSettings, settings, where=str(path)), {str(k): str(v) for k, v in model.items()}
    except (KeyError, ConfigError) as error:
        raise EvalError(f"{path} is damaged: {error}. Remove this shard and run it again.") from error


def _incomplete(folder: Path, missing: Sequence[str], unfinished: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in unfinished) or "none of those that were begun"
    some = f" ({missing[0]} is the first)" if missing else ""
    return (
        f"{len(missing)} questions are not answered yet{some}. Shards that have not ended: {names}. Run the missing "
        f"shards and merge again, or run the same command with --output {folder} and without --shard to ask them here."
    )
