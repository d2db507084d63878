"""GSM8K and MMLU of the demo model: our protocol and lm-evaluation-harness on the same items, item by item.

Run: python benchmarks/lm_eval_compare.py --data ../shared/data/benchmarks. Three scorers see each item: our protocol on
our engine, the harness on our engine (the bridge), the harness on transformers. The second and third may differ by
rounding only. Between the first and the second the protocol changes one step at a time, and the first step that changes
the answer is what explains it. --rounds N also measures the time for MMLU, alternating; only on a quiet machine. The
more questions of a subject, the more share its examples: MMLU has 246 of each.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import lm_eval
from hardware import RESULTS, header
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_tasks import GSM8K, mmlu_name, write_tasks

from internlm2 import LLM
from internlm2.checkpoint.export import export_checkpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import resolve_model
from internlm2.eval.backends.engine import EngineModel
from internlm2.eval.bridge import InternLM2
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.extract import number
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import Part, RunSettings, choose_questions
from internlm2.eval.run_folder import Sample, read_samples
from internlm2.eval.runner import evaluate
from internlm2.eval.tasks.knowledge import LETTERS

HEADLINE = "Our protocol and lm-evaluation-harness on the same items"
HarnessSample = Mapping[str, object]


@dataclass(frozen=True)
class Setting:
    """What is compared. mmlu: questions of each subject; gsm8k: questions. race_dtype: where time is measured."""

    data: DataFolder
    subjects: tuple[str, ...]
    mmlu: int
    gsm8k: int
    dtype: str
    race_dtype: str
    batch_size: int

    def parts(self) -> list[Part]:
        """Our questions, drawn with seed 0."""
        tasks = tuple(f"mmlu.{subject}" for subject in self.subjects)
        groups = [(tasks, self.mmlu), (("gsm8k",), self.gsm8k)]
        return [
            part
            for names, limit in groups
            if limit and names
            for part in choose_questions(self.data, find_profile("card-2024-02"), self.run(names, limit))
        ]

    def run(self, tasks: tuple[str, ...], limit: int) -> RunSettings:
        """As `internlm2 eval run` would have it; answers end where a next question begins."""
        return RunSettings(tasks, "card-2024-02", limit=limit, early_stop=True)


def harness(model: LM, tasks: TaskManager, names: Sequence[str]) -> dict[str, list[HarnessSample]]:
    """The harness's samples by task; of several filters the first, with the verdict of each under its name."""
    found = lm_eval.simple_evaluate(model=model, tasks=list(names), task_manager=tasks, bootstrap_iters=0)
    merged: dict[str, list[HarnessSample]] = {}
    for name in names:
        by_doc: dict[int, dict[str, object]] = {}
        for sample in found["samples"][name]:
            own = by_doc.setdefault(sample["doc_id"], dict(sample))
            own[sample["filter"]] = (sample["filtered_resps"][0], sample.get("exact_match"))
        merged[name] = [by_doc[key] for key in sorted(by_doc)]
    return merged


# -- MMLU ------------------------------------------------------------------------------------------------------


def choose(llm: LLM, context: str, continuations: Sequence[str]) -> str:
    """The likeliest letter behind a text; the first on a tie."""
    scores = [score.logprob for score in llm.score([context] * len(LETTERS), list(continuations))]
    return LETTERS[max(range(len(LETTERS)), key=scores.__getitem__)]


def mmlu_ladder(llm: LLM, ours: Sample, whole: str, theirs: str) -> list[tuple[str, str]]:
    """What is chosen as our prompt turns into theirs, one step at a time. whole: our prompt with all examples."""
    spaced = [f" {letter}" for letter in LETTERS]
    steps = [("our protocol", ours.prompt, LETTERS), ("no context limit of 2048", whole, LETTERS)]
    text = whole.removesuffix(" ")
    steps.append(("the blank belongs to the letter: `Answer:` and ` A`", text, spaced))
    text = text.replace("(with answers) about  ", "(with answers) about ", 1)
    steps.append(("one blank before the subject", text, spaced))
    steps.append(("questions stripped, as the harness writes them", theirs, spaced))
    return [(name, choose(llm, context, letters)) for name, context, letters in steps]


