"""The shared library through ctypes: found or built once per process, its functions with their types.

INTERNLM2_KERNELS lowers the instructions: avx512, avx2 or scalar; torch means the plain-torch twin.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internlm2.errors import ConfigError
from internlm2.kernels import build

VARIABLE = "INTERNLM2_KERNELS"
LEVELS = ("scalar", "avx2", "avx512")  # numbered as in layout.h

_log = logging.getLogger(__name__)


class CWeight(ctypes.Structure):
    """`Weight` of layout.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("padded_columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("num_parts", ctypes.c_int32),
        ("has_zeros", ctypes.c_int32),
        ("uses_hadamard", ctypes.c_int32),
    )


class CPages(ctypes.Structure):
    """`Pages` of layout.h."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("num_slots", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("element", ctypes.c_int32),
    )


class CLayer(ctypes.Structure):
    """`Layer` of layout.h."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm", "wqkv", "wo", "w13", "w2")
    )


class CDecoder(ctypes.Structure):
    """`Decoder` of layout.h."""

    _fields_ = (
        ("layers", ctypes.POINTER(CLayer)),
        ("norm", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("element", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class Library:
    """The functions that the C++ exports. NOTE: ctypes lets go of the GIL while they run."""

    path: Path
    linear: Callable[..., int]
    attend: Callable[..., int]
    write: Callable[..., None]
    decode: Callable[..., int]
    sample: Callable[..., int]
    read: Callable[[int, int, int], int]
    set_level: Callable[[int], int]
    level: Callable[[], int]
    detected_level: Callable[[], int]

    @property
    def level_name(self) -> str:
        """The instructions in use: scalar, avx2 or avx512."""
        return LEVELS[self.level()]


@functools.cache
def library() -> Library | None:
    """The library, or None where the twin must do: said once, with what to do about it. Raises ConfigError."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "torch", *LEVELS):
        raise ConfigError(f"{VARIABLE} is {wanted!r}, but must be torch, {', '.join(LEVELS)}, or not set.")
    if wanted == "torch":
        return None
    try:
        path = build.packaged_library()
        loaded = _open(path if path.exists() else build.build_cached(cache_folder()))
    except (build.BuildError, OSError) as error:
        _log.warning(
            "The C++ kernels are not available: %s. Plain torch computes instead, which is right but slow with packed "
            "weights. Install a C++ compiler (for example `apt install g++`), or name one in CXX; it is found at the "
            "next start.",
            error,
        )
        return None
    if wanted:
        loaded.set_level(LEVELS.index(wanted))
    return loaded


def cache_folder() -> Path:
    """Where libraries that are built on first use lie."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "internlm2" / "kernels"


def _open(path: Path) -> Library:
    loaded = ctypes.CDLL(str(path))
    pointer, i32, i64, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
    rows = (pointer, i64, pointer)  # spans, how many, runs
    signatures = {
        "linear": (i32, (pointer, pointer, i32, i64, i64, pointer, i32, i64, i32)),
        "attend": (i32, (pointer, i64, *rows, pointer, pointer, i32, i64, f32, i32)),
        "write": (None, (pointer, i64, pointer, i64, pointer, pointer, i32, i64, i64, i64, i64, i32)),
        "decode": (i32, (pointer, pointer, *rows, pointer, pointer, pointer, pointer, pointer, i64, i32)),
        "sample": (i32, (pointer, i64, i64, pointer, i64, pointer, pointer, i32)),
        "read": (ctypes.c_uint64, (pointer, i64, i32)),
        "set_level": (i32, (i32,)),
        "level": (i32, ()),
        "detected_level": (i32, ()),
    }
    functions = {}
    for name, (result, arguments) in signatures.items():
        function = loaded[f"internlm2_{name}"]
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return Library(path=path, **functions)
