"""Compile the C++ kernels into one shared library: when the package is installed, or on first use into a cache.

Only the standard library is imported: `hatch_build.py` loads this file before torch is there. Each instruction level
is a file with its own flags and none is built for "this machine", so a library moves between machines of one kind.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
# No contraction: a multiplication and an addition are fused only where the source says so, so that activations are
# rounded to the same whole numbers as in the torch twin.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",  # words are floats or pairs of bfloat16
)
LINK_FLAGS = ("-shared", "-pthread")
_AVX512 = ("f", "bw", "vl", "dq", "vnni", "bf16")
_LEVEL_FLAGS = {
    "avx2.cpp": ("-mavx2", "-mfma"),
    "avx512.cpp": ("-mavx2", "-mfma", *(f"-mavx512{part}" for part in _AVX512)),
}
TIMEOUT_SECONDS = 300


class BuildError(Exception):
    """The library could not be built. The text says why, in one sentence."""


def find_compiler() -> str | None:
    """The C++ compiler: what CXX names, else the first of the usual ones on PATH."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def source_key() -> str:
    """A short hash of everything that decides what the library does, the compiler apart."""
    digest = hashlib.sha256(repr((FLAGS, LINK_FLAGS, _LEVEL_FLAGS, platform.machine())).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def packaged_library() -> Path:
    """Where the library lies when it was built with the package."""
    return SOURCES.parent / f"kernels-{source_key()}.so"


def cached_library(folder: Path, compiler: str | None) -> Path | None:
    """The library in the cache `folder` that `compiler` made or will make; None when there is no way to one.

    Without a compiler, one that another compiler made of the same sources serves as well.
    """
    key = source_key()
    if compiler is None:
        return next(iter(sorted(folder.glob(f"kernels-{key}-*.so"))), None)
    found = Path(compiler).resolve()
    stat = found.stat()
    version = hashlib.sha256(repr((str(found), stat.st_size, stat.st_mtime_ns)).encode()).hexdigest()[:8]
    return folder / f"kernels-{key}-{version}.so"


def compile_library(target: Path, compiler: str) -> None:
    """Compile all sources and put the library at `target` by an atomic rename. Raises BuildError, OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    sources = [path for path in sorted(SOURCES.glob("*.cpp")) if is_x86 or path.name not in _LEVEL_FLAGS]
    with tempfile.TemporaryDirectory(prefix=".kernels-", dir=target.parent) as name:
        folder = Path(name)

        def compile_one(source: Path) -> str:
            compiled = folder / f"{source.stem}.o"
            _run(
                compiler,
                *FLAGS,
                *_LEVEL_FLAGS.get(source.name, ()),
                "-c",
                str(source),
                "-o",
                str(compiled),
            )
            return str(compiled)

        with ThreadPoolExecutor() as pool:
            compiled = list(pool.map(compile_one, sources))
        _run(compiler, *LINK_FLAGS, *compiled, "-o", str(folder / "library.so"))
        (folder / "library.so").replace(target)


def build_cached(folder: Path) -> Path:
    """The library in the cache, compiled now if need be; processes that start together compile once.

    Raises BuildError.
    """
    compiler = find_compiler()
    target = cached_library(folder, compiler)
    if target is None:
        raise BuildError("no C++ compiler was found")
    if target.exists():
        return target
    assert compiler is not None, "without one, only a library that exists is named"
    try:
        with _lock(folder / "kernels.lock"):
            if not target.exists():
                compile_library(target, compiler)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written ({error})") from error
    return target


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system lets go of it when a process dies."""
    try:
        import fcntl
    except ImportError as error:
        raise BuildError(f"the kernels are not built on {platform.system()}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(*command: str) -> None:
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["without a word"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise BuildError(f"{command[0]} failed: {reason}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not end within {TIMEOUT_SECONDS} s") from error
