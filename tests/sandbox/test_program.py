# ruff: noqa: PTH208
"""One program and its tests: what passes, what fails, and what is said about it."""

import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest

from internlm2.sandbox import Limits, SandboxError, run_program
from internlm2.sandbox.program import run_without
from internlm2.sandbox.wire import MAX_MESSAGE_BYTES


def test_right_code_passes_and_wrong_code_fails_with_the_line() -> None:
    assert run_program("def double(x): return 2 * x", tests="assert double(4) == 8").passed
    outcome = run_program("def double(x): return 3 * x", tests="\nassert double(4) == 8, 'not eight'")
    assert outcome.status == "failed"
    assert 'File "<tests>", line 2' in outcome.detail
    assert "AssertionError: not eight" in outcome.detail


def test_an_error_of_the_program_is_told_with_its_own_lines() -> None:
    outcome = run_program("x = 1\ny = x / 0", tests="assert True")
    assert outcome.detail.splitlines()[:3] == [
        "Traceback (most recent call last):",
        '  File "<program>", line 2, in <module>',
        "    y = x / 0",
    ]
    assert run_program("def f(:").status == "failed"
    assert run_program("x = '\0'").status == "failed"
    assert run_program("x = '\ud800'").status == "failed"
    assert run_program("(" * 5000).status in ("failed", "memory")


def test_humaneval_shape_check_of_candidate_and_helpers_of_the_prompt() -> None:
    code = "def encode(s): return s[::-1]\ndef decode(s): return s[::-1]"
    tests = "METADATA = {}\ndef check(candidate):\n    from random import randint\n    for n in range(20):\n        assert candidate(encode('ab' * n)) == 'ab' * n\ncheck(decode)"
    assert run_program(code, tests=tests).passed
    assert not run_program(
        code.replace("decode(s): return s[::-1]", "decode(s): return s"), tests=tests
    ).passed


def test_values_of_every_plain_kind_come_back_equal() -> None:
    values = [
        0,
        -1,
        2**70,
        10**5000,
        True,
        None,
        1.5,
        -0.0,
        1e308,
        "é\ud800\0",
        b"\xff",
        (1, (2,)),
        [[]],
        {1, 2},
        frozenset({3}),
        {(1, 2): {"a": [None]}},
        1 + 2j,
        range(3, 9, 2),
    ]
    tests = "import math, sys\nsys.set_int_max_str_digits(0)\n" + "\n".join(
        f"assert same({v!r}) == {v!r} and type(same({v!r})) is {type(v).__name__}"
        for v in values
        if not (isinstance(v, int) and v > 2**80)
    )
    tests += "\nassert same(10**5000) == 10**5000\nassert math.isnan(same(math.nan)) and same(math.inf) == math.inf"
    outcome = run_program("def same(x): return x", tests=tests.replace("NoneType", "type(None)"))
    assert outcome.passed, outcome.detail
    assert math.isinf(math.inf)


def test_well_known_kinds_are_equal_to_their_plain_values() -> None:
    code = """
import collections, decimal, fractions
def counter(): return collections.Counter("aab")
def named(): return collections.namedtuple("P", "x y")(1, 2)
def default(): return collections.defaultdict(list, a=[1])
def exact(): return decimal.Decimal("0.1"), fractions.Fraction(1, 3)
def lazily(n):
    for i in range(n): yield i
def keys(): return {1: 2}.keys()
def bits(): return bytearray(b"a")
"""
    tests = """
from decimal import Decimal
from fractions import Fraction
assert counter() == {"a": 2, "b": 1} and named() == (1, 2) and default() == {"a": [1]}
assert exact() == (Decimal("0.1"), Fraction(1, 3)) and list(lazily(3)) == [0, 1, 2] and sorted(keys()) == [1] and bits() == b"a"
"""
    outcome = run_program(code, tests=tests)
    assert outcome.passed, outcome.detail


def test_objects_of_the_program_can_be_made_passed_back_and_asked() -> None:
    code = "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n    def total(self): return self.a + self.b\ndef longest(pairs): return max(p.total() for p in pairs)"
    tests = "assert longest([Pair(1, 2), Pair(b=3, a=4)]) == 7\nassert Pair(1, 2).total() == 3 and Pair(5, 2).a == 5\nassert Pair(1, 2) != Pair(1, 2)\nassert longest.__name__ == 'longest'"
    outcome = run_program(code, tests=tests)
    assert outcome.passed, outcome.detail


