"""C-Eval and CMMLU, whose data is not here: the layout and the prompts of their OpenCompass configurations."""

import pytest

from internlm2.eval.data.folder import DataError, DataFolder
from internlm2.eval.profile import PROFILES
from internlm2.eval.tasks import build, find_item

PROFILE = PROFILES["card-2024-02"]


@pytest.fixture
def folder(tmp_path) -> DataFolder:
    for split, count in (("dev", 6), ("val", 2)):
        path = tmp_path / "ceval" / "formal_ceval" / split / f"law_{split}.csv"
        path.parent.mkdir(parents=True)
        rows = [f'{n},"题{n},",甲,乙,丙,丁,B' + (",为什么" if split == "dev" else "") for n in range(count)]
        header = "id,question,A,B,C,D,answer" + (",explanation" if split == "dev" else "")
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    for split, count in (("dev", 5), ("test", 2)):
        path = tmp_path / "cmmlu" / split / "arts.csv"
        path.parent.mkdir(parents=True)
        rows = [f"{n},问{n},甲,乙,None,NA,C" for n in range(count)]
        path.write_text("\n".join([",Question,A,B,C,D,Answer", *rows]) + "\n", encoding="utf-8")
    return DataFolder(tmp_path)


def test_ceval_prompts(folder):
    base = find_item("ceval.law:1", PROFILE, folder, is_chat=False)
    ask = "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n题{},\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案: \n"
    assert base.text("A") == "".join(ask.format(n) + "B\n" for n in range(5)) + ask.format(1) + "A"
    assert base.gold == "B"
    chat = find_item("ceval.law:1", PROFILE, folder, is_chat=True)
    assert [turn.content for turn in chat.prompt.turns[-2:]] == ["B", ask.format(1)[:-1]]


def test_cmmlu_prompts(folder):
    base = find_item("cmmlu.arts:0", PROFILE, folder, is_chat=False)
    ask = "以下是关于艺术学的单项选择题，请直接给出正确答案的选项。\n题目：问{}\nA. 甲\nB. 乙\nC. None\nD. NA"
    assert (
        base.text("D")
        == "".join(ask.format(n) + "\n答案是: C\n" for n in range(5)) + ask.format(0) + "\n答案是: D"
    )
    chat = find_item("cmmlu.arts:0", PROFILE, folder, is_chat=True)
    assert [turn.content for turn in chat.prompt.turns[:2]] == [ask.format(0), "答案是: C"]


def test_china_specific_subjects_count_to_two_groups():
    rows = {row.name: row.subsets for row in build("cmmlu", PROFILE, is_chat=True).averages}
    assert "chinese_history" in rows["cmmlu-humanities"]
    assert "chinese_history" in rows["cmmlu-china-specific"]
    assert len(rows["cmmlu"]) == 67


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x,Question,A,B,C,D,Answer\n0,q,a,b,c,d", "row 1 has 6 fields instead of 7"),
        ("x,Question,A,B,C,D,Answer\n0,q,a,b,c,d,E", "row 1 has the answer 'E' instead of A, B, C or D"),
    ],
)
def test_damaged_tables_are_named(folder, content, message):
    (folder.path / "cmmlu" / "test" / "arts.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        list(build("cmmlu", PROFILE, is_chat=True).items(folder, "arts"))