def first_change(steps: Sequence[tuple[str, str]]) -> str:
    """The steps at which the value changes."""
    changes = [
        f"{name}: {value} instead of {before}"
        for (_, before), (name, value) in pairwise(steps)
        if value != before
    ]
    return "; then ".join(changes) or "nothing"


def compare_mmlu(
    llm: LLM,
    parts: Sequence[Part],
    samples: Mapping[str, Sample],
    bridge: Mapping[str, list[HarnessSample]],
    hf: Mapping[str, list[HarnessSample]],
) -> list[str]:
    """The section on MMLU."""
    rows: list[str] = []
    counts: Counter[str] = Counter()
    largest = 0.0
    for part in parts:
        for subject, items in part.subsets.items():
            for item, own, other in zip(
                items, bridge[mmlu_name(subject)], hf[mmlu_name(subject)], strict=True
            ):
                mine = samples[item.key]
                values = [[float(one[0]) for one in run["filtered_resps"]] for run in (own, other)]
                largest = max(largest, *(abs(a - b) for a, b in zip(*values, strict=True)))
                letters = [LETTERS[max(range(4), key=own_values.__getitem__)] for own_values in values]
                steps = mmlu_ladder(llm, mine, item.prompt.text, own["arguments"][0][0])
                assert steps[0][1] == mine.output, (
                    f"{item.key}: the ladder does not begin where the run ended"
                )
                assert steps[-1][1] == letters[0], f"{item.key}: the ladder does not end at the harness"
                counts["n"] += 1
                counts["ours"] += mine.output == item.gold
                counts["bridge"] += letters[0] == item.gold
                counts["hf"] += letters[1] == item.gold
                counts["changed"] += mine.output != letters[0]
                counts["rounding"] += letters[0] != letters[1]
                if len({mine.output, *letters}) > 1:
                    rows.append(
                        f"| {item.key} | {item.gold} | {mine.output} | {letters[0]} | {letters[1]} | "
                        f"{first_change(steps)} |"
                    )
    n = counts["n"]
    return [
        "## MMLU, 5 examples, base model",
        "",
        f"{n} questions. Right: our protocol {counts['ours']}, harness on our engine {counts['bridge']}, harness on "
        f"transformers {counts['hf']}. The two protocols choose another letter {counts['changed']} times; the two "
        f"engines {counts['rounding']} times. Largest difference of a log-likelihood between the engines: "
        f"{largest:.1e}.",
        "",
        "| item | right | ours | harness, our engine | harness, transformers | what changed the choice |",
        "|---|---|---|---|---|---|",
        *(rows or ["| none differs | | | | | |"]),
        "",
    ]


# -- GSM8K -----------------------------------------------------------------------------------------------------


