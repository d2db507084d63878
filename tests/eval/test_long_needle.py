"""Needle in a haystack: where needles lie, what answers are worth, and that 40,000 prompts need no room."""

import random
import time
import tracemalloc

import pytest
from long_data import ESSAYS, REAL_TOKENIZER, haystack_folder, write, write_rows

from internlm2.eval import overlap
from internlm2.eval.data.folder import DataError, DataFolder
from internlm2.eval.model import ScriptedModel
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import RunSettings, choose_questions
from internlm2.eval.results import Results
from internlm2.eval.run_folder import read_samples
from internlm2.eval.runner import evaluate, request_of
from internlm2.eval.task import ChatPrompt, EvalError, Item, TextPrompt
from internlm2.eval.tasks import build, find_item
from internlm2.eval.tasks.long.grid import grid, is_grid
from internlm2.eval.tasks.long.haystack import place_at, place_several
from internlm2.eval.tasks.long.needle import Cell
from internlm2.eval.tasks.long.needle_forms import FORMS, JANUARY_NEEDLE, linear
from internlm2.tokenizer import Tokenizer

CARD, FIXED = find_profile("card-2024-01"), find_profile("fixed")
NEEDLE = "\n小明最喜欢的实习的地点就是上海人工智能实验室。\n"
ASKED = "小明最喜欢的实习地点就是上海人工智能实验室。"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataFolder:
    return haystack_folder(tmp_path_factory.mktemp("needle"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder / "tokenizer.model", REAL_TOKENIZER.read_bytes())
    return Tokenizer.from_pretrained(folder)


def item_of(data: DataFolder, key: str, profile=CARD, *, chat: bool = False) -> Item:
    return find_item(key, profile, data, is_chat=chat)


# -- the grid -----------------------------------------------------------------------------------------------


def test_the_grids_are_those_of_the_protocols():
    depths = (0, 5, 10, 15, 21, 26, 31, 36, 42, 47, 52, 57, 63, 68, 73, 78, 84, 89, 94, 100)
    january = FORMS["needle"]
    assert january.depths == depths
    assert (january.lengths[0], january.lengths[-1], len(january.lengths)) == (1000, 200_000, 200)
    assert len(january.lengths) * len(january.depths) * january.num_repeats == 40_000
    assert len(FORMS["needlebench"].lengths) == 8
    assert len(FORMS["needle_en"].lengths) == len(set(FORMS["needle_en"].depths)) == 35
    assert linear(35, is_rounded=True)[:4] == (0, 3, 6, 9)


def test_every_cell_is_a_subset_with_rows_for_lengths():
    task = build("needlebench", CARD, is_chat=True)
    assert task.subsets[0] == "en-16000-0"
    rows = {row.name: row.subsets for row in task.averages}
    assert len(rows["needlebench"]) == 2 * 8 * 11
    assert len(rows["needlebench-zh"]) == 8 * 11
    assert rows["needlebench-en-48000"][1] == "en-48000-10"
    assert Cell.of("zh-48000-10") == Cell(48_000, 10, "zh")


# -- where needles lie, against the protocols written out plainly ------------------------------------------


def plain_january(lines: list[str], encode, cell: str, repeat: int, *, needles: list[str], step: int = 0):
    """The tokens with their needles, made anew for each prompt; as OpenCompass' loops have it."""
    length, depth = map(int, cell.split("-"))
    lines = lines.copy()
    for seed in range(repeat + 1):
        random.seed(seed)
        random.shuffle(lines)
    pieces = [encode(one) for one in needles]
    count = length - 200 - sum(map(len, pieces))
    tokens: list[int] = []
    for line in lines:
        tokens.extend(encode(line))
        if len(tokens) >= count:
            break
    tokens = tokens[:count]
    total, points = len(tokens), []
    for i in range(len(pieces)):
        at = (
            int(total * (depth / 100))
            if i == 0
            else int(points[i - 1] + len(pieces[i - 1]) + total * (step / 100))
        )
        points.append(min(at, total + sum(len(piece) for piece in pieces[:i])))
    for i, piece in enumerate(pieces):
        tokens = tokens[: points[i]] + piece + tokens[points[i] :]
        for j in range(i + 1, len(points)):
            points[j] += len(piece)
    return tokens


@pytest.mark.parametrize("cell", ["1000-0", "1000-100", "2000-47", "7000-5"])
@pytest.mark.parametrize("profile", [CARD, FIXED])
def test_the_needle_stands_at_the_exact_token(data, tokenizer, profile, cell):
    lines = [str(row["text"]) for row in data.rows("CDME/zh_finance.jsonl", ("text",))]
    encode = tokenizer.encode if profile is FIXED else lambda text: list(text.encode())
    for repeat in (0, 3):
        tokens = plain_january(lines, encode, cell, repeat, needles=[NEEDLE])
        document = tokenizer.decode(tokens) if profile is FIXED else bytes(tokens).decode(errors="replace")
        text = item_of(data, f"needle_8k.{cell}:{repeat}", profile).text()
        assert text == (
            "你是一个善于回答用户问题的智能AI助手\n请保持你的回答简洁清楚。不要说和下面文档中的无关的话，或重复你的回答\n"
            f"用户现在给你的文档是{document}\n\n现在请问：小明最喜欢的实习地点是哪里？"
            "在回答之前，请思考文档中与此问题最相关的内容是什么。请按照“小明最喜欢的实习地点就是________。”的格式回答。"
        )
        assert len(tokens) == Cell.of(cell).length - 200


@pytest.mark.parametrize("cell", ["1000-0", "3000-63", "4000-94", "4000-100"])
def test_two_needles_stand_where_opencompass_puts_them(data, tokenizer, cell):
    lines = [str(row["text"]) for row in data.rows("CDME/zh_finance.jsonl", ("text",))]
    needles = list(FORMS["needle_multi"].needle.texts)
    tokens = plain_january(lines, tokenizer.encode, cell, 1, needles=needles, step=25)
    text = item_of(data, f"needle_multi.{cell}:1", FIXED).text()
    assert f"用户现在给你的文档是{tokenizer.decode(tokens)}\n\n现在请问：" in text
    assert text.count("松露奶酪通心粉") == 1
    assert text.index("La Giostra") < text.index("松露奶酪通心粉")


def test_points_are_counted_in_the_result():
    from array import array

    tokens = array("i", range(100, 200))
    placed = place_at(tokens, [1, 2], 47)
    assert placed.points == (47,)
    assert list(placed.tokens[45:51]) == [145, 146, 1, 2, 147, 148]
    several = place_several(tokens, [[1, 2], [3], [4]], 90, 25)
    assert [several.tokens[point] for point in several.points] == [1, 3, 4]
    assert sorted(several.tokens) == sorted([*tokens, 1, 2, 3, 4])


@pytest.mark.parametrize("cell", ["1000-0", "6853-50", "6853-97", "6853-100"])
def test_the_english_needle_stands_behind_a_full_stop(data, tokenizer, cell):
    needle = FORMS["needle_en"].needle.texts[0]
    essays = "".join(data.text(name) for name in ESSAYS)
    length, depth, piece = Cell.of(cell).length, Cell.of(cell).depth, tokenizer.encode(needle)
    tokens = (tokenizer.encode(essays) * 9)[: length - 200 - len(piece)]
    point = len(tokens) if depth == 100 else int(len(tokens) * (depth / 100))
    while 0 < point < len(tokens) and tokens[point - 1] not in tokenizer.encode("."):
        point -= 1
    document = tokenizer.decode(tokens[:point] + piece + tokens[point:])
    assert item_of(data, f"needle_en.{cell}:0", FIXED).text() == (
        "You are a helpful AI bot that answers questions for a user. Keep your response short and direct\n"
        f"{document}\nWhat is the best thing to do in San Francisco? "
        "Don't give information outside the document or repeat your findings"
    )
    if 0 < depth < 100:
        assert f"matters a lot.{needle}" in document
        assert 0 <= int(len(tokens) * (depth / 100)) - point < 20


def test_needlebench_draws_a_needle_for_each_repeat(data, tmp_path):
    folder = haystack_folder(tmp_path, count=600, num_words=60)
    rows = [row for row in data.rows("needlebench/needles.jsonl", ()) if row["language"] == "English"]
    for repeat in (0, 7):
        drawn = random.Random(repeat).choice(rows)
        item = item_of(folder, f"needlebench.en-16000-52:{repeat}", chat=True)
        text = item.text()
        assert text.count(drawn["needle"]) == 1
        assert text.endswith(
            f"Now, the question is: {drawn['retrieval_question'].split('Please')[0]}Before answering, please consider what "
            "in the document is most relevant to this question. Please answer in the format 'It is ____.'"
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        assert item.fields["keyword"] == drawn["arg2"]
        plain = item_of(folder, f"needlebench.en-16000-52:{repeat}").text()
        assert plain.endswith("'It is ____.'\n\n")


def test_a_plain_string_goes_to_chats_as_it_is_but_for_the_mended_profile(data):
    assert isinstance(item_of(data, "needle_8k.1000-0:0", CARD, chat=True).prompt.written(), TextPrompt)
    assert isinstance(item_of(data, "needle_8k.1000-0:0", FIXED, chat=True).prompt.written(), ChatPrompt)


# -- verdicts ------------------------------------------------------------------------------------------------


def score(data: DataFolder, key: str, answer: str, profile=CARD) -> float:
    name = key.partition(".")[0]
    return 100 * build(name, profile, is_chat=True).score(item_of(data, key, profile), answer).score


def test_a_perfect_retriever_scores_as_the_protocol_says(data):
    key = "needle_8k.1000-47:2"
    assert score(data, key, NEEDLE) == 100.0
    # the very sentence that the question asks for lacks one of the needle's characters
    assert score(data, key, ASKED) == pytest.approx(100 * (1 - 1 / 23))
    assert score(data, key, ASKED, FIXED) == 100.0
    wordy = f"根据文档，{ASKED}希望对你有帮助！"
    longest = len(wordy)
    assert score(data, key, wordy) == pytest.approx(100 * (1 - (longest - 22 + 1) / longest))
    assert score(data, key, wordy, FIXED) == 100.0
    assert score(data, key, "上海 人工智能\n实验室", FIXED) == 100.0
    assert score(data, "needle_multi.1000-0:0", "是松露奶酪通心粉") == 100.0


def test_a_blind_model_scores_what_the_overlap_gives(data):
    key = "needle_8k.1000-47:2"
    assert score(data, key, "") == 0.0
    blind = "小明最喜欢的实习地点就是北京大学。"
    similarity = 100 * overlap.edit_similarity(blind, NEEDLE)
    assert similarity == pytest.approx(100 * (1 - 9 / 23), abs=6)
    assert score(data, key, blind) == pytest.approx(similarity)
    assert score(data, key, blind, FIXED) == pytest.approx(0.2 * similarity)
    words = {"eat", "sandwich", "and", "sit", "in", "dolores", "park", "on", "sunny", "day"}
    assert score(data, "needle_en.1000-0:0", "Sit in a park, and eat.") == pytest.approx(100 * 5 / len(words))
    assert score(data, "needle_en.1000-0:0", FORMS["needle_en"].needle.answer) == 100.0


def test_a_run_gives_rows_of_length_depth_and_score(data, tmp_path):
    settings = RunSettings(("needle_8k.1000-0", "needle_8k.2000-47", "needle_8k.2000-100"), "fixed", True)
    parts = choose_questions(data, FIXED, settings)
    seen: list[int] = []

    def script(request) -> str:
        seen.append(len(request.prompt.text))
        assert request.max_context_tokens is None
        return "上海人工智能实验室" if "2000-47" in request.key else ""

    results = evaluate(ScriptedModel(script), parts, tmp_path / "run", settings)
    rows = grid(Results.load(tmp_path / "run").tasks["needle_8k"].subsets)
    assert [(row.length, row.depth, row.score, row.n) for row in rows] == [
        (1000, 0, 0.0, 10), (2000, 47, 100.0, 10), (2000, 100, 0.0, 10),
    ]  # fmt: skip
    assert results.tasks["needle_8k"].rows == {}  # the whole grid was not asked
    assert is_grid("needle_8k")
    assert not is_grid("mmlu")
    sample = read_samples(tmp_path / "run")["needle_8k.2000-47:3"]
    assert len(sample.prompt) < 1000 < min(seen)
    assert "characters are not kept; needle_8k 2000-47:3 of " in sample.prompt


def test_the_hash_of_a_plan_changes_with_haystack_tokenizer_and_mode(data, tmp_path):
    def digest(folder: DataFolder, profile: str = "fixed", *, chat: bool = True) -> str:
        settings = RunSettings(("needle_8k.1000-0",), profile, chat)
        return choose_questions(folder, find_profile(profile), settings)[0].facts.prompt_sha256

    other = haystack_folder(tmp_path)
    assert digest(data) == digest(other) == digest(data)
    write_rows(tmp_path / "CDME/zh_finance.jsonl", [{"text": "另一个。" * 9000}])
    plans = {
        digest(data),
        digest(DataFolder(tmp_path)),
        digest(data, "card-2024-01"),
        digest(data, chat=False),
    }
    assert len(plans) == 4


# -- length and room -----------------------------------------------------------------------------------------


def test_forty_thousand_prompts_are_planned_without_holding_them(tmp_path):
    folder = haystack_folder(tmp_path, count=800, num_words=60)
    tracemalloc.start()
    try:
        settings = RunSettings(("needle",), "card-2024-01")
        part = choose_questions(folder, CARD, settings)[0]
        num_written = 0
        for item in list(part.items)[::4001]:
            num_written += len(request_of(item, CARD, settings).prompt.text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(1 for _ in part.items) == 40_000
    assert num_written > 10 * 20_000
    assert peak < 100 << 20  # all of them together would be 12 GB


def test_a_prompt_of_200k_real_tokens_is_right_and_quick(tmp_path, tokenizer):
    folder = haystack_folder(tmp_path, count=700, num_words=400)
    item = item_of(folder, "needle.200000-73:4", FIXED, chat=True)
    item.prompt.written()  # shuffles
    start = time.monotonic()
    text = item.text()
    assert time.monotonic() - start < 20
    document = text.partition("用户现在给你的文档是")[2].partition("\n\n现在请问：")[0]
    before, found, after = document.partition(NEEDLE)
    assert found
    num_needle = len(tokenizer.encode(NEEDLE))
    total = 200_000 - 200 - num_needle
    # encoding the parts anew may merge a few tokens at the cuts
    assert len(tokenizer.encode(before)) == pytest.approx(int(total * 0.73), abs=5)
    assert len(tokenizer.encode(after)) == pytest.approx(total - int(total * 0.73), abs=5)
    whole = len(tokenizer.apply_chat(item.prompt.written().messages))
    assert 199_000 < whole < 200_000


def test_lengths_and_missing_files_are_told(data, tmp_path):
    with pytest.raises(
        EvalError, match=r"CDME/zh_finance.jsonl has \d+ tokens, but a text of 199\d+ is asked for"
    ):
        item_of(data, "needle.200000-0:0", FIXED)
    write_rows(tmp_path / "CDME/zh_finance.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"needle/cl100k_base.tiktoken is not in the data folder"):
        item_of(DataFolder(tmp_path), "needle.1000-0:0")
    with pytest.raises(DataError, match=r"put its tokenizer.model or tokenizer.json into .*needle"):
        item_of(DataFolder(tmp_path), "needle.1000-0:0", FIXED)
    for content, why in (("YQ== x\n", "no vocabulary"), ("YQ== 1\n", "lacks single bytes")):
        write(tmp_path / "needle" / "cl100k_base.tiktoken", content)
        with pytest.raises(DataError, match=why):
            item_of(DataFolder(tmp_path), "needle.1000-0:0")
    write(tmp_path / "needle" / "tokenizer.json", "{}")
    with pytest.raises(DataError, match=r"tokenizer.json is damaged"):
        item_of(DataFolder(tmp_path), "needle.1000-0:0", FIXED)
    write_rows(tmp_path / "needlebench/needles.jsonl", [])
    (tmp_path / "needle" / "tokenizer.json").unlink()
    write(tmp_path / "needle" / "tokenizer.model", REAL_TOKENIZER.read_bytes())
    write_rows(tmp_path / "needlebench/PaulGrahamEssays.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"holds no needle in English"):
        item_of(DataFolder(tmp_path), "needlebench.en-16000-0:0", FIXED)
    with pytest.raises(DataError, match=r"needle_en/addiction.txt is not in the data folder"):
        item_of(DataFolder(tmp_path), "needle_en.1000-0:0", FIXED)


def test_the_published_haystack_has_the_measured_number_of_tokens(shared, tokenizer):
    rows = shared.rows("CDME/zh_finance.jsonl", ("text",))
    assert sum(len(tokenizer.encode(str(row["text"]))) for row in rows) == 548_959
    assert not any(JANUARY_NEEDLE.keyword in str(row["text"]) for row in rows)


@pytest.mark.slow
def test_the_demo_model_runs_within_its_context(tmp_path):
    from dataclasses import replace

    from internlm2.checkpoint.resolve import resolve_model
    from internlm2.engine.llm import LLM
    from internlm2.eval.backends.engine import EngineModel

    folder = haystack_folder(tmp_path / "data")
    (tmp_path / "data" / "needle" / "tokenizer.model").unlink()
    tokenizer = resolve_model("demo") / "tokenizer.json"
    write(tmp_path / "data" / "needle" / "tokenizer.json", tokenizer.read_bytes())
    settings = RunSettings(("needle_en.1000-50", "needle_8k.2000-47"), "fixed", True, limit=1)
    parts = choose_questions(folder, FIXED, settings)

    class Brief(EngineModel):
        """Answers of 512 tokens take minutes."""

        def answer(self, requests):
            return super().answer(replace(one, max_tokens=24) for one in requests)

    model = Brief(LLM("demo", dtype="float32", max_model_len=2560), name="demo")
    results = evaluate(model, parts, tmp_path / "run", settings)
    assert results.num_errors == 0
    assert all(task.num_cut_prompts == 0 for task in results.tasks.values())
    samples = {sample.subset: sample for sample in read_samples(tmp_path / "run").values()}
    assert 800 < samples["1000-50"].prompt_tokens < 1000
    assert 1700 < samples["2000-47"].prompt_tokens < 2060
    assert [(row.length, row.depth) for row in grid(results.tasks["needle_en"].subsets)] == [(1000, 50)]
    assert samples["1000-50"].output
