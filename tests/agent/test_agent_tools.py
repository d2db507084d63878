"""The tools that come along: a calculator without bombs, a folder without a way out, a session that remembers."""

import ast
import math
import os
import time
from fractions import Fraction
from pathlib import Path

import pytest
from agent_scripts import DRAW, call
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.agent import Agent, FolderReader, PythonTool, Reply, ScriptedModel, ToolError, calculator
from internlm2.agent.tool_type import ToolDefinitionError
from internlm2.agent.tools.calculator import calculate
from internlm2.agent.tools.python import as_result
from internlm2.sandbox import Execution, Limits

# -- calculator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"), ("(1 + 2) * 3", "9"), ("2^10", "1024"), ("2 ** -2", "0.25"), ("-2 ** 2", "-4"),
        ("0.1 + 0.2", "0.3"), ("1 / 3", "0.333333333333333"), ("10 / 4", "2.5"), ("7 // 2", "3"), ("-7 % 3", "2"),
        ("12×13 − 6÷2", "153"), ("sqrt(2)", "1.4142135623731"), ("sqrt(16/9)", "1.33333333333333"), ("sqrt(144)", "12"),
        ("pi", "3.14159265358979"), ("E", "2.71828182845905"), ("sin(pi/2)", "1"), ("log(8, 2)", "3"), ("LN(e)", "1"),
        ("max(1, 2.5, 2)", "2.5"), ("round(2.345, 2)", "2.34"), ("factorial(20)", "2432902008176640000"),
        ("comb(5,2)", "10"), ("gcd(12, 18)", "6"), ("lcm(4, 6)", "12"), ("floor(-2.5)", "-3"), ("1e3", "1000"),
        ("123456789 * 987654321", "121932631112635269"), ("(-1)^100000", "1"), ("0^5", "0"), ("(1/2)^3", "0.125"),
        ("abs(-3)", "3"), ("1/7^2", "0.0204081632653061"), ("2^0.5", "1.4142135623731"), ("1e-30", "1" + "E-30"),
        ("（１＋２）×３．５＾２", "36.75"), ("ｍａｘ（４，５）", "5"),
    ],
)  # fmt: skip
def test_the_calculator_calculates(expression, value):
    found = calculate(expression)
    if value == "1E-30":
        assert float(found) == 1e-30
    else:
        assert found == value or math.isclose(float(found), float(value), rel_tol=1e-13), found


NUMBERS = st.integers(-50, 50).map(str) | st.decimals(-5, 5, places=2).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(
        lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
    ),
    max_leaves=6,
)


class Exactly(ast.NodeTransformer):
    def visit_Constant(self, node):
        return ast.Call(ast.Name("Fraction", ast.Load()), [ast.Constant(repr(node.value))], [])


@given(EXPRESSIONS)
@settings(max_examples=300, deadline=None)
def test_the_calculator_agrees_with_pythons_fractions(expression):
    tree = ast.fix_missing_locations(Exactly().visit(ast.parse(expression, mode="eval")))
    try:
        expected = eval(compile(tree, "x", "eval"), {"Fraction": Fraction})  # noqa: S307 - our own text
    except ZeroDivisionError:
        with pytest.raises(ToolError, match="Division by zero"):
            calculate(expression)
        return
    found = Fraction(calculate(expression))
    assert found == expected or math.isclose(found, expected, rel_tol=1e-14)


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9", "9^9^9^9", "2**(2**40)", "10**10**2**3", "(9**999)**999", "(1/3)**(10**9)", "2**-(10**30)", "7**(10**400)",
        "factorial(10**9)", "factorial(factorial(20))", "comb(10**9, 5*10**8)", "exp(10**6)", "1e308*10.5**9000", "9.9**99999",
        "lcm(" + ",".join(str(3**n + 1) for n in range(20, 55)) + ")**9", "2.0**(10**400)", "sqrt(10**2000) ** 0.5 ** 9 * 1e999",
        "comb(10**300, 10**299)", "round(1, 10**9)", "round(1.5, -(10**9))",
    ],
)  # fmt: skip
def test_bombs_are_refused_at_once(expression):
    started = time.monotonic()
    with pytest.raises(ToolError):
        print(calculate(expression))
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    "expression", ["9" * 900, "*".join(["9" * 15] * 60), "2**8000", "factorial(700)", "3**5000"]
)
def test_what_is_large_and_allowed_is_exact(expression):
    assert int(calculate(expression)) == eval(expression.replace("factorial", "math.factorial"))  # noqa: S307


