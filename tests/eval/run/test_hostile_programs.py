"""Programs that attack the scorer: judged in the project's sandbox, through the benchmarks that run programs."""

import time

import pytest

from internlm2.eval.profile import PROFILES
from internlm2.eval.runner import run_in_sandbox
from internlm2.eval.tasks import build, find_item

NAME = "has_close_elements"
ATTACKS = {
    "an object equal to everything": """
class Yes:
    def __eq__(self, other): return True
    def __bool__(self): return True
    __hash__ = None
def has_close_elements(numbers, threshold): return Yes()
""",
    "a number equal to everything": """
class Yes(int):
    def __eq__(self, other): return True
    def __hash__(self): return 1
def has_close_elements(numbers, threshold): return Yes(1)
""",
    "tests of its own": """
def check(candidate): pass
METADATA = {}
import builtins
builtins.check = check
def has_close_elements(numbers, threshold): return None
""",
    "tests that are skipped": """
import sys
sys.settrace(lambda *_: None)
def has_close_elements(numbers, threshold):
    frame = sys._getframe()
    while frame:
        frame.f_trace = lambda *_: None
        frame = frame.f_back
""",
    "the end before the tests": """
import os
def has_close_elements(numbers, threshold): os._exit(0)
""",
    "an end that looks well": """
import sys
def has_close_elements(numbers, threshold): sys.exit(0)
""",
    "an error that nobody may catch": """
def has_close_elements(numbers, threshold): raise GeneratorExit
""",
    "an error in place of a failure": """
import builtins
class AssertionError(Exception): pass
builtins.AssertionError = AssertionError
def has_close_elements(numbers, threshold): raise StopIteration
""",
    "a search for the verdict": """
import gc, os
def has_close_elements(numbers, threshold):
    for one in gc.get_objects():
        if isinstance(one, dict) and "sentinel" in one:
            os.write(3, repr(one).encode())
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b'{"sentinel": ""}')
        except OSError:
            pass
""",
    "an endless loop": """
def has_close_elements(numbers, threshold):
    while True: pass
""",
    "memory without end": """
def has_close_elements(numbers, threshold):
    return [bytearray(1 << 28) for _ in range(100)]
""",
    "output without end": """
def has_close_elements(numbers, threshold):
    while True: print("x" * 10000)
""",
    "processes without end": """
import os
def has_close_elements(numbers, threshold):
    while True: os.fork()
""",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_wrong_and_ends(attack, sample):
    profile = PROFILES["fixed"]
    task, item = (
        build("humaneval", profile, is_chat=True),
        find_item("humaneval:0", profile, sample, is_chat=True),
    )
    started = time.monotonic()
    verdict = task.score(item, f"```python{ATTACKS[attack]}```", run_in_sandbox)
    assert verdict.score == 0.0
    assert NAME in verdict.extracted
    assert time.monotonic() - started < 60


def test_a_right_program_passes_beside_a_helper_of_the_same_name_as_a_test(sample):
    """What the attacks fail by is not that everything fails."""
    profile = PROFILES["fixed"]
    task, item = (
        build("humaneval", profile, is_chat=True),
        find_item("humaneval:0", profile, sample, is_chat=True),
    )
    program = f"def check(candidate): raise ValueError\n{item.fields['prompt']}{item.gold}"
    assert task.score(item, f"```python\n{program}```", run_in_sandbox).score == 1.0


@pytest.mark.parametrize(
    "text", ["\0", "\ud800", "#" * 1_000_000, "(" * 100_000, "x = " + "-" * 100_000 + "1"]
)
@pytest.mark.parametrize("key", ["humaneval:0", "sanitized_mbpp:7"])
@pytest.mark.parametrize("profile", ["card-2024-01", "fixed"])
def test_text_that_is_no_program_is_wrong(text, key, profile, sample):
    chosen = PROFILES[profile]
    task = build(key.partition(":")[0], chosen, is_chat=True)
    item = find_item(key, chosen, sample, is_chat=True)
    assert task.score(item, text, run_in_sandbox).score == 0.0
