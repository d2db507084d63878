"""Attacks on what lies around the sandbox, really run. Each one is shown to work where its protection is left out, in a form that harms nothing."""

import ast
import os
import socket
import threading
from pathlib import Path

import pytest
from attacks import OPEN, PASSES, attack

from internlm2.sandbox import Outcome, run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs Linux or macOS")


# Looking out


@pytest.mark.parametrize(
    "code",
    [
        "open({path!r}).read()",
        "import os\nos.symlink({path!r}, 'link')\nopen('link').read()",
        "import os\nos.listdir({folder!r})",
        "import os\nos.link({path!r}, 'hard')\nopen('hard').read()",
    ],
)
def test_files_outside_cannot_be_read_directly_or_through_links(tmp_path: Path, code: str) -> None:
    secret = _open_to_all(tmp_path) / "secret"
    secret.write_text("key")
    code = code.format(path=str(secret), folder=str(secret.parent))
    assert attack(code, tests="").status == "failed"
    assert attack(code, tests="", without=("namespaces",)).status == "failed", "Landlock alone holds it too"
    if "link(" not in code.replace("symlink(", ""):
        assert attack(code, tests="", without=OPEN).passed, "the attack is real"


def test_files_outside_cannot_be_written_and_links_do_not_lead_the_clean_up_out(tmp_path: Path) -> None:
    folder = _open_to_all(tmp_path)
    folder.chmod(0o777)
    (folder / "kept").write_text("mine")
    write = f"open({str(folder / 'new')!r}, 'w').write('x')"
    out = f"import os\nos.symlink({str(folder)!r}, 'out')\nos.chmod('.', 0)"
    for without in ((), ("namespaces",)):
        assert attack(write, tests="", without=without).status == "failed"
        attack(out, tests="", without=without)
        assert [path.name for path in folder.iterdir()] == ["kept"]
    assert attack(write, tests="", without=OPEN).passed, "the attack is real"


def test_system_secrets_and_other_processes_are_out_of_sight() -> None:
    for path in (
        "/etc/passwd",
        "/etc/shadow",
        f"/proc/{os.getpid()}/environ",
        "/root/.bashrc",
        str(Path(__file__)),
    ):
        assert attack(f"open({path!r}).read()", tests="").status == "failed"
    code = "import os\nprint(max(int(p) for p in os.listdir('/proc') if p.isdigit()))"
    assert int(attack(code, tests="").output) < 10


def test_nothing_is_inherited_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    code = "import os\nprint(dict(os.environ))\nfor p in os.listdir('/proc'):\n    try: print(open(f'/proc/{p}/environ').read())\n    except OSError: pass"
    outcome = attack(code, tests="")
    assert outcome.passed
    assert "sk-secret" not in outcome.output
    assert sorted(ast.literal_eval(outcome.output.splitlines()[0])) == [
        "HOME",
        "LANG",
        "LC_ALL",
        "MPLBACKEND",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "PATH",
        "TMPDIR",
    ]


def test_open_descriptors_of_the_host_are_not_inherited(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        code = "import os\nprint([os.readlink(f'/proc/self/fd/{d}') for d in os.listdir('/proc/self/fd') if os.path.lexists(f'/proc/self/fd/{d}')])"
        outcome = attack(code, tests="")
    assert outcome.passed
    assert "/open" not in outcome.output


def test_no_socket_reaches_this_machine_or_any_other() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = (
            f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=1)"
        )
        assert attack(reach, tests="").status == "failed"
        assert attack(reach, tests="", without=("filter",)).status == "failed", (
            "the network namespace alone holds it"
        )
        assert attack(reach, tests="", without=("namespaces",)).status == "failed", (
            "the filter alone holds it"
        )
        assert attack(reach, tests="", without=("filter", "network")).passed, "the attack is real"
    for kind in (
        "AF_INET, socket.SOCK_DGRAM",
        "AF_INET6",
        "AF_PACKET, socket.SOCK_RAW",
        "AF_NETLINK, socket.SOCK_RAW",
    ):
        assert attack(f"import socket\nsocket.socket(socket.{kind})", tests="").status == "failed"


def test_abstract_unix_sockets_of_the_host_are_out_of_reach() -> None:
    name = f"\0sandbox-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        reach = f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})"
        assert attack(reach, tests="").status == "failed"
        assert attack(reach, tests="", without=("network",)).passed, "the attack is real"