def compare_gsm8k(
    part: Part,
    samples: Mapping[str, Sample],
    bridge: Sequence[HarnessSample],
    hf: Sequence[HarnessSample],
) -> list[str]:
    """The section on GSM8K."""
    rows: list[str] = []
    counts: Counter[str] = Counter()
    for item, own, other in zip(part.items, bridge, hf, strict=True):
        mine, text = samples[item.key], str(own["resps"][0][0])
        read = number.february(text)
        (flexible, flexible_right), (strict, strict_right) = own["flexible-extract"], own["strict-match"]
        right = [
            mine.score == 1.0,
            number.nearly_equal(read, item.gold),
            flexible_right == 1.0,
            strict_right == 1.0,
        ]
        same_text = text == str(other["resps"][0][0])
        for name, holds in zip(("ours", "read", "flexible", "strict"), right, strict=True):
            counts[name] += holds
        counts["texts"] += same_text
        counts["n"] += 1
        counts["hf flexible"] += other["flexible-extract"][1] == 1.0
        names = (
            "our rule",
            "other examples",
            "their reading, flexible-extract",
            "their reading, strict-match",
        )
        told = [
            f"{name}: {'right' if now else 'wrong'}"
            for name, before, now in zip(names[1:], right, right[1:], strict=False)
            if before != now
        ]
        if told or not same_text:
            told += [] if same_text else [_first_difference(text, str(other["resps"][0][0]))]
            cells = [item.key, item.gold, mine.extracted, read, flexible, strict, "; then ".join(told)]
            rows.append(
                "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
            )
    n = counts["n"]
    return [
        "## GSM8K, base model",
        "",
        "Our protocol: 4 fixed worked examples, last number of the answer. Harness: 5 examples drawn from the training "
        "rows, with `#### N`; flexible-extract takes the last number of another pattern, strict-match wants `#### N`.",
        "",
        f"{n} questions. Right: our protocol {counts['ours']}; the answer to the harness's prompt, read by our rule "
        f"{counts['read']}, by flexible-extract {counts['flexible']} (transformers {counts['hf flexible']}), by "
        f"strict-match {counts['strict']}. Our engine and transformers wrote the same text {counts['texts']} times.",
        "",
        "| item | right | ours | their prompt, our rule | flexible | strict | what changed the verdict |",
        "|---|---|---|---|---|---|---|",
        *(rows or ["| none differs | | | | | | |"]),
        "",
    ]


