"""Verdicts: what each profile makes of an answer, and what reference answers reach under it."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from internlm2.errors import ConfigError
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.profile import MENDS, PROFILES, find_profile
from internlm2.eval.runner import run_in_sandbox
from internlm2.eval.task import EvalError, Item, choose
from internlm2.eval.tasks import build, find_item

Answer = Callable[[Item], str]


def verdict(key: str, output: str, data: DataFolder, profile: str, *, chat: bool = True, run=None):
    task = build(key.partition(".")[0].partition(":")[0], PROFILES[profile], is_chat=chat)
    return task.score(find_item(key, PROFILES[profile], data, is_chat=chat), output, run)


@pytest.mark.parametrize(
    "case",
    [
        ("mmlu.abstract_algebra:0", True, "B", "B", "B", "B"),
        ("mmlu.abstract_algebra:0", True, "The answer is B.", "T", "B", "B"),
        ("mmlu.abstract_algebra:0", True, "(B) because A is wrong", "B", "A", "B"),
        ("mmlu.abstract_algebra:0", True, "so \\boxed{B}", "B", "B", "B"),
        ("mmlu.abstract_algebra:0", False, "B", "B", "B", "B"),
        ("mmlu.abstract_algebra:0", True, "no idea", "", "", ""),
        ("gsm8k:0", True, "so 3*6=18 dollars", "3618", "18", "18"),
        ("gsm8k:0", True, "The answer is $1,018.", "1018", "018", "1018"),
        ("gsm8k:0", True, "it is -18", "18", "-18", "-18"),
        ("gsm8k:0", True, "The answer is 18. Not 20.", "20", "20", "18"),
        ("bbh.date_understanding:0", True, "So the answer is (B).", "B", "B", "B"),
        ("bbh.date_understanding:0", True, "Is it that the answer is (A)? No. So the answer is (B).", "A", "A", "B"),
        ("bbh.boolean_expressions:0", True, "So the answer is false.", "false", "false", "false"),
        ("math:0", True, "\\boxed{{2}}", "2", "2", "2"),
        ("agieval.gaokao-physics:0", True, "答案是A、C", "A", "A", "AC"),
        ("agieval.gaokao-mathcloze:1", True, "$5$;$10$", "5$;$10", "5$;$10", "5;10"),
    ],
)  # fmt: skip
def test_what_is_read_as_the_answer(case, sample):
    key, chat, output, *read = case
    for profile, extracted in zip(PROFILES, read, strict=True):
        found = verdict(key, output, sample, profile, chat=chat).extracted
        assert (profile, found.strip("$")) == (profile, extracted)


def test_an_answer_that_is_not_there_is_never_right(sample):
    for profile in PROFILES:
        for key in (
            "mmlu.abstract_algebra:0",
            "gsm8k:0",
            "math:0",
            "agieval.math:0",
            "agieval.gaokao-physics:0",
        ):
            assert not verdict(key, "", sample, profile).is_right, (profile, key)


def test_each_of_several_right_letters_is_right_when_mended(sample):
    key = "agieval.gaokao-mathqa:1"  # AD
    assert not verdict(key, "答案是A", sample, "card-2024-01").is_right
    assert verdict(key, "答案是A", sample, "fixed").is_right
    assert verdict(key, "D", sample, "fixed", chat=False).is_right
    assert not verdict(key, "答案是B", sample, "fixed").is_right


def test_capitals_count_under_the_card_only(sample):
    key = "bbh.boolean_expressions:0"
    gold = find_item(key, PROFILES["fixed"], sample, is_chat=True).gold
    assert verdict(key, f"the answer is {gold}.", sample, "card-2024-01").is_right
    assert not verdict(key, f"the answer is {gold.lower()}.", sample, "card-2024-01").is_right
    assert verdict(key, f"the answer is {gold.lower()}.", sample, "fixed").is_right


def test_the_program_that_is_run(sample):
    seen: list[tuple[str, str, list[str], float]] = []

    def run(program: str, timeout_seconds: float, *, tests: str, entry_points: Sequence[str]) -> bool:
        seen.append((program, tests, list(entry_points), timeout_seconds))
        return len(seen) % 2 == 1

    first = verdict("humaneval:0", "    return 1\n\n    x", sample, "card-2024-01", chat=False, run=run)
    assert (first.score, first.extracted, first.detail) == (1.0, "    return 1", "the tests passed")
    second = verdict(
        "sanitized_mbpp:7", "def f():\n  return f('\\d')\n[DONE]", sample, "card-2024-01", run=run
    )
    assert (second.score, second.extracted, second.detail) == (
        0.0,
        "def f():\n  return f('d')",
        "the tests failed",
    )
    humaneval, mbpp = seen
    item = find_item("humaneval:0", PROFILES["fixed"], sample, is_chat=False)
    source, name = item.fields["prompt"], "has_close_elements"
    assert humaneval[0] == f"{source}    return 1"
    assert humaneval[1] == f"{source.partition('def ')[0]}{item.fields['test']}\ncheck({name})"
    assert humaneval[2:] == ([name], 3.0)
    assert mbpp[0] == "def f():\n  return f('d')"
    problem = find_item("sanitized_mbpp:7", PROFILES["fixed"], sample, is_chat=False)
    assert mbpp[1:] == (problem.fields["tests"], ["remove_Occ"], 2.0)
    verdict("sanitized_mbpp:7", "def f():\n  return f('\\d')\n[DONE]", sample, "fixed", run=run)
    assert seen[2][0] == "\ndef f():\n  return f('\\d')"
    assert seen[2][3] == 20.0


@pytest.mark.parametrize(
    ("profile", "chat", "body"),
    [
        ("card-2024-01", False, "    a\n"),
        ("card-2024-01", True, "    a\n    b"),
        ("card-2024-02", False, "    a\n    b"),
        ("fixed", True, "    a\n\n    b\n"),
    ],
)
def test_which_truncation_a_profile_uses(profile, chat, body, sample):
    found = verdict(
        "humaneval:0", "    a\n\n    b\nc\n", sample, profile, chat=chat, run=lambda *_, **__: True
    )
    assert found.extracted.rstrip("\n") == body.rstrip("\n")


def test_a_program_without_a_runner_is_refused(sample):
    for key in ("humaneval:0", "sanitized_mbpp:7"):
        with pytest.raises(EvalError, match=f"{key} is scored by running a program. Give `run`"):
            verdict(key, "pass", sample, "fixed")


def test_the_first_of_equally_likely_labels_is_chosen():
    assert choose({"A": -2.0, "B": -1.0, "C": -1.0}) == "B"
    assert choose({"A": float("-inf"), "B": float("-inf")}) == "A"


def test_profiles_differ_as_documented():
    january, february, fixed = PROFILES.values()
    assert (january.min_tokens, february.min_tokens) == (3, 1)
    assert (january.max_context_tokens, fixed.max_context_tokens) == (2048, None)
    assert january.mends == february.mends == frozenset()
    assert fixed.mends == {mend.name for mend in MENDS}
    with pytest.raises(ConfigError, match=r"There is no profile 'card-2024'\. Did you mean 'card-2024-0"):
        find_profile("card-2024")


def test_every_mend_is_asked_for_by_a_task():
    from pathlib import Path

    import internlm2.eval

    room = Path(internlm2.eval.__file__).parent
    source = "".join(path.read_text() for path in (room / "tasks").rglob("*.py"))
    for mend in MENDS:
        if mend.name != "context":  # a limit of the profile, which whoever runs it keeps
            assert f'"{mend.name}" in ' in source, mend.name


# -- reference answers: what OpenCompass' own functions made of them on the same data ------------------------------


def reached(
    name: str, answer: Answer, data: DataFolder, profile: str, *, chat: bool, subsets=None
) -> tuple[int, int]:
    task = build(name, PROFILES[profile], is_chat=chat)
    verdicts = [
        task.score(item, answer(item)).is_right
        for subset in subsets or task.subsets
        for item in task.items(data, subset)
    ]
    return sum(verdicts), len(verdicts)


def boxed(item: Item) -> str:
    return f"so $\\boxed{{{item.gold}}}$."


def as_in_the_examples(item: Item) -> str:
    return f"So.\nFinal Answer: The final answer is ${item.gold}$. I hope it is correct.\n"


@pytest.mark.parametrize(
    ("profile", "chat", "answer", "right"),
    [
        ("card-2024-01", False, as_in_the_examples, 4614),
        ("card-2024-01", True, as_in_the_examples, 4613),
        ("card-2024-01", True, boxed, 5000),
        ("fixed", False, as_in_the_examples, 5000),
        ("fixed", True, boxed, 5000),
    ],
)
def test_math_of_reference_answers(profile, chat, answer, right, shared):
    assert reached("math", answer, shared, profile, chat=chat) == (right, 5000)


def test_math_solutions_with_boxes_mean_nothing_under_version_1(shared):
    problems = list(shared.json("math/math.json").values())
    items = list(build("math", PROFILES["card-2024-01"], is_chat=False).items(shared, ""))
    for chat, right in ((False, 94), (True, 5000)):
        task = build("math", PROFILES["card-2024-01"], is_chat=chat)
        verdicts = [task.score(i, p["solution"]).is_right for i, p in zip(items, problems, strict=True)]
        assert sum(verdicts) == right


@pytest.mark.parametrize(
    ("profile", "right"), [("card-2024-01", 1317), ("card-2024-02", 1319), ("fixed", 1319)]
)
def test_gsm8k_of_reference_answers(profile, right, shared):
    def answer(item: Item) -> str:
        return f"First.\nThe answer is {item.gold}\n"

    assert reached("gsm8k", answer, shared, profile, chat=True) == (
        right,
        1319,
    )  # two gold answers are negative


def test_bbh_of_reference_answers(shared):
    def answer(item: Item) -> str:
        return f"So the answer is {item.gold}."

    assert reached("bbh", answer, shared, "card-2024-01", chat=False, subsets=["ruin_names"]) == (248, 250)
    assert reached("bbh", answer, shared, "card-2024-01", chat=False) == (6509, 6511)
    assert reached("bbh", answer, shared, "fixed", chat=False) == (6511, 6511)


def test_agieval_of_reference_answers(shared):
    def dollars(item: Item) -> str:
        return "$" + item.gold.replace("$", "") + "$"

    def box(item: Item) -> str:
        return "\\boxed{" + item.gold.replace("$", "") + "}"

    for answer in (dollars, box):
        assert reached(
            "agieval", answer, shared, "card-2024-01", chat=True, subsets=["gaokao-mathcloze"]
        ) == (40, 118)
        assert reached("agieval", answer, shared, "fixed", chat=True, subsets=["gaokao-mathcloze"]) == (
            118,
            118,
        )

    def exact_box(item: Item) -> str:
        return f"\\boxed{{{item.gold}}}"

    assert reached("agieval", exact_box, shared, "card-2024-01", chat=True, subsets=["math"]) == (997, 1000)
    assert reached("agieval", lambda i: i.gold, shared, "card-2024-01", chat=True, subsets=["math"]) == (
        609,
        1000,
    )
    assert reached("agieval", exact_box, shared, "fixed", chat=True, subsets=["math"]) == (1000, 1000)
    said = "The answer is {}".format
    counted = reached(
        "agieval", lambda i: said(i.gold), shared, "card-2024-01", chat=True, subsets=["gaokao-mathqa"]
    )
    assert counted == (344, 351)  # seven have several right letters


def test_mmlu_of_sentences(shared):
    def answer(item: Item) -> str:
        return f"The answer is {item.gold}."

    assert reached("mmlu", answer, shared, "card-2024-01", chat=True) == (0, 14042)
    assert reached("mmlu", answer, shared, "card-2024-02", chat=True) == (14042, 14042)


def failing(name: str, answer: Answer, data: DataFolder, profile: str, *, chat: bool) -> set[int]:
    """The items whose program fails, in a plain process: the programs are the published references."""

    def run(program: str, timeout_seconds: float, *, tests: str, entry_points: Sequence[str]) -> bool:
        command = [sys.executable, "-I", "-S", "-"]
        whole = f"{program}\n{tests}".encode()
        try:
            done = subprocess.run(
                command, input=whole, capture_output=True, timeout=timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    task = build(name, PROFILES[profile], is_chat=chat)
    items = list(task.items(data, ""))
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda item: task.score(item, answer(item), run), items))
    return {item.index for item, verdict in zip(items, verdicts, strict=True) if not verdict.is_right}


SLOW_MBPP = 71  # takes 2 s and more, so that the machine decides


@pytest.mark.slow
def test_mbpp_of_reference_programs(shared):
    def answer(item: Item) -> str:
        return f"{item.gold}\n[DONE]"

    assert (
        len(failing("sanitized_mbpp", answer, shared, "card-2024-01", chat=False) | {SLOW_MBPP}) == 257 - 240
    )
    assert failing("sanitized_mbpp", answer, shared, "fixed", chat=False) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "chat", "body", "whole"),
    [("card-2024-01", False, 127, 44), ("card-2024-01", True, 153, 158), ("card-2024-02", False, 153, 158), ("fixed", True, 164, 164)],
)  # fmt: skip
def test_humaneval_of_reference_programs(profile, chat, body, whole, shared):
    def fenced(item: Item) -> str:
        return f"```python\n{item.fields['prompt']}{item.gold}```\n"

    assert 164 - len(failing("humaneval", lambda item: item.gold, shared, profile, chat=chat)) == body
    assert 164 - len(failing("humaneval", fenced, shared, profile, chat=chat)) == whole


# -- the same in the sandbox, where tests and program are two processes ----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "profile", "chat", "right"),
    [
        ("sanitized_mbpp", "card-2024-01", False, 240),
        ("sanitized_mbpp", "fixed", False, 257),
        ("humaneval", "card-2024-01", False, 127),
        ("humaneval", "card-2024-01", True, 153),
        ("humaneval", "fixed", True, 164),
    ],
)
def test_reference_programs_score_the_same_in_the_sandbox(name, profile, chat, right, shared):
    task = build(name, PROFILES[profile], is_chat=chat)
    items = list(task.items(shared, ""))
    ending = "\n[DONE]" if name == "sanitized_mbpp" else ""
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda item: task.score(item, item.gold + ending, run_in_sandbox), items))
    failed = {item.index for item, one in zip(items, verdicts, strict=True) if not one.is_right}
    if (name, profile) == ("sanitized_mbpp", "card-2024-01"):
        failed.add(SLOW_MBPP)
    assert len(items) - len(failed) == right, sorted(failed)
