"""The folder of one run: `run.json` says what is run, `samples.jsonl` holds every question that is done.

A sample is on disk as soon as it is judged. A run that was killed is opened again and goes on; a line that was being
written then is dropped and its question asked again, as are those that failed. With a larger limit it grows.
"""

import fcntl
import json
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from internlm2 import files
from internlm2.eval.task import EvalError

RUN, SAMPLES, RESULTS = "run.json", "samples.jsonl", "results.json"
_MISSING = object()
_LIMIT = re.compile(r"settings\.limit|settings\.task_limits(\.\w+)?")
_PROMPTS = re.compile(r"tasks\.(\w+)\.prompt_sha256")


@dataclass(frozen=True)
class Sample:
    """One question, its answer and its verdict.

    prompt: as the model was given it, except that `cut_tokens` tokens of its beginning or middle are missing; of needle
    tests its ends. output: what was written, or the label that was chosen; logprobs: by label (None: no number). error:
    why there is no verdict; score means nothing then. finish_reason: "length" where the answer was cut. seconds: since
    the sample before it.
    """

    key: str
    task: str
    subset: str
    index: int
    prompt: str
    gold: str
    output: str = ""
    logprobs: Mapping[str, float | None] = field(default_factory=dict)
    extracted: str = ""
    score: float = 0.0
    detail: str = ""
    error: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    dropped_shots: int = 0
    cut_tokens: int = 0
    seconds: float = 0.0


def _kind(annotation: object) -> type | tuple[type, ...]:
    if annotation is float:
        return (int, float)
    return annotation if annotation in (str, int) and isinstance(annotation, type) else dict


_KINDS = {one.name: _kind(one.type) for one in fields(Sample)}


