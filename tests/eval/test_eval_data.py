"""The data folder: what is needed and missing, what is damaged, and how it is filled."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from internlm2.cli import main as cli
from internlm2.errors import MissingDependencyError
from internlm2.eval.data.folder import DataError, DataFolder
from internlm2.eval.data.importing import import_folder
from internlm2.eval.data.published import OPTIONAL, published_files, subjects
from internlm2.eval.data.status import as_text, differing, examine
from internlm2.eval.profile import MENDS, PROFILES
from internlm2.eval.tasks import CARD_TASKS, TASKS, build, find_item

PROFILE = PROFILES["card-2024-01"]


def test_every_file_of_every_task_is_published():
    names = {file.name for file in published_files()}
    needed = {
        file for name in TASKS for profile in PROFILES.values() for task in [build(name, profile, is_chat=True)]
        for subset in task.subsets for file in task.files(subset)
    }  # fmt: skip
    assert needed == names
    assert len(names) == 196 + 2 * 52 + 2 * 67 + 97


def test_subjects_are_grouped_as_published():
    groups = [group for subject in subjects("mmlu") for group in subject.groups]
    assert {group: groups.count(group) for group in groups} == {
        "stem": 19, "humanities": 13, "social-science": 12, "other": 13,
    }  # fmt: skip
    assert all(subject.title for name in ("ceval", "cmmlu") for subject in subjects(name))


def test_the_samples_are_told_apart_from_the_published_files(sample):
    found = {one.name: one for one in examine(sample.path)}
    assert found["shots"].missing == found["shots"].differing == []
    assert found["gsm8k"].differing == ["gsm8k/test.jsonl"]
    assert "mmlu/test/anatomy_test.csv" in found["mmlu"].missing
    folder = DataFolder(sample.path)
    find_item("gsm8k:0", PROFILE, folder, is_chat=True)
    assert differing(folder.sha256) == ["gsm8k/test.jsonl"]


def test_the_shared_data_is_complete(shared):
    assert all(
        not one.missing and not one.differing for one in examine(shared.path) if one.name not in OPTIONAL
    )


def test_the_page_names_what_is_missing(tmp_path, sample):
    page = as_text(tmp_path, examine(tmp_path), show_all=False)
    assert (
        "missing   mmlu/test/abstract_algebra_test.csv ... mmlu/dev/world_religions_dev.csv (--all lists them)"
        in page
    )
    assert "missing   gsm8k/test.jsonl\n" in page
    assert "  licence CC-BY-4.0; from https://github.com/google-research" in page
    whole = as_text(tmp_path, examine(tmp_path), show_all=True)
    assert (
        "  missing   gsm8k/test.jsonl  3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
        in whole
    )
    assert "  missing   cmmlu/test/arts.csv  sha256 not known" in whole
    part = as_text(sample.path, examine(sample.path), show_all=False)
    assert "  missing   AGIEval/data/v1/sat-en.jsonl  " in part
    assert "Files that differ are read all the same" in part


def copied(sample: DataFolder, tmp_path: Path) -> DataFolder:
    shutil.copytree(sample.path, tmp_path / "data")
    return DataFolder(tmp_path / "data")


def test_a_missing_file_is_named_with_what_to_do(tmp_path, sample):
    folder = copied(sample, tmp_path)
    (folder.path / "shots" / "math_base.json").unlink()
    with pytest.raises(
        DataError, match=r"shots/math_base.json is not in the data folder .*`internlm2 eval data --data"
    ):
        find_item("math:0", PROFILE, folder, is_chat=True)
    with pytest.raises(DataError, match="which is no folder"):
        find_item("math:0", PROFILE, DataFolder(tmp_path / "nowhere"), is_chat=True)


def test_a_folder_where_a_file_belongs_is_refused(tmp_path):
    (tmp_path / "gsm8k" / "test.jsonl").mkdir(parents=True)
    with pytest.raises(DataError, match=r"Cannot read .*test\.jsonl: Is a directory"):
        DataFolder(tmp_path).bytes("gsm8k/test.jsonl")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"question": 1}\n\n')
    assert DataFolder(tmp_path).rows("a.jsonl", ("question",)) == [{"question": 1}]


DAMAGE = [
    ("gsm8k:0", "gsm8k/test.jsonl", '{"question": "q", "answ', "line 1: Unterminated string"),
    ("gsm8k:0", "gsm8k/test.jsonl", '{"question": "q"}', "line 1 has no field 'answer'"),
    ("gsm8k:0", "gsm8k/test.jsonl", "[]", "line 1 is no JSON object"),
    ("gsm8k:0", "gsm8k/test.jsonl", '{"question": "q", "answer": "18"}', "line 1 has no '#### ' before the answer"),
    ("gsm8k:0", "gsm8k/test.jsonl", b"\xff\xfe", "it is not UTF-8"),
    ("gsm8k:0", "shots/gsm8k_base.json", "[]", "it does not hold one JSON string"),
    ("gsm8k:0", "shots/gsm8k_base.json", '"Question: a"', "it does not hold 4 examples that begin with 'Question: '"),
    ("gsm8k:0", "shots/gsm8k_base.json", '"Question: a\\nQuestion: b\\nQuestion: c\\nQuestion: d"', "example 1 has no answer"),
    ("mmlu.abstract_algebra:0", "mmlu/test/abstract_algebra_test.csv", "q,a,b,c,d", "row 1 has 5 fields instead of 6"),
    ("mmlu.abstract_algebra:0", "mmlu/test/abstract_algebra_test.csv", "q,a,b,c,d,x", "row 1 has the answer 'x'"),
    ("mmlu.abstract_algebra:0", "mmlu/test/abstract_algebra_test.csv", '"' + "x" * 140_000 + '",a,b,c,d,A', "it is no CSV"),
    ("bbh.date_understanding:0", "BBH/data/date_understanding.json", "{}", "the file has no field 'examples'"),
    ("bbh.date_understanding:0", "BBH/data/date_understanding.json", '{"examples": 1}', "`examples` is no list"),
    ("bbh.date_understanding:0", "BBH/data/date_understanding.json", '{"examples": [{}]}', "example 0 has no field 'input'"),
    ("math:0", "math/math.json", "[]", "it is no JSON object of problems"),
    ("math:0", "math/math.json", '{"7": {"problem": "p", "solution": "3"}}', "the solution of problem '7' has no"),
    ("agieval.math:0", "AGIEval/data/v1/math.jsonl", '{"passage": null, "question": "q", "options": 3, "label": "A"}', "the options of line 1 are no list"),
    ("sanitized_mbpp:7", "mbpp/sanitized-mbpp.jsonl", '{"prompt": "", "code": "", "test_imports": [], "test_list": ""}\n' * 8, "the tests of line 8 are no list"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: f"{damage[0]} {damage[3]}"[:60])
def test_a_damaged_file_is_named_with_its_place(damage, tmp_path, sample):
    key, name, content, message = damage
    folder = copied(sample, tmp_path)
    (folder.path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(f"{name} is damaged: {message}")):
        find_item(key, PROFILE, folder, is_chat=True)


def test_a_pack_is_linked_and_nothing_is_touched_twice(tmp_path, sample):
    source = tmp_path / "OpenCompass"
    shutil.copytree(sample.path, source / "data")
    target = tmp_path / "new" / "data"
    done = import_folder(source, target)
    assert "mmlu/test/abstract_algebra_test.csv" in done.added
    assert (target / "gsm8k/test.jsonl").is_symlink()
    assert DataFolder(target).bytes("gsm8k/test.jsonl") == (sample.path / "gsm8k/test.jsonl").read_bytes()
    again = import_folder(source / "data", target)
    assert again.added == ()
    assert set(again.skipped) == set(done.added)


def test_a_pack_is_copied_where_asked_or_where_links_are_refused(tmp_path, sample, monkeypatch):
    import_folder(sample.path, tmp_path / "one", copy=True)
    assert not (tmp_path / "one/gsm8k/test.jsonl").is_symlink()

    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(Path, "symlink_to", refuse)
    import_folder(sample.path, tmp_path / "two")
    assert (tmp_path / "two/gsm8k/test.jsonl").read_bytes() == (sample.path / "gsm8k/test.jsonl").read_bytes()


def test_a_source_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        import_folder(tmp_path / "nowhere", tmp_path / "data")
    (tmp_path / "configs").mkdir()
    with pytest.raises(DataError, match=r"holds no benchmark data\. Give an OpenCompass `data/` folder"):
        import_folder(tmp_path / "configs", tmp_path / "data")


@pytest.mark.parametrize(
    "style", ["dict(role='{role}', prompt={prompt!r})", "{{'role': '{role}', 'prompt': {prompt!r}}}"]
)
def test_worked_examples_come_out_of_opencompass_configurations(style, tmp_path, sample):
    """The three configurations, written again from the sample files as OpenCompass writes them."""
    places = {
        "gsm8k": "gsm8k/gsm8k_gen_1d7fe4.py",
        "math": "math/math_gen_265cce.py",
        "mbpp": "mbpp/sanitized_mbpp_gen_1e1056.py",
    }
    keys = {"gsm8k": "gsm8k:0", "math": "math:0", "mbpp": "sanitized_mbpp:7"}
    fields = {
        "gsm8k": "Question: {question}",
        "math": "Problem:\n{problem}",
        "mbpp": "task: {text} {test_list}",
    }
    for name, place in places.items():
        turns = find_item(keys[name], PROFILE, sample, is_chat=True).prompt.head
        rounds = [("HUMAN" if t.role == "user" else "BOT", t.content) for t in turns]
        rounds += [("HUMAN", fields[name]), ("BOT", "[BEGIN]\n")]
        body = ", ".join(style.format(role=role, prompt=prompt) for role, prompt in rounds)
        path = tmp_path / "opencompass" / "configs" / "datasets" / place
        path.parent.mkdir(parents=True)
        path.write_text(
            f"raise SystemExit\ncfg = dict(prompt_template=dict(template=dict(round=[{body}])))\n"
        )
    done = import_folder(tmp_path, tmp_path / "data")
    assert sorted(done.added) == [f"shots/{name}_base.json" for name in sorted(places)]
    for name in places:
        file = f"shots/{name}_base.json"
        assert json.loads((tmp_path / "data" / file).read_text()) == json.loads(
            (sample.path / file).read_text()
        )


def test_a_configuration_that_is_no_python_is_passed_over(tmp_path):
    path = tmp_path / "configs" / "datasets" / "gsm8k" / "gsm8k_gen_1d7fe4.py"
    path.parent.mkdir(parents=True)
    path.write_text("def (")
    with pytest.raises(DataError, match="holds no benchmark data"):
        import_folder(tmp_path, tmp_path / "data")


def run(*words: object) -> int:
    return cli.run([str(word) for word in words])


def test_the_prompt_command_prints_exactly_the_prompt(sample, golden_prompts, capfd):
    for key, words in {
        "mmlu.abstract_algebra.0.base.ppl.C": ["mmlu.abstract_algebra:0", "--label", "C"],
        "sanitized_mbpp.7.base.gen": ["sanitized_mbpp:7"],
        "gsm8k.0.chat.gen": ["gsm8k:0", "--chat", "--profile", "fixed"],
    }.items():
        assert run("eval", "prompt", *words, "--data", sample.path) == 0
        sys.stdout.flush()
        assert os.linesep == "\n"
        assert capfd.readouterr().out == golden_prompts[key]


def test_the_prompt_command_refuses_what_it_does_not_know(sample, capsys):
    assert run("eval", "prompt", "gsm8k:0", "--profile", "card", "--data", sample.path) == 2
    assert "There is no profile 'card'" in capsys.readouterr().err
    assert run("eval", "prompt", "gsm8k:0", "--data", sample.path / "no") == 2
    assert "which is no folder" in capsys.readouterr().err


def test_the_data_command(tmp_path, sample, capsys):
    assert run("eval", "data", "--data", tmp_path / "data", "--from", sample.path, "--json") == 1
    shown = capsys.readouterr()
    assert "files imported, 0 were there already" in shown.err
    benchmarks = {one["name"]: one for one in json.loads(shown.out)["benchmarks"]}
    assert set(benchmarks) == {*TASKS, "shots"} - {"needle_8k", "needle_32k", "needle_multi"}  # as needle
    assert {file["state"] for file in benchmarks["shots"]["files"]} == {"good"}
    assert run("eval", "data", "--data", tmp_path / "data") == 1
    assert "agieval: 21 files, 7 different, 14 missing" in capsys.readouterr().out


def test_the_data_command_is_content_with_all_files_of_the_card(shared, capsys):
    assert run("eval", "data", "--data", shared.path) == 0
    assert len(CARD_TASKS) == 7
    assert "gsm8k: 1 files, 1 good" in capsys.readouterr().out


def test_parquet_files_without_pyarrow_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'internlm2[eval]'")):
        import_folder(tmp_path, tmp_path / "data")


@pytest.mark.parametrize("words", [["eval"], ["eval", "prompt"], ["eval", "data"]], ids=" ".join)
def test_help_is_there_and_imports_no_torch(words):
    code = (
        "import sys; from internlm2.cli.main import run; rc = run([*sys.argv[1:], '--help']);"
        "sys.exit(rc or bool({'torch', 'numpy', 'pyarrow', 'internlm2.eval'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: internlm2 eval" in done.stdout


def test_prompts_need_no_torch(sample):
    code = (
        "import sys; from internlm2.cli.main import run; run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    )
    words = ["eval", "prompt", "gsm8k:0", "--data", str(sample.path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_lists_every_mend():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for mend in MENDS:
        assert f"| `{mend.name}` | {mend.fault} | {mend.instead} |" in page


def test_the_python_of_the_page_runs(sample):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    script = page.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", script.replace('DataFolder("data")', f"DataFolder({str(sample.path)!r})")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("33.33")
