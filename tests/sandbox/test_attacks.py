"""Attacks that really run. Each one is shown to work where its protection is left out, in a form that harms nothing."""

import os
import time

import pytest
from attacks import PASSES, QUICK, SHORT, attack, commands_with, eventually, num_processes

from internlm2.sandbox import Limits

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs Linux or macOS")


# Pretending to have passed


@pytest.mark.parametrize(
    "leave",
    [
        "import sys; sys.exit(0)",
        "exit()",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os; os.execv('/bin/true', ['true'])",
        "import ctypes; ctypes.CDLL(None).exit(0)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_leaving_early_with_any_exit_code_is_no_pass(leave: str) -> None:
    assert attack(leave).status in ("exited", "crashed")
    assert attack(leave, tests="").status in ("exited", "crashed")
    assert attack(f"def solve(x):\n    {leave}").status in ("exited", "crashed", "failed")


def test_an_object_that_equals_everything_fails_the_comparison() -> None:
    liar = (
        "class Liar:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
    )
    assert attack(liar + "def solve(x): return Liar()").status == "failed"
    for base in ("int", "str", "list", "dict", "tuple", "float"):
        assert (
            attack(liar.replace("Liar:", f"Liar({base}):") + "def solve(x): return Liar()").status == "failed"
        )


def test_a_stand_in_cannot_be_ordered_hashed_or_converted_into_a_right_answer() -> None:
    code = "class Liar:\n    __int__ = __index__ = __len__ = lambda s: 4\n    __hash__ = lambda s: hash(4)\n    def __eq__(s, o): return True\ndef solve(x): return Liar()"
    for tests in (
        "assert int(solve(2)) == 4",
        "assert solve(2) in {4}",
        "assert len(solve(2)) == 4",
        "assert not solve(2) != 4",
    ):
        assert attack(code, tests=tests).status == "failed"


@pytest.mark.parametrize(
    "code",
    [
        "import builtins\nbuiltins.AssertionError = type('Quiet', (Exception,), {})",
        "import builtins\nfor name in ('len', 'set', 'sorted', 'isinstance', 'abs', 'all'):\n    setattr(builtins, name, lambda *a, **k: 0)",
        "import sys\nsys.excepthook = lambda *a: sys.exit(0)",
        "import sys\ndef skip(frame, event, argument):\n    frame.f_trace_lines = True\n    return skip\nsys.settrace(skip)",
        "import atexit, os\natexit.register(os._exit, 0)",
        "import gc, types\nfor f in gc.get_objects():\n    if isinstance(f, types.FunctionType) and f.__module__.startswith('internlm2') and f.__name__ in ('check', '_run', '_error'):\n        f.__code__ = (lambda *a, **k: None).__code__",
        "import math\nmath.isclose = lambda *a, **k: True\nset = len = sorted = isinstance = lambda *a: 0",
    ],
)
def test_patching_assert_builtins_hooks_or_our_own_functions_changes_no_verdict(code: str) -> None:
    wrong = code + "\ndef solve(x): return 5"
    assert attack(wrong).status == "failed"
    tests = "import math\nassert len(set([solve(2)]) - {4}) == 0 and math.isclose(solve(2), 4)"
    assert attack(wrong, tests=tests).status == "failed"
    assert attack(wrong, tests="assert math.isclose(solve(2), 4)").status == "failed"


def test_a_forged_sentinel_or_verdict_on_every_descriptor_is_no_pass() -> None:
    code = """
import json, os
for text in ({"sentinel": ""}, {"sentinel": "0" * 64}, {"ran": True}, {"report": "", "reason": "", "worker": 0}):
    body = json.dumps(text).encode()
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, len(body).to_bytes(4, "big") + body)
        except OSError:
            pass
os._exit(0)
"""
    assert attack(code).status in ("exited", "failed")


def test_the_tests_and_the_sentinel_are_nowhere_in_the_program_process() -> None:
    code = """
import re
def solve(x):
    found = 0
    for line in open("/proc/self/maps"):
        if " rw-p" in line and "[v" not in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            with open("/proc/self/mem", "rb") as memory:
                memory.seek(start)
                try:
                    found += bool(re.search(rb"SECRET_OF_THE_TESTS_[7]", memory.read(end - start)))
                except OSError:
                    pass
    return found
"""
    assert attack(code, tests="mark = 'SECRET_OF_THE_TESTS_7'\nassert solve(2) == 0").passed
    assert attack(code, tests="assert solve('SECRET_OF_THE_TESTS_7') != 0").passed, (
        "the search finds what is there"
    )


def test_unpickling_tricks_never_run_on_the_deciding_side() -> None:
    code = """
import os
class Trick:
    def __reduce__(self): return (os.system, ("touch /tmp/tricked",))
    def __getstate__(self): raise SystemExit(0)
    def __deepcopy__(self, memo): return 4
    def __repr__(self): return "4"
    __class__ = int
def solve(x): return Trick()
"""
    for tests in (
        PASSES,
        "import copy\nassert copy.deepcopy(solve(2)) == 4",
        "import pickle\nassert pickle.loads(pickle.dumps(solve(2))) == 4",
    ):
        assert attack(code, tests=tests).status == "failed"


def test_a_program_cannot_hide_its_end_behind_a_test_that_catches_everything() -> None:
    tests = "try:\n    solve(2)\nexcept Exception:\n    pass\ntry:\n    solve(3)\nexcept BaseException:\n    raise"
    assert attack("import os\ndef solve(x): os._exit(0)", tests=tests).status == "exited"


def test_stop_iteration_does_not_end_the_comparisons_of_the_tests() -> None:
    tests = "for got, wanted in zip(map(solve, [1, 2]), [2, 4]):\n    assert got == wanted"
    assert attack("def solve(x): raise StopIteration", tests=tests).status == "failed"
    assert attack("def solve(x): return 2 * x", tests=tests).passed


# Taking too much


def test_a_fork_bomb_is_held_to_the_limit_and_leaves_nothing() -> None:
    count = """
import os
children = 0
wait, hold = os.pipe()
for _ in range(40):
    try:
        child = os.fork()
    except OSError:
        break
    if child == 0:
        os.close(hold)
        os.read(wait, 1)
        os._exit(0)
    children += 1
print(children)
"""
    mild = attack(count, tests="")
    assert mild.passed
    assert int(mild.output) < QUICK.num_processes
    assert int(attack(count, tests="", without=("limits",)).output) == 40, "without limits they all start"
    before = num_processes()
    started = time.monotonic()
    endless = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    bomb = attack(endless, limits=SHORT)
    assert bomb.status == "timeout"
    assert time.monotonic() - started < 4
    eventually(lambda: num_processes() <= before + 3)


def test_daemons_that_forked_twice_die_with_the_sandbox() -> None:
    marker = f"sandbox-daemon-{os.getpid()}"
    code = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(30)", "{marker}"])
    os._exit(0)
os.wait()
time.sleep(0.3)
print(sum(b"{marker}" in open(f"/proc/{{p}}/cmdline", "rb").read() for p in os.listdir("/proc") if p.isdigit()))
"""
    outcome = attack(code, tests="")
    assert outcome.passed
    assert outcome.output.strip() == "1", "the daemon was there"
    eventually(lambda: not commands_with(marker))
    fallback = attack(
        code.replace("/proc/{p}/cmdline", "/dev/null").replace('os.listdir("/proc")', "()"),
        tests="",
        without=("namespaces",),
    )
    assert fallback.passed
    eventually(lambda: not commands_with(marker))


def test_a_memory_bomb_in_one_process_gets_an_error() -> None:
    assert attack("data = bytearray(1 << 30)").status == "memory"
    survivor = "try:\n    data = bytearray(1 << 30)\nexcept MemoryError:\n    print('refused')"
    assert attack(survivor, tests="").output == "refused\n"
    assert attack("def solve(x):\n    return len(bytearray(1 << 30))").status == "memory"
    assert attack("data = bytearray(300 << 20)", tests="", without=("limits",)).passed


def test_a_memory_bomb_in_many_small_processes_is_ended() -> None:
    code = """
import os, time
for _ in range(5):
    if os.fork() == 0:
        data = bytearray(b"x") * (100 << 20)
        time.sleep(20)
        os._exit(0)
time.sleep(20)
"""
    outcome = attack(code)
    assert outcome.status == "memory"
    assert "256" in outcome.detail or "268,435,456" in outcome.detail


def test_memory_that_belongs_to_no_process_cannot_be_taken() -> None:
    assert attack("import os\nos.memfd_create('x')", tests="").status == "failed"
    assert attack("import os\nos.memfd_create('x')", tests="", without=("filter",)).passed
    shared = "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) < 0"
    assert attack(shared, tests="").passed
    assert attack(shared, tests="", without=("filter",)).status == "failed"


def test_endless_loops_end_in_python_in_c_and_with_signals_ignored() -> None:
    limits = Limits(wall_seconds=0.3)
    for loop in (
        "while True: pass",
        "sum(iter(int, 1))",
        "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass",
        "import time\ntime.sleep(60)",
    ):
        started = time.monotonic()
        assert attack(loop, limits=limits).status == "timeout"
        assert time.monotonic() - started < 2.5
    assert attack("def solve(x):\n    while True: pass", limits=limits).status == "timeout"


def test_processor_time_is_counted_over_all_processes() -> None:
    code = "import os\nos.fork(); os.fork()\nwhile True: pass"
    outcome = attack(code, limits=Limits(wall_seconds=8, cpu_seconds=0.4))
    assert outcome.status == "timeout"
    assert "processor time" in outcome.detail
    assert outcome.seconds < 3


def test_ten_gigabytes_cannot_be_written_to_one_file_or_to_many() -> None:
    limits = Limits(file_bytes=1 << 20, disk_bytes=8 << 20)
    one = "piece = bytes(1 << 16)\nwith open('big', 'wb') as file:\n    for _ in range(10 << 14):\n        file.write(piece)"
    outcome = attack(one, limits=limits)
    assert outcome.status == "failed"
    assert "File too large" in outcome.detail
    many = "for n in range(10 << 14):\n    print(n, flush=True)\n    with open(f'big{n}', 'wb') as file:\n        file.write(bytes(1 << 16))"
    outcome = attack(many, limits=limits)
    assert outcome.status == "failed"
    assert "No space left" in outcome.detail
    assert int(outcome.output.split()[-1]) <= (8 << 20) // (1 << 16)
    assert attack(many, limits=limits, without=("namespaces",)).status == "disk"
    mild = "open('big', 'wb').write(bytes(2 << 20))"
    assert attack(mild, tests="", limits=limits).status == "failed"
    assert attack(mild, tests="", limits=limits, without=("limits",)).passed


def test_endless_output_is_ended_and_kept_short() -> None:
    for stream in (1, 2):
        outcome = attack(
            f"import os\nwhile True: os.write({stream}, b'x' * 65536)",
            limits=Limits(wall_seconds=9, cpu_seconds=9, output_bytes=10_000),
        )
        assert outcome.status == "output"
        assert outcome.seconds < 8, "ended at once, not by another limit"
        assert len(outcome.output) + len(outcome.errors) == 10_000


def test_a_huge_or_malformed_answer_is_a_failure_not_a_burden() -> None:
    assert attack("def solve(x): return 'x' * (100 << 20)").status in ("failed", "memory")
    assert (
        attack("def solve(x):\n    a = []\n    for _ in range(5000): a = [a]\n    return a").status
        == "failed"
    )
    assert attack("def solve(x):\n    a = []\n    a.append(a)\n    return a").status == "failed"
    assert attack("def solve(x):\n    while True: yield x", tests="list(solve(2))").status == "failed"
    nonsense = "import os\nfor d in range(3, 64):\n    try: os.write(d, bytes([255] * 4096))\n    except OSError: pass"
    assert attack(nonsense).status == "failed"