def test_arguments_that_the_program_changes_in_place_are_changed_for_the_tests() -> None:
    code = "def fill(a, b, c):\n    a.append(1); b['k'] = 2; c.add(3)"
    assert run_program(
        code,
        tests="a, b, c = [], {}, set()\nassert fill(a, b, c) is None\nassert (a, b, c) == ([1], {'k': 2}, {3})",
    ).passed


def test_errors_of_the_program_can_be_expected_by_the_tests() -> None:
    code = "class Mine(Exception): pass\ndef f(kind):\n    raise {'v': ValueError('bad'), 'm': Mine('own'), 'u': UnicodeDecodeError('utf-8', b'', 0, 1, 'x')}[kind]"
    tests = "try:\n    f('v')\nexcept ValueError as e:\n    assert str(e) == 'bad'\nelse:\n    assert False\ntry:\n    f('{}')\nexcept {} as e:\n    pass"
    assert run_program(code, tests=tests.format("v", "ValueError")).passed
    assert run_program(code, tests=tests.format("m", "Exception")).passed
    assert run_program(code, tests=tests.format("u", "Exception")).passed
    assert "ProgramError: Mine: own" in run_program(code, tests="f('m')").detail


def test_functions_of_the_tests_cannot_be_sent_and_built_in_ones_can() -> None:
    code = "def apply(f, x): return f(x)"
    assert run_program(code, tests="assert apply(len, [1]) == 1 and apply(int, '5') == 5").passed
    outcome = run_program(code, tests="apply(lambda x: x, 1)")
    assert outcome.status == "failed"
    assert "which cannot be sent to the code under test" in outcome.detail


def test_built_in_names_belong_to_the_tests_unless_given_as_entry_points() -> None:
    code = "def sum(a, b): return a + b"
    assert not run_program(code, tests="assert sum(1, 2) == 3").passed
    assert run_program(code, tests="assert sum(1, 2) == 3", entry_points=["sum"]).passed


def test_modules_that_the_program_imported_are_there_for_the_tests() -> None:
    assert run_program("import math as m, string", tests="assert m.sqrt(4) == 2 and string.digits").passed
    assert "NameError" in run_program("x = 1", tests="missing()").detail


def test_main_blocks_are_not_run_and_input_and_files_are_given() -> None:
    code = "import sys\nline = input()\nrest = sys.stdin.read()\ndata = open('data/a.txt').read()\nif __name__ == '__main__': raise ValueError"
    outcome = run_program(
        code,
        tests="assert (line, rest, data) == ('é', 'b\\n', 'x')",
        stdin="é\nb\n",
        files={"data/a.txt": "x"},
    )
    assert outcome.passed, outcome.detail
    assert run_program("input()", stdin="").status == "failed"
    with pytest.raises(SandboxError, match="leaves the sandbox"):
        run_program("1", files={"../a": b""})


def test_what_is_printed_is_kept_apart_from_the_verdict() -> None:
    outcome = run_program(
        "import sys\nprint('out', flush=True)\nprint('err', file=sys.stderr)\nsys.stdout.buffer.write(b'\\xff')",
        tests="print('from the tests')",
    )
    assert outcome.passed
    assert outcome.output == "out\n\\xfffrom the tests\n"
    assert outcome.errors == "err\n"
    assert run_program(
        "import sys\nsys.stdout.close()\nsys.stderr = None\ndef f(): return 1", tests="assert f() == 1"
    ).passed


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_limits_that_make_no_sense_are_refused(name: str) -> None:
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(SandboxError, match=f"{name} is .*; it must be a number above 0"):
            Limits(**{name: value})


def test_less_memory_than_python_needs_is_refused() -> None:
    with pytest.raises(SandboxError, match="Python itself needs 67,108,864"):
        Limits(memory_bytes=1 << 20)
    assert run_program(
        "def f(): return 1", tests="assert f() == 1", limits=Limits(memory_bytes=64 << 20)
    ).passed


def test_a_program_that_is_too_long_is_refused() -> None:
    with pytest.raises(SandboxError, match="too large for the sandbox"):
        run_program("#" * MAX_MESSAGE_BYTES)


def test_no_folder_process_or_descriptor_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # others make such folders at the same time
    descriptors = len(os.listdir("/proc/self/fd"))
    for without in ((), ("namespaces",)):
        run_without(without, "import os\nos.makedirs('a/b')\nos.chmod('a', 0)\nos.chmod('.', 0)")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run_program("x = 1"), range(8)))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