@pytest.mark.parametrize("nest", ["(1+", "-", "+", "~", "abs(", "2**-(", "[", "{1:", "not ", "lambda:"])
def test_deep_nesting_is_refused(nest):
    closing = {"(1+": ")", "abs(": ")", "2**-(": ")", "[": "]", "{1:": "}"}.get(nest, "")
    for depth in (70, 150, 990 // (len(nest) + len(closing))):
        with pytest.raises(ToolError):
            print(calculate(nest * depth + "1" + closing * depth))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "1 to 1000 characters"), ("1" * 1001, "1 to 1000 characters"), ("1 +", "is no arithmetic expression"),
        ("1,000 + 1", "without separators"), ("x + 1", "'x' is not known here"), ("__import__(1)", "not known here"),
        ("(1).real", "not known here"), ("'a' * 9", "it holds a text"), ("True + 1", "True is no number"), ("1j", "is no number"),
        ("1 if 1 else 2", "not known here"), ("[1][0]", "not known here"), ("1 << 9", "not known here"), ("a\0b", "is no arithmetic"),
        ("sqrt(-1)", "Not defined"), ("sqrt()", "Not defined"), ("max()", "Not defined"), ("1/0", "Division by zero"),
        ("0**-1", "Division by zero"), ("(-8)**0.5", "no real number"), ("abs(x=1)", "not known here"), ("gcd(1.5, 2)", "whole numbers"),
        ("factorial(-1)", "whole numbers from 0"), ("acos(2)", "Not defined"), ("comb(3, -1)", "Not defined"), ("1e999", "too large"),
        ("(lambda: 1)()", "not known here"), ("f'{1}'", "it holds a text"), ("1 < 2", "not known here"), ("\ud800", "is no arithmetic"),
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(expression, message):
    with pytest.raises(ToolError, match=None) as caught:
        calculate(expression)
    assert message in str(caught.value)


@given(st.text(alphabet="0123456789+-*/%^().,e sqrtlogfactorialcombround\x00[]{}'\"\\×", max_size=60))
@settings(max_examples=500, deadline=2000)
def test_any_text_gives_a_number_or_a_refusal(text):
    try:
        found = calculate(text)
    except ToolError:
        return
    float(found)


def test_the_calculator_is_a_tool():
    made = calculator()
    assert made.name == "calculator"
    assert made.parameters["required"] == ["expression"]
    assert made.run({"expression": "6*7"}).text == "42"


# -- files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("one\ntwo\nthree\n")
    (root / "sub" / "中.md").write_text("深")
    (root / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    (root / "empty").touch()
    (tmp_path / "secret.txt").write_text("SECRET")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("SECRET")
    return root


@pytest.fixture
def reader(folder):
    made = FolderReader(folder)
    yield made
    made.close()


def test_files_are_read_and_listed(reader):
    assert reader.read("a.txt") == "one\ntwo\nthree"
    assert reader.read("./sub/../a.txt".replace("../", "").replace("sub/", "")) == "one\ntwo\nthree"
    assert reader.read("sub//中.md") == "深"
    assert reader.read("bom.txt") == "hello"
    assert reader.read("empty") == "(empty file)"
    assert reader.read("a.txt", first_line=2, num_lines=1) == "two\n[lines 2 to 2 of 3]"
    with pytest.raises(ToolError, match="has 3 lines, so it has none from 9 on"):
        reader.read("a.txt", first_line=9)
    assert reader.list() == "a.txt (14 bytes)\nbom.txt (8 bytes)\nempty (0 bytes)\nsub/"
    assert reader.list("sub") == "中.md (3 bytes)"


def test_the_file_tools_are_called_by_an_agent(reader):
    script = [Reply(calls=(call("list_files"), call("read_file", path="a.txt", first_line=3))), "done"]
    outcome = Agent(ScriptedModel(script), reader.tools()).run("?")
    assert [r.text for r in outcome.calls] == [reader.list(), "three\n[lines 3 to 3 of 3]"]


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt", "sub/../../secret.txt", "/etc/passwd", "//etc/passwd", "~/x", "~root", "..", "sub/..", "../root/a.txt",
        "a.txt\0.png", "./../secret.txt", ".//..//secret.txt", "link.txt", "dirlink/secret.txt", "dirlink", "inner", "loop/loop", "absolute",
        "proc/self/environ", "sub/up/secret.txt", "chain",
    ],
)  # fmt: skip
def test_no_path_leads_out(folder, reader, path):
    (folder / "link.txt").symlink_to("../secret.txt")
    (folder / "dirlink").symlink_to("../outside")
    (folder / "inner").symlink_to("a.txt")  # links within are not followed either
    (folder / "loop").symlink_to("loop")
    (folder / "absolute").symlink_to("/etc/passwd")
    (folder / "proc").symlink_to("/proc")
    (folder / "sub" / "up").symlink_to("../..")
    (folder / "chain").symlink_to("link.txt")
    for action in (reader.read, reader.list):
        with pytest.raises(ToolError) as caught:
            print(action(path))
        assert "SECRET" not in str(caught.value)