def read_json(path: Path) -> dict[str, object]:
    """A JSON object that a run wrote. Raises EvalError when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise EvalError(
            f"There is no {path}. Give the folder of a run, and let `internlm2 eval run` finish it first."
        ) from None
    except (ValueError, OSError) as error:
        raise EvalError(f"{path} cannot be read: {error}. Remove it and start the run again.") from error
    if not isinstance(content, dict):
        raise EvalError(f"{path} holds no JSON object. Remove it and start the run again.")
    return content


def read_samples(folder: Path) -> dict[str, Sample]:
    """The samples of a run by key, the last one of each. Raises EvalError where there is no run, or it is damaged."""
    path = folder / SAMPLES
    if not path.is_file():
        raise EvalError(f"There is no {path}. Give the folder of a run.")
    return _parse(path, path.read_bytes())[0]


def _parse(path: Path, content: bytes) -> tuple[dict[str, Sample], int]:
    """The samples, and how many bytes are whole lines."""
    whole = content[: content.rfind(b"\n") + 1]
    samples: dict[str, Sample] = {}
    for n, line in enumerate(whole.splitlines(), 1):  # bytes are split at line breaks only, not at U+2028
        try:
            sample = _sample(json.loads(line))
        except ValueError as error:
            raise EvalError(f"{path} is damaged at line {n}: {error}. Remove that line.") from error
        samples[sample.key] = sample
    return samples, len(whole)


def _sample(data: object) -> Sample:
    # NOTE: by hand, because `config.from_dict` takes a millisecond and there may be 50,000.
    if not isinstance(data, dict) or set(data) != set(_KINDS):
        raise ValueError("it does not have the fields of a sample")
    for name, kind in _KINDS.items():
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise ValueError(f"{name} is {data[name]!r:.80}")
    return Sample(**data)


class RunFolder:
    """A run that is going on; a context manager. Samples may be added from several threads.

    identity: everything that decides about the results, as JSON. Raises EvalError where the folder holds something
    else, or a run with another identity, or one that another process is working on. A larger limit of questions is no
    other identity, because it draws all that a smaller one drew: the folder becomes that run, which is not finished.
    """

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        self.path = path
        with files.writing(path):
            path.mkdir(parents=True, exist_ok=True)
            is_new = check_folder(path, identity)
            self._file = (path / SAMPLES).open("r+b" if (path / SAMPLES).exists() else "w+b")
        try:
            self._lock_file()
            self.samples, num_whole_bytes = _parse(path / SAMPLES, self._file.read())
            self._file.truncate(num_whole_bytes)
            self._file.seek(num_whole_bytes)
            if is_new:
                (path / RESULTS).unlink(missing_ok=True)
                text = json.dumps(identity, indent=2, ensure_ascii=False)
                files.write_text(path / RUN, text + "\n")
        except BaseException:
            self._file.close()
            raise
        self._lock = threading.Lock()
        self._last_seconds = time.monotonic()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, sample: Sample, *, is_timed: bool = False) -> None:
        """Keep a sample: written and flushed when this returns. is_timed: its seconds were measured elsewhere."""
        with self._lock, files.writing(self.path / SAMPLES):
            now = time.monotonic()
            if not is_timed:
                sample = replace(sample, seconds=round(now - self._last_seconds, 4))
            self._last_seconds = now
            self._file.write(_line(sample))
            self._file.flush()
            self.samples[sample.key] = sample

    def _lock_file(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EvalError(f"Another process is running in {self.path}. Wait for it to end.") from error


def check_folder(path: Path, identity: Mapping[str, object]) -> bool:
    """Whether `run.json` must be written. Changes nothing, so that it can be asked before a model is loaded.

    identity: as for `RunFolder`; where its "model" is empty, no model is compared.
    Raises EvalError and ExportError where `RunFolder` would.
    """
    with files.writing(path):
        if not path.exists() and not path.is_symlink():
            return True
        if not (path / RUN).exists():
            if any(one.name != SAMPLES or one.stat().st_size for one in path.iterdir()):
                raise EvalError(f"{path} holds something else than a run. Give a new or empty folder.")
            return True
    before = _flat(read_json(path / RUN))
    now = _flat(json.loads(json.dumps(identity)))
    if not identity.get("model"):
        before = {key: value for key, value in before.items() if not key.startswith("model.")}
    changed = [key for key in {**before, **now} if before.get(key, _MISSING) != now.get(key, _MISSING)]
    if changed and not _is_larger(before, now, changed):
        told = "; ".join(f"{key} was {_say(before, key)} and is {_say(now, key)}" for key in changed[:5])
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise EvalError(
            f"{path} holds a run with other settings: {told}{more}. Give another folder for the results, "
            "or the same settings to go on with that run."
        )
    return bool(changed)


def chosen_samples(
    samples: Mapping[str, Sample], *, task: str | None = None, is_wrong: bool = False, is_error: bool = False
) -> list[Sample]:
    """Samples of one task, or of one TASK.SUBSET; only those that are not right, or only those without a verdict.

    Raises EvalError for a task that none of them belongs to.
    """
    known = {name for one in samples.values() for name in (one.task, f"{one.task}.{one.subset}")}
    if task is not None and task not in known:
        tasks = sorted({one.task for one in samples.values()})
        raise EvalError(
            f"No sample belongs to the task {task!r}. Tasks with samples: {', '.join(tasks) or 'none'}."
        )
    return [
        one
        for one in samples.values()
        if task in (None, one.task, f"{one.task}.{one.subset}")
        and (not is_error or one.error)
        and (not is_wrong or one.error or one.score < 1)
    ]


def _is_larger(before: Mapping[str, object], now: Mapping[str, object], changed: Sequence[str]) -> bool:
    """Whether limits have grown, none has shrunk, and nothing else has changed but the prompts that this adds."""
    names = [found[1] for key in now if (found := _PROMPTS.fullmatch(key))]
    limits = {name: (_limit_of(before, name), _limit_of(now, name)) for name in names}
    grown = {f"tasks.{name}.prompt_sha256" for name, (old, new) in limits.items() if old < new}
    return (
        bool(grown)
        and all(old <= new for old, new in limits.values())
        and all(_LIMIT.fullmatch(key) or key in grown for key in changed)
    )


def _limit_of(flat: Mapping[str, object], task: str) -> float:
    limit = flat.get(f"settings.task_limits.{task}", flat.get("settings.limit"))
    return limit if isinstance(limit, int) else math.inf


def _line(sample: Sample) -> bytes:
    fields = asdict(sample)
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a character out of two, which JSON can spell and UTF-8 cannot
        return json.dumps(fields, allow_nan=False).encode() + b"\n"


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: None stands for it."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _flat(data: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(data, dict):
        return {prefix: data}
    nested = [_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in data.items()]
    return {key: value for one in nested for key, value in one.items()}


def _say(flat: Mapping[str, object], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False)[:80] if key in flat else "not given"