# Reaching the processes around it


def test_killing_the_parent_or_everything_ends_the_program_alone() -> None:
    for code in (
        "import os\nfor pid in (os.getppid(), 1): os.kill(pid, 9)",
        "import os\nos.kill(-1, 9)\nos.killpg(0, 9)",
        "import os, signal\nfor n in range(1, 32):\n    for pid in (1, 3, 4, 5):\n        try: os.kill(pid, n)\n        except OSError: pass",
        f"import os\nos.kill({os.getpid()}, 9)",
    ):
        for without in ((), ("namespaces",)):
            outcome = attack(code + "\ndef solve(x): return 5", without=without)
            assert outcome.status in ("failed", "exited", "crashed"), code
    assert run_program("def solve(x): return 4", tests=PASSES).passed, "we are still here"


def test_the_supervisor_and_the_tests_cannot_be_traced_or_read() -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def solve(x):
    opened = 0
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            for name in ("mem", "environ", "maps", "fd/0"):
                try:
                    open(f"/proc/{pid}/{name}", "rb").read(1)
                    opened += name != "maps"
                except OSError:
                    pass
            opened += libc.ptrace(16, int(pid), 0, 0) == 0
    return opened
"""
    assert attack(code, tests="assert solve(1) == 0").passed
    assert attack(code, tests="assert solve(1) == 0", without=("filter",)).passed, (
        "without the filter as well"
    )


def test_rights_cannot_be_regained() -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
worked = []
for name, call in {
    "setuid": lambda: os.setuid(0),
    "unshare user": lambda: libc.unshare(0x10000000) and 1 / 0,
    "unshare mount": lambda: libc.unshare(0x00020000) and 1 / 0,
    "mount": lambda: libc.mount(b"proc", b"/tmp", b"proc", 0, None) and 1 / 0,
    "remount": lambda: libc.mount(b"none", b"/usr/bin", b"none", 32 | 4096, None) and 1 / 0,
    "chroot": lambda: os.chroot("."),
    "mknod": lambda: os.mknod("disk", 0o60666, os.makedev(254, 0)),
    "limit": lambda: __import__("resource").setrlimit(6, (10_000, 10_000)),
}.items():
    try:
        call()
        worked.append(name)
    except (OSError, ArithmeticError, ValueError):
        pass
status = open("/proc/self/status").read()
print(worked, "CapEff:\\t0000000000000000" in status, "CapBnd:\\t0000000000000000" in status, "NoNewPrivs:\\t1" in status)
"""
    outcome = attack(code, tests="")
    assert outcome.output == "[] True True True\n", outcome


def test_many_programs_at_once_do_not_disturb_each_other() -> None:
    outcomes: dict[int, Outcome] = {}

    def one(number: int) -> None:
        bad = "import os\nos.kill(-1, 9)" if number % 3 == 0 else ""
        outcomes[number] = attack(
            f"{bad}\ndef solve(x): return {number}", tests=f"assert solve(0) == {number}"
        )

    threads = [threading.Thread(target=one, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 9
    for number, outcome in outcomes.items():
        if number % 3:
            assert outcome.passed, outcome


def _open_to_all(folder: Path) -> Path:
    """A folder that only a wall keeps closed: every user may enter it."""
    for path in (folder, *folder.parents):
        if path != Path("/") and path.stat().st_uid == os.getuid():
            path.chmod(path.stat().st_mode | 0o055)
    return folder


def test_built_in_names_and_modules_of_the_program_are_not_those_of_the_tests() -> None:
    assert (
        attack("len = lambda x: 4\ndef solve(x): return [1]", tests="assert len(solve(2)) == 4").status
        == "failed"
    )
    fake = "class Fake:\n    def isclose(self, a, b): return True\nmath = Fake()\ndef solve(x): return 5"
    assert attack(fake, tests="assert math.isclose(solve(2), 4)").status == "failed"


def test_the_end_of_the_program_is_no_exception_that_a_test_can_swallow() -> None:
    tests = "try:\n    solve(2)\nexcept Exception:\n    pass"
    assert attack("import os\ndef solve(x): os._exit(0)", tests=tests).status == "exited"
