"""Prompts: byte-equal to OpenCompass' own, in every profile, and cut the way a context limit asks for."""

import hashlib
import re

import pytest

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.profile import PROFILES
from internlm2.eval.task import EvalError, Item
from internlm2.eval.tasks import CARD_TASKS, TASKS, build, find_item

JANUARY = PROFILES["card-2024-01"]

# length and sha256 of prompts of OpenCompass of 2024-01-17
SUMS = """
mmlu.abstract_algebra.0.base.ppl.A 996 8e0e54f9c922c076
mmlu.abstract_algebra.0.chat.gen 1932 2fbeb03cc747ec15
agieval.gaokao-geography.0.base.ppl.A 115 41883dcd7ba3e575
agieval.lsat-ar.0.base.ppl.A 1436 430f39c54894886a
agieval.jec-qa-kd.0.base.gen 348 40ffc6b18d15771b
agieval.gaokao-mathcloze.0.base.gen 173 21441a3486c386ed
agieval.math.0.base.gen 341 7094e4c63ac25417
agieval.gaokao-geography.0.chat.gen 165 6bd9fe6fa0ce8a64
agieval.lsat-ar.0.chat.gen 1485 5a7dc782c3fb4e04
agieval.jec-qa-kd.0.chat.gen 398 9c1562bdd04daafd
agieval.gaokao-mathcloze.0.chat.gen 225 0a5741da50f6c847
agieval.math.0.chat.gen 392 7b41cf9e22161b52
bbh.date_understanding.0.base.gen 1422 b4e6fe647d1a5f5e
bbh.date_understanding.0.chat.gen 1472 82f29a183ca55cfd
bbh.boolean_expressions.0.base.gen 1893 9927f0a4d46a1ad1
bbh.boolean_expressions.0.chat.gen 1943 f659c5c8a38fb909
gsm8k.0.base.gen 4928 86493f6e082a55fb
gsm8k.0.chat.gen 5214 9dfb6afe6bd89537
math.0.base.gen 1948 b2dff36f34f14e40
math.0.chat.gen 2234 160eb870ecf7f0c0
humaneval.0.base.gen 348 00b2e074e127a6a9
humaneval.0.chat.gen 434 e9809c3226157138
sanitized_mbpp.7.base.gen 1864 bd0792cc51fabb94
sanitized_mbpp.7.chat.gen 2082 53819ea7311ead21
"""
NEEDS_ALL = "jec-qa"  # not among the samples


def rendered(key: str, data: DataFolder, profile: str) -> str:
    """The prompt that a golden key such as "mmlu.anatomy.0.base.ppl.A" names."""
    parts = re.fullmatch(r"(.+)\.(\d+)\.(base|chat)\.(ppl|gen)(?:\.(\w))?", key)
    assert parts is not None
    item = find_item(f"{parts[1]}:{parts[2]}", PROFILES[profile], data, is_chat=parts[3] == "chat")
    assert bool(item.labels) == (parts[4] == "ppl")
    return item.text(parts[5])


@pytest.mark.parametrize("profile", PROFILES)
def test_prompts_are_byte_equal_to_opencompass(profile, sample, golden_prompts):
    assert len(golden_prompts) == 24
    for key, prompt in golden_prompts.items():
        assert rendered(key, sample, profile) == prompt, key


def _check_sum(line: str, data: DataFolder) -> None:
    key, num_characters, start = line.split()
    prompt = rendered(key, data, "card-2024-01")
    assert len(prompt) == int(num_characters)
    assert hashlib.sha256(prompt.encode()).hexdigest().startswith(start)


@pytest.mark.parametrize("line", [line for line in SUMS.split("\n") if line and NEEDS_ALL not in line])
def test_prompt_sums(line, sample):
    _check_sum(line, sample)


@pytest.mark.parametrize("line", [line for line in SUMS.split("\n") if NEEDS_ALL in line])
def test_prompt_sums_of_sets_that_are_not_in_the_samples(line, shared):
    _check_sum(line, shared)


def item(key: str, data: DataFolder, *, chat: bool = False) -> Item:
    return find_item(key, JANUARY, data, is_chat=chat)


def test_fewer_examples_drop_the_last_ones_and_nothing_else(sample):
    base = item("mmlu.abstract_algebra:1", sample).prompt
    whole = base.text
    assert len(base.shots) == 5
    for count in (4, 2, 1):
        short = base.with_shots(count)
        assert short.text == base.head + "".join(base.shots[:count]) + base.tail
        assert short.text.count("Answer: ") == count + 1
        assert "\n\n\n" not in short.text
    assert base.with_shots(5).text == whole
    assert base.with_shots(0).text.startswith(
        base.head + "\nLet p = (1, 2, 5, 4)"
    )  # as OpenCompass leaves it
    chat = item("mmlu.abstract_algebra:1", sample, chat=True).prompt
    assert [turn.role for turn in chat.with_shots(2).turns] == ["user", "assistant"] * 2 + ["user"]


def test_the_tenth_example_of_a_file_is_not_used(sample):
    assert len((sample.path / "mmlu/dev/abstract_algebra_dev.csv").read_text().splitlines()) == 5
    assert len(item("mmlu.abstract_algebra:0", sample).prompt.shots) == 5


