# ruff: noqa: PTH208
"""A session behaves as a notebook does, and survives what is done to it."""

import base64
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from internlm2.sandbox import Interpreter, Limits, SandboxError

QUICK = Limits(wall_seconds=8, cpu_seconds=20, memory_bytes=512 << 20, disk_bytes=4 << 20, output_bytes=5000)
SHORT = replace(QUICK, wall_seconds=0.5)
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="
)
FAKE_PYPLOT = f"""
open_figures = [1, 2]
class figure:
    def __init__(self, number): self.number = number
    def savefig(self, target, format): target.write({PNG!r} if self.number == 1 else b"not a picture")
def get_fignums(): return list(open_figures)
def close(which): open_figures.clear()
"""


@pytest.fixture
def python() -> Iterator[Interpreter]:
    with Interpreter(limits=QUICK) as session:
        yield session


@pytest.fixture
def short() -> Iterator[Interpreter]:
    with Interpreter(limits=SHORT) as session:
        yield session


def test_variables_imports_and_files_last_from_call_to_call(python: Interpreter) -> None:
    assert python.execute("import math\nx = 6\nopen('kept', 'w').write('seen')").status == "ok"
    assert python.execute("x * 7, math.pi > 3, open('kept').read()").value == "(42, True, 'seen')"
    assert python.execute("_[0] + 1").value == "43"


def test_the_last_expression_is_the_value_unless_a_semicolon_hides_it(python: Interpreter) -> None:
    assert python.execute("1 + 1").value == "2"
    assert python.execute("1 + 1;").value is None
    assert python.execute("y = 5").value is None
    assert python.execute("None").value is None
    assert python.execute("").value is None
    assert "more characters" in str(python.execute("'x' * 100_000").value)


def test_printed_text_comes_in_order_from_python_c_and_child_processes(python: Interpreter) -> None:
    done = python.execute(
        "import os, sys\nprint('a', flush=True)\nos.system('echo b')\nprint('é中')\nsys.stderr.write('warn')"
    )
    assert done.output == "a\nb\né中\n"
    assert done.errors == "warn"
    assert python.execute("1").output == ""


def test_a_traceback_shows_the_user_frames_only(python: Interpreter) -> None:
    python.execute("def broken():\n    return 1 / 0")
    done = python.execute("broken()")
    assert done.status == "error"
    assert done.traceback.splitlines() == [
        "Traceback (most recent call last):",
        '  File "<cell 2>", line 1, in <module>',
        "    broken()",
        '  File "<cell 1>", line 2, in broken',
        "    return 1 / 0",
        "           ~~^~~",
        "ZeroDivisionError: division by zero",
    ]
    assert "SyntaxError" in python.execute("a = [1").traceback
    assert python.execute("raise SystemExit(3)").status == "error"
    assert python.execute("2").value == "2"


def test_a_long_call_is_interrupted_and_the_variables_stay(short: Interpreter) -> None:
    short.execute("x = 1")
    done = short.execute("while True: pass")
    assert done.status == "timeout"
    assert "0.5 s" in done.traceback
    assert not done.state_lost
    assert short.execute("x").value == "1"


def test_a_call_that_ignores_the_interrupt_is_ended_and_says_so(short: Interpreter) -> None:
    short.execute("x = 1")
    done = short.execute("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass")
    assert done.status == "timeout"
    assert done.state_lost
    assert "did not heed" in done.traceback
    assert "variables and files are gone" in done.traceback
    assert "NameError" in short.execute("x").traceback
    assert done.seconds < 4


def test_a_session_that_ends_itself_starts_anew(python: Interpreter) -> None:
    done = python.execute("print('last words', flush=True)\nimport os\nos._exit(0)")
    assert (done.status, done.state_lost, done.output) == ("ended", True, "last words\n")
    assert python.execute("1 + 1").value == "2"


def test_limits_hold_for_a_session() -> None:
    many = "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        data = bytearray(b'x') * (80 << 20)\n        time.sleep(5)\ntime.sleep(5)"
    with Interpreter(limits=replace(QUICK, memory_bytes=200 << 20)) as session:
        assert "MemoryError" in session.execute("data = bytearray(1 << 30)").traceback
        done = session.execute(many)
        assert (done.status, done.state_lost) == ("memory", True)
        assert "209,715,200 bytes of memory" in done.traceback
        assert (
            "No space"
            in session.execute("for n in range(9): open(f'f{n}', 'wb').write(bytes(1 << 20))").traceback
        )
    with Interpreter(limits=replace(QUICK, cpu_seconds=0.2)) as session:
        done = session.execute("while True: pass")
        assert (done.status, done.state_lost) == ("timeout", True)
        assert "0.2 s of processor time" in done.traceback


