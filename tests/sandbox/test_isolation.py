# ruff: noqa: PTH208
"""What the sandbox says about itself is what it does."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from internlm2.sandbox import Isolation, SandboxError, examine_isolation, isolation, run_program
from internlm2.sandbox.program import run_without

WHOLE = Isolation(**{field.name: True for field in fields(Isolation) if field.name != "why_not"})
SYSTEM_PYTHON = Path("/usr/bin/python3.11")
SOURCE = Path(isolation.__file__).parents[2]


def test_every_protection_that_is_left_out_is_said_to_be_missing() -> None:
    missing = {
        ("namespaces",): "disk",
        ("filter",): "system_calls",
        ("network", "filter"): "network",
        ("limits",): "memory",
        ("namespaces", "files", "user"): "files",
    }
    for without, name in missing.items():
        seen = examine_isolation(without=without)
        assert not getattr(seen, name)
        assert not seen.is_complete
        assert any(line.startswith("NOT isolated") for line in seen.describe())


def test_the_statement_names_what_holds_what_does_not_and_what_never_does() -> None:
    text = "\n".join(WHOLE.describe())
    assert "NOT" not in text
    assert "network" in text
    assert text.count("Never isolated") == 3
    for field in fields(Isolation):
        if field.name != "why_not":
            one = replace(WHOLE, **{field.name: False})
            assert sum(line.startswith("NOT isolated: ") for line in one.describe()) == 1
    refused = replace(WHOLE, why_not="unshare: Operation not permitted").describe()
    assert "Namespaces were refused by the system: unshare: Operation not permitted." in refused
    nothing = Isolation(
        **dict.fromkeys((field.name for field in fields(Isolation) if field.name != "why_not"), False)
    )
    assert nothing.describe()[0] == "Isolated on this machine: nothing."


def test_a_system_that_gives_namespaces_but_no_mounts_still_isolates_files_and_network() -> None:
    seen = examine_isolation(without=("root",))
    assert seen.files
    assert seen.network
    assert seen.processes
    assert not seen.disk
    assert seen.why_not == "left out on request"


def test_without_any_namespace_landlock_and_the_filter_hold() -> None:
    seen = examine_isolation(without=("namespaces",))
    assert seen.files
    assert seen.network
    assert seen.processes
    assert seen.num_processes


def test_a_sandbox_that_does_not_work_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_PROBE", "1 / 0")
    with pytest.raises(SandboxError, match="The sandbox does not work here"):
        examine_isolation()


def test_windows_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        with pytest.raises(SandboxError, match="needs Linux or macOS"):
            run_program("1")


def test_a_setup_that_fails_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm2.sandbox.process._START", "raise SystemExit('no luck')")
    with pytest.raises(SandboxError, match="no luck"):
        run_program("1")
    monkeypatch.setattr("internlm2.sandbox.process._START", "import no_such_module")
    with pytest.raises(SandboxError, match="no_such_module"):
        run_program("1")


def test_a_system_that_starts_no_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SandboxError, match="Cannot start a sandbox process"):
        run_program("1")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(
    os.geteuid() != 0 or not SYSTEM_PYTHON.exists(), reason="becoming a plain user needs root"
)
@pytest.mark.parametrize("without", [(), ("namespaces",), ("root",)])
def test_a_plain_user_is_isolated_as_well(without: tuple[str, ...]) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(SOURCE)!r})
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
from internlm2.sandbox import examine_isolation
seen = examine_isolation(without={without!r})
print(seen.files, seen.network, seen.processes, seen.num_processes, seen.leftovers, seen.environment)
"""
    told = subprocess.run(
        [SYSTEM_PYTHON, "-B", "-c", code], capture_output=True, text=True, cwd="/", check=False
    )
    assert told.stdout.split() == ["True"] * 6, told.stderr


def test_the_room_loads_without_torch_or_any_package() -> None:
    code = "import internlm2.sandbox, sys; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'cattrs', 'rich')])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_each_program_has_a_user_of_its_own_when_we_are_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    users = {run_without((), "import os\nprint(os.getuid())").output for _ in range(3)}
    assert len(users) == 3
    assert all(int(user) > 1_000_000_000 for user in users)
