"""LongBench and L-Eval: prompts, verdicts, averages, and what happens to prompts that are too long."""

import json

import pytest
from long_data import write, write_rows

from internlm2.eval.data.folder import DataError, DataFolder
from internlm2.eval.metrics import summarise
from internlm2.eval.model import Request, ScriptedModel, fit
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import RunSettings, choose_questions
from internlm2.eval.runner import evaluate, request_of
from internlm2.eval.task import ChatPrompt, EvalError, TextPrompt
from internlm2.eval.tasks import build, find_item
from internlm2.eval.tasks.long.longbench import GROUPS, PLAIN

CARD, FIXED = find_profile("card-2024-02"), find_profile("fixed")
CLASSES = ["City", "City state", "Food", "Sport"]
GOLD = {
    "trec": "City state",
    "lsht": "Sport",
    "passage_count": "17",
    "passage_retrieval_en": "Paragraph 3",
    "passage_retrieval_zh": "段落27",
    "lcc": "    return x + 1",
    "repobench-p": "import os.path",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataFolder:
    path = tmp_path_factory.mktemp("long")
    tasks = [task for group in GROUPS.values() for task in group]
    prompts = {task: f"Task {task}.\n{{context}}\n{{input}}\nAnswer:" for task in tasks}
    prompts["narrativeqa"] = "Be asconcisely as {context} you can. {input}"
    lengths = {task: 32 if task == "hotpotqa" else 128 for task in tasks}
    write(path / "LongBench/dataset2prompt.json", json.dumps(prompts))
    write(path / "LongBench/dataset2maxlen.json", json.dumps(lengths))
    for task in tasks:
        gold = GOLD.get(
            task, "上海 人工智能实验室" if task.endswith(("zh", "dureader", "vcsum")) else "The blue whale"
        )
        row = {
            "input": "Why {context}?", "context": "A long text with {input} in it.", "answers": [gold, "no"],
            "length": 9, "all_classes": CLASSES if task in ("trec", "lsht") else None,
        }  # fmt: skip
        if task.startswith("passage"):
            row["answers"] = [gold]
        write_rows(path / f"LongBench/{task}.jsonl", [row, row])
    for task, answer, kind in (
        ("Closed-ended-tasks/coursera", "BD", "exam"),
        ("Closed-ended-tasks/quality", "(B) because of it", "exam"),
        ("Closed-ended-tasks/tpo", "C", "exam"),
        ("Closed-ended-tasks/gsm100", "1,200", "exam"),
        ("Closed-ended-tasks/topic_retrieval_longchat", "The role of art", "exam"),
        ("Open-ended-tasks/natural_question", "April 25 , 2018", "f1"),
        ("Open-ended-tasks/news_summ", "a b c d", "rouge"),
    ):
        rows = [
            {"input": "Doc.", "instructions": ["Q1", "Q2"], "outputs": [answer, answer], "evaluation": kind}
        ]
        write_rows(path / f"LEval/{task}.jsonl", rows * 2)
    return DataFolder(path)


def score(data: DataFolder, key: str, answer: str, profile=FIXED) -> float:
    name = key.partition(".")[0]
    return build(name, profile, is_chat=True).score(find_item(key, profile, data, is_chat=True), answer).score


# -- LongBench -----------------------------------------------------------------------------------------------


def test_there_are_21_tasks_in_six_groups():
    task = build("longbench", CARD, is_chat=True)
    assert len(task.subsets) == len(set(task.subsets)) == 21
    verdicts = {name: [float(name in GROUPS["code"])] for name in task.subsets}
    rows, _ = summarise(task.averages, verdicts)
    assert rows["longbench"].percent == pytest.approx(100 / 6)  # the mean of six means
    assert rows["longbench-tasks"].percent == pytest.approx(100 * 2 / 21)
    assert rows["longbench-code"].percent == 100.0
    del verdicts["lcc"]
    assert "longbench" not in summarise(task.averages, verdicts)[0]


def test_prompts_come_from_the_file_beside_the_data(data):
    text = find_item("longbench.musique:1", FIXED, data, is_chat=False).text()
    # what stands in a value is not filled again
    assert text == "Task musique.\nA long text with {input} in it.\nWhy {context}?\nAnswer:"


def test_opencompass_asks_three_tasks_otherwise(data):
    qasper = find_item("longbench.qasper:0", CARD, data, is_chat=False)
    assert (qasper.text()[:13], qasper.max_tokens) == ("Task hotpotqa", 32)
    own = find_item("longbench.qasper:0", FIXED, data, is_chat=False)
    assert (own.text()[:11], own.max_tokens) == ("Task qasper", 128)
    assert "Be as concisely as " in find_item("longbench.narrativeqa:0", CARD, data, is_chat=False).text()
    assert "Be asconcisely as " in find_item("longbench.narrativeqa:0", FIXED, data, is_chat=False).text()
    assert find_item("longbench.multi_news:0", CARD, data, is_chat=False).text().endswith("Answer:\n")
    assert find_item("longbench.multi_news:0", FIXED, data, is_chat=False).text().endswith("Answer:")


def test_longbench_continues_lists_and_code_as_text_and_cuts_the_middle(data):
    for task in build("longbench", FIXED, is_chat=True).subsets:
        ours = find_item(f"longbench.{task}:0", FIXED, data, is_chat=True)
        theirs = find_item(f"longbench.{task}:0", CARD, data, is_chat=True)
        assert isinstance(ours.prompt.written(), TextPrompt if task in PLAIN else ChatPrompt)
        assert isinstance(theirs.prompt.written(), ChatPrompt)
        assert ours.cuts_middle
        assert not theirs.cuts_middle
        assert ours.is_long
        assert theirs.is_long


def test_right_answers_reach_everything_and_others_their_share(data):
    for task in build("longbench", FIXED, is_chat=True).subsets:
        gold = find_item(f"longbench.{task}:0", FIXED, data, is_chat=True).gold
        for profile in (CARD, FIXED):
            assert score(data, f"longbench.{task}:0", gold, profile) == pytest.approx(1.0, abs=1e-6), task
            assert score(data, f"longbench.{task}:0", "", profile) == 0.0
    assert score(data, "longbench.passage_retrieval_zh:0", "段落27，不是段落3") == 0.5
    assert score(data, "longbench.passage_count:0", "17 of 30, 17") == pytest.approx(2 / 3)
    assert score(data, "longbench.trec:0", "\nCity state or Food\nSport") == 0.5
    assert score(data, "longbench.samsum:0", "The blue whale\nand much more that is wrong") == pytest.approx(
        1.0
    )
    assert score(data, "longbench.qmsum:0", "The blue whale\nand much more that is wrong") < 0.7
    assert score(data, "longbench.hotpotqa:0", "a BLUE whale!") == 1.0
    assert score(data, "longbench.hotpotqa:0", "no") == 1.0  # the second gold answer
    assert score(data, "longbench.multifieldqa_zh:0", "上海。人工智能，实验室") == 1.0


def test_a_damaged_longbench_is_told(tmp_path, data):
    write(tmp_path / "LongBench/dataset2prompt.json", "{}")
    write(tmp_path / "LongBench/dataset2maxlen.json", '{"lcc": 64, "trec": "x"}')
    with pytest.raises(DataError, match="no prompt for lcc"):
        find_item("longbench.lcc:0", FIXED, DataFolder(tmp_path), is_chat=True)
    write(tmp_path / "LongBench/dataset2prompt.json", '{"lcc": "{context}", "trec": "{context}"}')
    with pytest.raises(DataError, match="no number for trec"):
        find_item("longbench.trec:0", FIXED, DataFolder(tmp_path), is_chat=True)
    row = {"input": "", "context": "", "answers": [], "length": 0, "all_classes": None}
    write_rows(tmp_path / "LongBench/lcc.jsonl", [row])
    with pytest.raises(DataError, match="line 1 has no list of answers"):
        find_item("longbench.lcc:0", FIXED, DataFolder(tmp_path), is_chat=True)
    write(tmp_path / "LongBench/dataset2prompt.json", '{"passage_retrieval_en": "{context}"}')
    write(tmp_path / "LongBench/dataset2maxlen.json", '{"passage_retrieval_en": 32}')
    write_rows(tmp_path / "LongBench/passage_retrieval_en.jsonl", [row | {"answers": ["Chapter 3"]}])
    with pytest.raises(EvalError, match="'Chapter 3', which names no paragraph"):
        score(DataFolder(tmp_path), "longbench.passage_retrieval_en:0", "3")


def test_the_published_files_give_the_protocol(shared):
    for name in ("multifieldqa_zh", "multi_news", "passage_retrieval_zh"):
        items = list(build("longbench", FIXED, is_chat=True).items(shared, name))
        assert len(items) == 200
        assert all(score(shared, item.key, item.gold) > 0.999 for item in items[:3])
    item = find_item("longbench.multifieldqa_zh:0", FIXED, shared, is_chat=False)
    assert item.max_tokens == 64
    assert item.text().startswith("阅读以下文字并用中文简短回答：\n\n全国美国文学研究会")
    assert item.text().endswith("问题：全国美国文学研究会的第十八届年会在哪所大学举办的？\n回答：")


# -- L-Eval --------------------------------------------------------------------------------------------------


def test_leval_asks_with_a_turn_for_the_system_and_the_length_of_the_gold(data):
    item = find_item("leval.natural_question:3", CARD, data, is_chat=True)
    first, second = item.prompt.written().turns
    assert (first.role, second.role) == ("user", "user")
    assert first.content.startswith(
        "Now you are given a very long document. Please follow the instruction after this"
    )
    assert (
        second.content == "Document is as follows. Doc.\nInstruction: Q2?\nAnswer this question with 4 words."
    )
    assert item.max_tokens == 50
    text = find_item("leval.gsm100:0", CARD, data, is_chat=False).text()
    assert text.endswith("The answer is _ . \nDoc.\n\nQ1\n")
    choice = find_item("leval.coursera:0", CARD, data, is_chat=False)
    assert choice.text().endswith(
        "(like A or AB) when answering.\nDocument is as follows.\nDoc.\nQuestion:Q1\nAnswer:"
    )
    assert len(build("leval", CARD, is_chat=True).subsets) == 18


@pytest.mark.parametrize(
    ("key", "answer", "card", "fixed"),
    [
        ("leval.coursera:0", "BD", 1.0, 1.0),
        ("leval.coursera:0", "B, D", 0.0, 0.25),
        ("leval.coursera:0", "B. this. D. that", 0.0, 1.0),
        ("leval.coursera:0", "B", 0.0, 0.25),
        ("leval.coursera:0", "ABD", 0.0, 0.0),
        ("leval.coursera:0", "", 0.0, 0.0),
        ("leval.quality:0", "(B) because", 1.0, 1.0),
        ("leval.quality:0", "Because B", 1.0, 1.0),
        ("leval.tpo:0", "Yes, C", 0.0, 1.0),
        ("leval.tpo:0", "C", 1.0, 1.0),
        ("leval.gsm100:0", "so The answer is $1,200 .", 1.0, 1.0),
        ("leval.gsm100:0", "so The answer is 1200.00", 0.0, 1.0),
        ("leval.gsm100:0", "It is 1200", 0.0, 1.0),
        ("leval.topic_retrieval_longchat:0", "The first topic is the role of art, I think.", 1.0, 1.0),
        ("leval.topic_retrieval_longchat:0", "First. The role of art", 0.0, 1.0),
        ("leval.topic_retrieval_longchat:0", "The role of music", 0.0, 0.0),
        ("leval.natural_question:0", "april 25 2018", 1.0, 1.0),
        ("leval.news_summ:0", "d c b a", 1.0, 0.25),
        ("leval.news_summ:0", "", 0.0, 0.0),
    ],
)
def test_leval_reads_answers_as_opencompass_or_as_itself(data, key, answer, card, fixed):
    assert score(data, key, answer, CARD) == pytest.approx(card)
    assert score(data, key, answer, FIXED) == pytest.approx(fixed)


def test_sci_fi_asks_in_the_story_and_in_the_world(tmp_path):
    """As L-Eval's Baselines do: the second question stands behind the first, without an answer to it."""
    question = (
        "Men live on Mars, True or False? Answer this question based on the world described in the document."
    )
    row = {"input": "Doc.", "instructions": [question] * 2, "evaluation": "exam"}
    row["outputs"] = ["True [fact: False]", "False [fact: True]"]
    write_rows(tmp_path / "LEval/Closed-ended-tasks/sci_fi.jsonl", [row])
    data = DataFolder(tmp_path)
    items = list(build("leval", FIXED, is_chat=True).items(data, "sci_fi"))
    assert [(item.index, item.gold) for item in items] == [
        (0, "true"),
        (1, "false"),
        (2, "false"),
        (3, "true"),
    ]
    story, world = (item.prompt.written().turns for item in items[:2])
    assert story == world[:2]
    assert story[0].content.startswith("Now you are given a scientific fiction.")
    assert story[1].content == (
        f"Document is as follows. Doc. Question: {question} \n"
        "Please directly give answer without any additional output or explanation\n Answer: "
    )
    assert world[2].content == (
        "Men live on Mars, True or False? Answer this question based on the real-world knowledge and facts up until "
        "your last training\nPlease directly give answer without any additional output or explanation \nAnswer:"
    )
    task = build("leval", FIXED, is_chat=True)
    for output, right in (
        ("True", 1),
        ("It's TRUE. Not false", 1),
        ("false, not true", 0),
        ("", 0),
        ("yes", 0),
    ):
        assert task.score(items[0], output).score == right
        assert task.score(items[1], output).score == (output.startswith("false"))
    assert "sci_fi" not in build("leval", CARD, is_chat=True).subsets, "OpenCompass has no such task"
    assert len(task.subsets) == 19


def test_damaged_leval_files_are_told(tmp_path):
    row = {"input": "", "instructions": ["a"], "outputs": [], "evaluation": "exam"}
    write_rows(tmp_path / "LEval/Closed-ended-tasks/tpo.jsonl", [row])
    with pytest.raises(DataError, match="line 1 has 1 questions, but 0 answers"):
        find_item("leval.tpo:0", CARD, DataFolder(tmp_path), is_chat=True)
    write_rows(tmp_path / "LEval/Closed-ended-tasks/tpo.jsonl", [row | {"outputs": "a"}])
    with pytest.raises(DataError, match="line 1 has no lists"):
        find_item("leval.tpo:0", CARD, DataFolder(tmp_path), is_chat=True)


def test_the_published_leval_is_whole(shared):
    task = build("leval", FIXED, is_chat=True)
    there = [name for name in task.subsets if name != "narrative_qa"]
    counts = {name: sum(1 for _ in task.items(shared, name)) for name in there}
    assert (counts["coursera"], counts["gsm100"], counts["topic_retrieval_longchat"]) == (172, 100, 150)
    for name in there:
        item = next(iter(task.items(shared, name)))
        assert task.score(item, item.gold).score == pytest.approx(1.0), name
    with pytest.raises(DataError, match=r"narrative_qa.jsonl is not in the data folder"):
        list(task.items(shared, "narrative_qa"))


# -- room ----------------------------------------------------------------------------------------------------


def test_the_middle_goes_or_the_beginning_and_it_is_counted(data):
    item = find_item("longbench.musique:0", FIXED, data, is_chat=False)
    request = request_of(item, FIXED, RunSettings())
    assert request.cuts_middle
    prompt = TextPrompt("", "0123456789")

    def encode(prompt, label):
        return [0, *map(ord, prompt.text)]

    def cut(room: int, *, cuts_middle: bool) -> tuple[list[int], int]:
        one = Request("x", prompt, max_tokens=5, cuts_middle=cuts_middle)
        fitted = fit(one, encode, max_model_len=room + 5, num_start=1)
        return fitted.token_ids[0], fitted.cut_tokens

    assert cut(6, cuts_middle=True) == ([0, *map(ord, "01789")], 5)
    assert cut(5, cuts_middle=True) == ([0, *map(ord, "0189")], 6)
    assert cut(6, cuts_middle=False) == ([0, *map(ord, "56789")], 5)
    assert cut(11, cuts_middle=True)[1] == 0


def test_a_run_over_both_keeps_whole_prompts_and_ignores_the_limit_of_the_card(data, tmp_path):
    settings = RunSettings(("longbench", "leval.tpo"), "card-2024-02", is_chat=True)
    parts = choose_questions(data, CARD, settings)
    gold = {item.key: item.gold for part in parts for item in part.items}

    def script(request: Request) -> str:
        assert request.max_context_tokens is None
        return gold[request.key]

    results = evaluate(ScriptedModel(script), parts, tmp_path / "run", settings)
    assert results.tasks["longbench"].rows["longbench"].percent == pytest.approx(100, abs=1e-4)
    assert results.tasks["leval"].subsets["tpo"].percent == 100.0
    line = json.loads((tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert "Task narrativeqa" not in line["prompt"]
    assert line["prompt"].startswith("<|im_start|>user\nBe as concisely as A long text with {input} in it.")