def _first_difference(ours: str, theirs: str) -> str:
    place = next(
        (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    return f"transformers writes something else from character {place}: {theirs[place : place + 20]!r}"


# -- time ------------------------------------------------------------------------------------------------------


def race(setting: Setting, parts: Sequence[Part], tasks: TaskManager, folder: Path, rounds: int) -> list[str]:
    """Seconds for the MMLU questions, alternating. Models are loaded anew for each round, outside the time."""
    names = [mmlu_name(subject) for subject in setting.subjects]
    seconds: dict[str, list[float]] = defaultdict(list)
    right: dict[str, set[int]] = defaultdict(set)
    run = setting.run(tuple(f"mmlu.{subject}" for subject in setting.subjects), setting.mmlu)
    weights = ""
    for n in range(rounds):
        llm = LLM("demo", dtype=setting.race_dtype)  # nothing is cached from the round before
        with tempfile.TemporaryDirectory() as target:
            started = time.perf_counter()
            evaluate(EngineModel(llm, name="demo"), parts, Path(target), run)
            seconds["our protocol"].append(time.perf_counter() - started)
            right["our protocol"].add(sum(one.score == 1 for one in read_samples(Path(target)).values()))
        weights = str(llm.weights)
        llm.close()
        for name, load in (
            ("harness, our engine", lambda: InternLM2("demo", device="cpu", dtype=setting.race_dtype)),
            ("harness, transformers", lambda: hf_model(folder, setting.race_dtype, setting.batch_size)),
        ):
            model = load()
            with timed(model) as spent:
                found = harness(model, tasks, names)
            seconds[name].append(sum(spent))
            right[name].add(sum(int(one["acc"]) for own in found.values() for one in own))
            del model
        last = ", ".join(f"{name} {own[-1]:.1f} s" for name, own in seconds.items())
        print(f"round {n + 1} of {rounds}: {last}", flush=True)
    slow = statistics.median(seconds["harness, transformers"])
    num_questions = sum(len(items) for part in parts for items in part.subsets.values())
    return [
        f"## Time for {num_questions} MMLU questions of {len(setting.subjects)} subjects "
        f"({setting.race_dtype}, {rounds} rounds, alternating)",
        "",
        f"Ours: {weights} transformers computes batches of {setting.batch_size}. Loading is not counted. Of the "
        "harness only the part of the model counts, of our protocol all from the questions to the results on disk.",
        "",
        "| scorer | seconds, median | smallest to largest | times as fast | right |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {statistics.median(own):.1f} | {min(own):.1f} to {max(own):.1f} | "
            f"{slow / statistics.median(own):.1f} | {' or '.join(map(str, sorted(right[name])))} |"
            for name, own in seconds.items()
        ),
        "",
    ]


@contextmanager
def timed(model: LM) -> Iterator[list[float]]:
    """Seconds that a model of the harness spends over its questions."""
    spent: list[float] = []
    answer = model.loglikelihood

    def loglikelihood(*given: object, **more: object) -> object:
        started = time.perf_counter()
        try:
            return answer(*given, **more)
        finally:
            spent.append(time.perf_counter() - started)

    model.loglikelihood = loglikelihood
    yield spent


def hf_model(folder: Path, dtype: str, batch_size: int) -> HFLM:
    """The harness's own model: transformers' Llama on the demo model in Llama's layout."""
    return HFLM(pretrained=str(folder), dtype=dtype, device="cpu", batch_size=batch_size)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--subjects", default="anatomy,college_mathematics,global_facts,us_foreign_policy")
    parser.add_argument("--mmlu", type=int, default=10, help="questions of each subject")
    parser.add_argument("--gsm8k", type=int, default=10, help="questions")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--race-dtype", default="float32", help="where the time is measured")
    parser.add_argument("--batch-size", type=int, default=8, help="of transformers, for MMLU")
    parser.add_argument("--rounds", type=int, default=0, help="measure the time for MMLU as well")
    parser.add_argument("--output", type=Path, default=RESULTS / "lm_eval.md")
    return parser.parse_args()


def main() -> None:
    """Compare, and write the result file."""
    given = arguments()
    subjects = tuple(name for name in given.subjects.split(",") if name)
    setting = Setting(
        DataFolder(given.data),
        subjects,
        given.mmlu,
        given.gsm8k,
        given.dtype,
        given.race_dtype,
        given.batch_size,
    )
    parts = setting.parts()
    mmlu, gsm8k = parts[0], parts[-1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_checkpoint(open_checkpoint(resolve_model("demo")), folder / "llama", to="llama")
        (folder / "tasks").mkdir()
        tasks = write_tasks(
            folder / "tasks", setting.data,
            mmlu={subject: [item.index for item in items] for subject, items in mmlu.subsets.items()},
            gsm8k=[item.index for item in gsm8k.items],
        )  # fmt: skip
        bridge = InternLM2("demo", dtype=setting.dtype, device="cpu")
        samples: dict[str, Sample] = {}
        for part, limit in ((mmlu, setting.mmlu), (gsm8k, setting.gsm8k)):
            target = folder / part.facts.name
            names = tuple(f"mmlu.{one}" for one in subjects) if part is mmlu else ("gsm8k",)
            evaluate(EngineModel(bridge.llm, name="demo"), [part], target, setting.run(names, limit))
            samples |= read_samples(target)
        names = [*map(mmlu_name, subjects), GSM8K]
        own = harness(bridge, tasks, names)
        other = harness(hf_model(folder / "llama", setting.dtype, setting.batch_size), tasks, names[:-1])
        alone = hf_model(folder / "llama", setting.dtype, 1)
        other |= harness(alone, tasks, [GSM8K])  # one at a time: padding moves the last bits
        sections = compare_mmlu(bridge.llm, [mmlu], samples, own, other)
        sections += compare_gsm8k(gsm8k, samples, own[GSM8K], other[GSM8K])
        if given.rounds:
            sections += race(setting, [mmlu], tasks, folder / "llama", given.rounds)
    command = (
        f"python benchmarks/lm_eval_compare.py --data DATA --subjects {given.subjects} --mmlu {given.mmlu} "
        f"--gsm8k {given.gsm8k} --dtype {given.dtype} --race-dtype {given.race_dtype} --rounds {given.rounds}"
    )
    text = header(HEADLINE, command, ("torch", "transformers", "lm_eval"))
    text += f"Demo model (135M), {given.dtype}, profile card-2024-02, questions drawn with seed 0.\n\n"
    given.output.write_text(text + "\n".join(sections))
    print(given.output.read_text())


if __name__ == "__main__":
    main()
