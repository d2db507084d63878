"""Runs benchmarks over a model: one list of questions over all tasks, each kept as soon as it is judged.

What the model wrote is run in the sandbox only. A run that ended early goes on where it was; see `run_folder.py`.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from internlm2 import __version__
from internlm2.errors import InternLM2Error
from internlm2.eval.model import Answer, LanguageModel, Request
from internlm2.eval.profile import Profile, find_profile
from internlm2.eval.questions import Part, RunSettings
from internlm2.eval.results import Results, collect
from internlm2.eval.run_folder import RESULTS, RunFolder, Sample, finite
from internlm2.eval.task import Item, ProgramRunner, Task, TextPrompt, choose
from internlm2.files import write_text
from internlm2.log import logger, progress
from internlm2.sandbox import Limits, SandboxError, run_program

NUM_PROGRAMS = 2  # at a time, beside a model that may keep all processors busy
WAITING_SECONDS = 10.0  # by the clock, beside the processor time that a program may take


def evaluate(
    model: LanguageModel,
    parts: Sequence[Part],
    folder: Path,
    settings: RunSettings,
    *,
    run: ProgramRunner | None = None,
) -> Results:
    """Ask the model every question that `folder` does not hold yet, and write and return the results.

    parts: what `choose_questions` found for these settings. run: runs programs; None: the sandbox.
    Raises EvalError for a folder with another run, SandboxError where no sandbox can be built, what the model raises.
    """
    profile = find_profile(settings.profile)
    identity = identity_of(model.description, parts, settings)
    keeps_limit = model.counts_tokens or profile.max_context_tokens is None
    if not keeps_limit:
        logger.warning(
            "The profile %s shortens prompts to %d tokens, but this model does not say how many tokens a text has: "
            "prompts are sent whole.", profile.name, profile.max_context_tokens,
        )  # fmt: skip
    with RunFolder(folder, identity) as kept:
        questions = {item.key: (part.task, item) for part in parts for item in part.items}
        done = {key for key, sample in kept.samples.items() if not sample.error}
        missing = {key: pair for key, pair in questions.items() if key not in done}
        if done:
            logger.info(
                "%d of %d questions are there already.", len(questions) - len(missing), len(questions)
            )
        requests = (request_of(item, profile, settings) for _, item in missing.values())
        _ask_all(model, missing, requests, kept=kept, run=run or run_in_sandbox)
        assert questions.keys() <= kept.samples.keys(), "the model left questions without an answer"
        results = collect(model.description, settings, parts, kept.samples, keeps_context_limit=keeps_limit)
        write_text(folder / RESULTS, results.as_json())
    for task in results.tasks.values():
        for told in task.shortenings:
            logger.warning("%s.", told)
    return results


def identity_of(
    description: Mapping[str, str], parts: Sequence[Part], settings: RunSettings
) -> dict[str, object]:
    """Everything that decides about the results, as `run.json` keeps it. description: of the model."""
    return {
        "internlm2": __version__,
        "model": dict(description),
        "settings": asdict(settings),
        "tasks": {part.facts.name: asdict(part.facts) for part in parts},
    }


def run_in_sandbox(
    program: str, timeout_seconds: float, *, tests: str, entry_points: Sequence[str] = ()
) -> bool:
    """Whether a program passes its tests in time, in the project's sandbox; they run in two processes there.

    timeout_seconds: of processor time, so that no verdict depends on what else the machine does. By the clock it may
    take 10 s more, for what sleeps or waits.
    Raises SandboxError where no sandbox can be built.
    """
    limits = Limits(wall_seconds=timeout_seconds + WAITING_SECONDS, cpu_seconds=timeout_seconds)
    return run_program(program, tests=tests, entry_points=entry_points, limits=limits).passed


Questions = Mapping[str, tuple[Task, Item]]


def _ask_all(
    model: LanguageModel,
    questions: Questions,
    requests: Iterable[Request],
    *,
    kept: RunFolder,
    run: ProgramRunner,
) -> None:
    judging: deque[Future[None]] = deque()
    pool = ThreadPoolExecutor(NUM_PROGRAMS)

    def judge(task: Task, item: Item, answer: Answer) -> None:
        kept.add(sample_of(task, item, answer, run))

    try:
        with progress("Evaluating", total=len(questions), unit="questions") as bar:
            for request, answer in model.answer(requests):
                task, item = questions[request.key]
                if task.needs_programs:
                    judging.append(pool.submit(judge, task, item, answer))
                else:
                    judge(task, item, answer)
                while judging and judging[0].done():
                    judging.popleft().result()
                bar.advance(1)
            for future in judging:
                future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def request_of(item: Item, profile: Profile, settings: RunSettings) -> Request:
    """What a model is asked for an item."""
    prompt = item.prompt.written()
    is_base = isinstance(prompt, TextPrompt)
    return Request(
        item.key,
        prompt,
        labels=item.labels,
        max_tokens=item.max_tokens,
        min_tokens=profile.min_tokens if is_base and not item.labels else 0,
        stop=tuple(dict.fromkeys((*item.stop, *(item.early_stop if settings.early_stop else ())))),
        max_context_tokens=None if item.is_long else profile.max_context_tokens,
        cuts_middle=item.cuts_middle,
    )


def sample_of(task: Task, item: Item, answer: Answer, run: ProgramRunner) -> Sample:
    """The verdict on an answer, with all that belongs to it. Raises SandboxError where no program can be run."""
    output = choose(answer.logprobs) if answer.logprobs else answer.text
    error, score, extracted, detail = answer.error, 0.0, "", ""
    if not error:
        try:
            verdict = task.score(item, output, run)
        except SandboxError:
            raise
        except InternLM2Error as problem:
            error = str(problem)
        else:
            score, extracted, detail = verdict.score, verdict.extracted, verdict.detail
    prompt = item.prompt.with_shots(len(item.prompt.shots) - answer.dropped_shots)
    return Sample(
        key=item.key,
        task=item.task,
        subset=item.subset,
        index=item.index,
        prompt=prompt.record,
        gold=item.gold,
        output=output,
        logprobs=finite(answer.logprobs),
        extracted=extracted,
        score=score,
        detail=detail,
        error=error,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.output_tokens,
        dropped_shots=answer.dropped_shots,
        cut_tokens=answer.cut_tokens,
    )