def test_long_output_is_cut_and_marked_and_the_session_goes_on(python: Interpreter) -> None:
    done = python.execute("print('x' * 1_000_000)")
    assert done.output_cut
    assert len(done.output) == 5000
    assert not python.execute("1").output_cut


def test_a_thread_that_prints_without_end_blocks_nobody(python: Interpreter) -> None:
    flood = "import threading, os\ndef flood():\n    while True: os.write(1, b'x' * 4096)\nthreading.Thread(target=flood, daemon=True).start()"
    started = time.monotonic()
    assert python.execute(flood).status == "ok"
    assert python.execute("1 + 1").value == "2"
    assert time.monotonic() - started < 3


def test_figures_come_back_as_png_and_what_is_not_png_does_not(python: Interpreter) -> None:
    files = {"matplotlib/__init__.py": "", "matplotlib/pyplot.py": FAKE_PYPLOT}
    with Interpreter(limits=QUICK, files=files) as session:
        assert session.execute("import matplotlib.pyplot as plt").pictures == (PNG,)
        assert session.execute("1").pictures == ()


def test_real_matplotlib_draws() -> None:
    pytest.importorskip("matplotlib")
    with Interpreter() as session:
        done = session.execute("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
        assert done.status == "ok", done
        assert len(done.pictures) == 1


def test_forged_replies_do_not_confuse_the_host(python: Interpreter) -> None:
    forge = "import os, json\nb = json.dumps({'number': 99, 'value': 'forged'}).encode()\nfor d in range(3, 200):\n    try: os.write(d, len(b).to_bytes(4, 'big') + b)\n    except OSError: pass"
    assert python.execute(forge).value is None
    assert python.execute("2").value == "2"
    done = python.execute(
        "for d in range(3, 200):\n    try: os.write(d, bytes([255] * 99))\n    except OSError: pass"
    )
    assert (done.status, done.state_lost) == ("ended", True)
    assert "wrote nonsense" in done.traceback
    assert python.execute("4").value == "4"


def test_sessions_of_two_users_are_apart() -> None:
    with Interpreter(limits=QUICK) as one, Interpreter(limits=QUICK) as other:
        one.execute("x = 1\nopen('/tmp/mine', 'w').write('1')")
        assert "NameError" in other.execute("x").traceback
        assert other.execute("import os\nos.path.exists('/tmp/mine')").value == "False"


def test_common_libraries_work_inside(python: Interpreter) -> None:
    code = "import asyncio, multiprocessing, subprocess, sys, tempfile\nasync def one(): return 1\nwith tempfile.NamedTemporaryFile() as f, multiprocessing.Pool(2) as pool:\n    r = (asyncio.run(one()), pool.map(abs, [-1, 2]), subprocess.run([sys.executable, '-c', 'print(5)'], capture_output=True, text=True).stdout)\nr"
    with Interpreter() as session:
        done = session.execute(code)
        assert done.value == "(1, [1, 2], '5\\n')", done
        assert session.execute("import numpy\nint(numpy.ones((50, 50)).sum())").value == "2500"


def test_closing_twice_and_forgetting_to_close_leave_nothing_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    session = Interpreter(limits=QUICK)
    session.close()
    session.execute("1")
    session.close()
    session.close()
    session.execute("1")
    del session
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_name_that_leaves_the_folder_and_a_cell_that_is_too_long_are_refused(python: Interpreter) -> None:
    for name in ("../x", "/etc/x", "a/../../x", "", "a\0b"):
        with pytest.raises(SandboxError, match="leaves the sandbox"):
            Interpreter(files={name: "x"})
    with pytest.raises(SandboxError, match="too large for the sandbox"):
        python.execute("#" * (40 << 20))


def test_a_session_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm2.sandbox.process._START", "raise SystemExit('no luck')")
    with pytest.raises(SandboxError, match="no luck"):
        Interpreter(limits=QUICK).execute("1")


def test_nothing_outlives_a_host_that_is_killed() -> None:
    marker = f"orphan-of-{os.getpid()}"
    code = f"""
from internlm2.sandbox import Interpreter
session = Interpreter()
session.execute("import os, sys\\nif os.fork() == 0: os.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(30)', '{marker}'])")
session.execute("import time; time.sleep(0.3)")
print("ready", flush=True)
session.execute("import time; time.sleep(20)")
"""
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    assert host.stdout.readline() == "ready\n"
    assert _commands_with(marker)
    host.send_signal(signal.SIGKILL)
    host.wait()
    host.stdout.close()
    give_up = time.monotonic() + 3
    while _commands_with(marker) and time.monotonic() < give_up:
        time.sleep(0.02)
    assert not _commands_with(marker)


def _commands_with(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").iterdir():
        try:
            text = (path / "cmdline").read_bytes() if path.name.isdigit() else b""
        except OSError:
            continue
        if text.endswith(marker.encode() + b"\0"):
            found.append(path.name)
    return found