def test_messages_are_the_turns_without_a_system_message(sample):
    prompt = item("sanitized_mbpp:7", sample, chat=True).prompt
    assert [message["role"] for message in prompt.messages] == ["user", "assistant"] * 3 + ["user"]
    assert prompt.messages[1]["content"].startswith("[BEGIN]\n 'def similar_elements")
    assert "\r\n" in prompt.messages[1]["content"]
    assert prompt.messages[-1]["content"].endswith("  \n")  # the begun answer is dropped
    assert prompt.text == "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in prompt.messages
    ) + "<|im_start|>assistant\n"  # fmt: skip


def test_hints_of_agieval_are_spaced_as_the_configurations_have_them(sample):
    ends = {
        ("gaokao-geography", False): "\n答案是：",
        ("gaokao-geography", True): "\n答案是： ",
        ("gaokao-physics", False): "\n答案是： ",
        ("gaokao-mathcloze", True): "\n答案是： ",
        ("sat-math", False): "\nThe answer is ",
    }
    for (subset, chat), end in ends.items():
        prompt = item(f"agieval.{subset}:0", sample, chat=chat).prompt
        text = prompt.turns[-1].content if chat else prompt.text
        assert text.endswith(end)
    assert not item("agieval.gaokao-mathcloze:0", sample).text().endswith("\n答案是：")


def test_how_long_answers_may_be_and_where_they_stop(sample):
    lengths = {"mmlu.abstract_algebra:0": 100, "agieval.math:0": 1024, "bbh.date_understanding:0": 512, "gsm8k:0": 512,
               "math:0": 512, "humaneval:0": 512, "sanitized_mbpp:7": 512}  # fmt: skip
    for key, max_tokens in lengths.items():
        assert item(key, sample, chat=True).max_tokens == max_tokens
        assert item(key, sample, chat=True).early_stop == ()
    assert item("gsm8k:0", sample).stop == ("\n\n",)
    assert find_item("gsm8k:0", PROFILES["card-2024-02"], sample, is_chat=True).stop == ("Question:",)
    assert item("math:0", sample).stop == ()
    assert item("math:0", sample).early_stop == ("\nProblem:",)
    assert find_item("math:0", PROFILES["fixed"], sample, is_chat=False).stop == ("\nProblem:",)


@pytest.mark.parametrize("profile", ["card-2024-01", "card-2024-02"])
@pytest.mark.parametrize(
    "output",
    ["It is 4\n\nQuestion: 5", "4\nQuestion: how 7\n\n8", "Question: 3", "", "\n\n9", "1.5. x\n\n\n2"],
)
def test_stops_of_the_card_profiles_leave_the_score_alone(profile, output, sample):
    task = build("gsm8k", PROFILES[profile], is_chat=False)
    question = next(iter(task.items(sample, "")))
    cut = min((output.partition(stop)[0] for stop in question.stop), key=len)
    assert task.score(question, cut) == task.score(question, output)


def test_every_benchmark_names_its_files(sample):
    for name in CARD_TASKS:
        task = build(name, JANUARY, is_chat=False)
        for subset in task.subsets:
            for file in task.files(subset):
                assert not file.startswith("/")
    assert (len(build("mmlu", JANUARY, is_chat=False).subsets), len(TASKS)) == (57, 18)
    assert len(build("agieval", JANUARY, is_chat=False).subsets) == 21
    assert len(build("bbh", JANUARY, is_chat=False).subsets) == 27
    assert len(build("ceval", JANUARY, is_chat=False).subsets) == 52
    assert len(build("cmmlu", JANUARY, is_chat=False).subsets) == 67


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("gsm8k", "'gsm8k' names no item. Write TASK:INDEX"),
        ("gsm8q:0", "There is no benchmark 'gsm8q'. Did you mean 'gsm8k'"),
        ("gsm8k.x:0", "gsm8k has no subsets. Write gsm8k:0"),
        ("mmlu:0", "mmlu has subsets. Write one, such as mmlu.college_biology:0"),
        ("mmlu.abstract_algbra:0", "Did you mean 'abstract_algebra'"),
        ("gsm8k:3", "gsm8k:3 is not there: the items of gsm8k end at 2"),
        ("sanitized_mbpp:0", "sanitized_mbpp:0 is not there: the items of sanitized_mbpp end at 11"),
    ],
)
def test_a_key_that_names_nothing_is_refused(key, message, sample):
    with pytest.raises(EvalError, match=re.escape(message)):
        item(key, sample)


def test_a_benchmark_without_rows_says_so(tmp_path, sample):
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "human-eval-v2-20210705.jsonl").write_text("")
    with pytest.raises(EvalError, match="humaneval is empty"):
        item("humaneval:0", DataFolder(tmp_path))


def test_a_label_that_does_not_belong_is_refused(sample):
    with pytest.raises(EvalError, match="must be one of A, B, C, D"):
        item("mmlu.abstract_algebra:0", sample).text("E")
    with pytest.raises(EvalError, match="must be left out: the answer is generated"):
        item("gsm8k:0", sample).text("A")


def test_cards_benchmarks_have_the_published_number_of_items(shared):
    counts = {
        "mmlu": 14042,
        "agieval": 8269,
        "bbh": 6511,
        "gsm8k": 1319,
        "math": 5000,
        "humaneval": 164,
        "sanitized_mbpp": 257,
    }
    for name, count in counts.items():
        task = build(name, JANUARY, is_chat=False)
        assert sum(1 for subset in task.subsets for _ in task.items(shared, subset)) == count
