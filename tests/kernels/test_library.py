"""Where the library comes from: the package, the cache, a compiler, or nowhere, which is said once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from internlm2.errors import ConfigError
from internlm2.kernels import build
from internlm2.kernels.library import VARIABLE, Library, library

USE_TWICE = """
import torch
from internlm2 import log
from internlm2.kernels import linear, pack_bfloat16
log.configure()
weight = pack_bfloat16(torch.eye(40))
for _ in range(2):
    print(linear(torch.arange(40.0), weight).tolist() == list(range(40)))
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("CXX", VARIABLE)
    } | variables
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_without_a_compiler_the_twin_computes_and_says_so_once(tmp_path: Path) -> None:
    done = run(USE_TWICE, PATH="", XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert done.stderr.count("C++ kernels are not available: no C++ compiler was found.") == 1
    assert "Install a C++ compiler" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_compiler_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such processor' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run(USE_TWICE, CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert done.stderr.count("not available") == 1
    assert f"{compiler} failed: x.cpp:1: error: no such processor" in done.stderr
    assert [path.name for path in (tmp_path / "cache/internlm2/kernels").iterdir()] == ["kernels.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "internlm2").write_text("a file, not a folder")
    done = run(USE_TWICE, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert "cannot be written" in done.stderr


def test_processes_that_start_together_build_once(tmp_path: Path, built: Library) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "from internlm2.kernels.library import library; print(library().path)"]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=300)[0].strip() for process in both}
    found = [str(path) for path in (tmp_path / "internlm2/kernels").iterdir() if path.name != "kernels.lock"]
    assert paths == set(found)
    assert len(found) == 1
    again = run(command[2], XDG_CACHE_HOME=str(tmp_path), PATH="")  # built before: no compiler is needed
    assert again.stdout.strip() == found[0], again.stderr


@pytest.mark.parametrize("name", ["scalar", "avx2", "avx512"])
def test_the_variable_lowers_the_instructions(
    name: str, built: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, name)
    before = built.level()
    found = library.__wrapped__()
    expected = min(["scalar", "avx2", "avx512"].index(name), built.detected_level())
    assert found.level() == expected
    built.set_level(before)


def test_the_variable_turns_the_library_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert library.__wrapped__() is None


def test_an_unknown_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "avx1024")
    with pytest.raises(ConfigError, match="'avx1024', but must be torch, scalar, avx2, avx512, or not set"):
        library.__wrapped__()


def test_another_source_or_compiler_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/a.cpp").write_text("int a;")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "cpu")
    (tmp_path / "one").write_text("1")
    (tmp_path / "two").write_text("22")
    names = {build.cached_library(tmp_path, str(tmp_path / name)) for name in ("one", "two")}
    (tmp_path / "cpu/a.cpp").write_text("int b;")
    names.add(build.cached_library(tmp_path, str(tmp_path / "one")))
    assert len(names) == 3