def test_a_link_that_is_swapped_in_meanwhile_leads_nowhere(folder, tmp_path, reader):
    """The walk holds descriptors: a folder that becomes a link between two steps is not followed."""
    real = os.open

    def swapping(path, flags, *args, **options):
        if path == "中.md" and not (folder / "gone").exists():
            (folder / "sub").rename(folder / "gone")
            (folder / "sub").symlink_to(tmp_path / "outside")
            (tmp_path / "outside" / "中.md").write_text("SECRET")
        return real(path, flags, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", swapping)
        assert reader.read("sub/中.md") == "深"
    with pytest.raises(ToolError, match="is a link, which is not followed"):
        reader.read("sub/中.md")


def test_a_root_that_is_moved_away_is_still_the_root(folder, tmp_path, reader):
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "outside")
    assert reader.read("a.txt").startswith("one")
    with pytest.raises(ToolError, match=r"There is no 'secret.txt'"):
        reader.read("secret.txt")


def test_what_is_no_text_file_is_refused(folder, reader, monkeypatch):
    (folder / "nul").write_bytes(b"text\0more")
    (folder / "latin").write_bytes("é".encode("latin-1"))
    os.mkfifo(folder / "pipe")
    (folder / "huge").write_bytes(b"x" * 2000)
    monkeypatch.setattr("internlm2.agent.tools.files.MAX_FILE_BYTES", 1000)
    for path, message in [
        ("nul", "is a binary file"), ("latin", "is no UTF-8 text"), ("pipe", "is no ordinary file"), ("sub", "is a folder"),
        ("huge", "is larger than"), ("missing", "There is no 'missing'"), ("a.txt/x", "no folder"), (".", "is a folder"), ("n" * 300, "name too long"),
    ]:  # fmt: skip
        with pytest.raises(ToolError, match=None) as caught:
            reader.read(path)
        assert message in str(caught.value) or message in str(caught.value).lower()
    with pytest.raises(ToolError, match="first_line is at least 1"):
        reader.read("a.txt", first_line=0)
    with pytest.raises(ToolError, match="num_lines from 1 to 2000"):
        reader.read("a.txt", num_lines=10_000)


def test_long_lines_and_large_folders_are_cut(folder, reader):
    (folder / "long").write_text("y" * 5000)
    assert reader.read("long") == "y" * 2000 + " [3000 more characters]"
    for n in range(600):
        (folder / "sub" / f"f{n}").touch()
    lines = reader.list("sub").split("\n")
    assert len(lines) == 501
    assert lines[-1] == "[more are not shown]"


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ToolDefinitionError, match="Cannot read the folder"):
        FolderReader(tmp_path / "no")
    (tmp_path / "file").touch()
    with pytest.raises(ToolDefinitionError, match="Give a folder that is there"):
        FolderReader(tmp_path / "file")


# -- Python ---------------------------------------------------------------------------------------------------

QUICK = Limits(wall_seconds=10, cpu_seconds=20, memory_bytes=512 << 20, disk_bytes=4 << 20, output_bytes=5000)


def test_the_session_lives_from_turn_to_turn_and_gives_text_and_pictures():
    with PythonTool(limits=QUICK) as python:
        script = [
            Reply(calls=(call("python", code="x = 20\nprint('set')"), call("python", code="x += 1"))),
            Reply(calls=(call("python", code="```python\nx * 2\n```"),)),
            Reply(calls=(call("python", code="x / 0"),)),
            Reply(calls=(call("python", code=DRAW),)),
            "42",
        ]
        model = ScriptedModel(script)
        outcome = Agent(model, [python.tool]).run("?")
    texts = [r.text for r in outcome.calls]
    assert texts[:3] == ["set", "", "42"]
    assert outcome.calls[3].status == "error"
    assert "ZeroDivisionError" in texts[3]
    assert "No result" not in texts[3]
    assert model.asks[1].messages[-1]["content"] == "(no output)"
    assert [p.data for p in outcome.calls[4].pictures] == [b"\x89PNG\r\n\x1a\nrest"]
    assert model.asks[4].messages[-1]["content"] == "[1 pictures, shown to the user]"
    assert python.tool.is_code
    assert python.tool.one_at_a_time


def test_real_figures_come_back_as_png():
    pytest.importorskip("matplotlib")
    with PythonTool(
        limits=Limits(wall_seconds=60, cpu_seconds=60, memory_bytes=2 << 30, num_processes=32)
    ) as python:
        code = "import matplotlib\nmatplotlib.use('Agg')\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);"
        result = python.tool.run({"code": code})
    assert result.pictures, result.text
    assert result.pictures[0].data.startswith(b"\x89PNG")


def test_an_endless_loop_is_stopped_and_told():
    with PythonTool(limits=Limits(wall_seconds=0.5, cpu_seconds=20, memory_bytes=512 << 20)) as python:
        result = python.tool.run({"code": "y = 7\nwhile True: pass"})
        assert result.is_error
        assert "interrupted after 0.5 s" in result.text
        assert python.tool.run({"code": "y"}).text == "7"


def test_a_cell_is_told_in_order():
    execution = Execution("ok", "out\n", "err\n", "'v'", "", (), True, True, 0.1)
    assert as_result(execution).text == (
        "out\nerr\n'v'\n[some output was dropped: there was too much]\n[the session begins anew; its variables are gone]"
    )
