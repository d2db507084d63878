# `pathlib` would lengthen the start of every sandbox by 4 ms.
# ruff: noqa: PTH103, PTH108, PTH120, PTH123
"""The untrusted side of a program: runs the code, then answers the calls of the tests."""

import _sitebuiltins
import binascii
import builtins
import io
import os
import sys
import types
from collections.abc import Callable, Mapping

from internlm2.sandbox import wire
from internlm2.sandbox.inside.values import CannotSendError, Plain, decode, encode

NAME = "<program>"
_MAX_TEXT = 20_000
_SOURCES: dict[str, str] = {}


def prepare(request: Mapping[str, object]) -> None:
    """Write the files the host gave, put the text in standard input, and hide our own modules."""
    files = request["files"]
    assert isinstance(files, dict)
    for name, content in files.items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            file.write(binascii.a2b_base64(content))
    with open(".stdin", "wb") as file:
        file.write(str(request["stdin"]).encode("utf-8", errors="surrogatepass"))
    descriptor = os.open(".stdin", os.O_RDONLY)
    os.unlink(".stdin")
    os.dup2(descriptor, 0)
    os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for descriptor in (1, 2):
        stream = io.TextIOWrapper(
            io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False)),
            encoding="utf-8",
            errors="backslashreplace",
            write_through=False,
        )
        setattr(sys, "stdout" if descriptor == 1 else "stderr", stream)
    for word in ("exit", "quit"):  # what the `site` module would have added
        setattr(builtins, word, _sitebuiltins.Quitter(word, "Ctrl-D"))
    for name in [name for name in sys.modules if name.split(".")[0] == "internlm2"]:
        del sys.modules[name]


def new_main(name: str) -> types.ModuleType:
    """An empty module that takes the place of `__main__` (dataclasses and pickle look there)."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    sys.modules["__main__"] = module
    return module


def serve(code: str, calls: int, answers: int) -> None:
    """Run `code`, say so, and answer calls until the tests close the pipe."""
    module = new_main("program")
    remember_source(code, NAME)
    try:
        exec(compile(code, NAME, "exec"), module.__dict__)
        flush()
        wire.send(answers, {"ran": True})
    except BaseException as error:
        flush()
        wire.send(answers, {"raised": type(error).__name__, "text": describe(error, NAME)})
        return
    objects: list[object] = []
    while (call := wire.receive(calls)) is not None:
        answer = _answer(call, module.__dict__, objects)
        flush()
        try:
            wire.send(answers, answer)
        except wire.WireError as error:
            wire.send(answers, {"raised": "CannotSendError", "text": str(error)})
        except MemoryError:
            wire.send(answers, {"raised": "MemoryError", "text": "the answer is too large"})


def flush() -> None:
    """Send on what was printed; what the user's code put in place of the streams may fail in any way."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue


def _answer(call: dict[str, object], names: dict[str, object], objects: list[object]) -> dict[str, object]:
    try:
        return _look_up(str(call["name"]), names, objects) if "name" in call else _reach(call, objects)
    except CannotSendError as error:
        return {"raised": "CannotSendError", "text": str(error)}
    except BaseException as error:
        return {"raised": type(error).__name__, "text": _short(error)}


def _keeper(objects: list[object]) -> Callable[[object], Plain]:
    def keep(value: object) -> Plain:
        objects.append(value)
        return {"handle": len(objects) - 1}

    return keep


def _look_up(name: str, names: dict[str, object], objects: list[object]) -> dict[str, object]:
    if name not in names:
        return {"missing": True}
    value = names[name]
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    return {"value": encode(value, handle=_keeper(objects))}


def _reach(call: dict[str, object], objects: list[object]) -> dict[str, object]:
    """Read an attribute of one of the program's objects, or call it."""

    def find(reference: object) -> object:
        if isinstance(reference, str):
            return getattr(builtins, reference)
        assert isinstance(reference, int)
        return objects[reference]

    keep = _keeper(objects)
    target = find(call["object"])
    if "attribute" in call:
        return {"value": encode(getattr(target, str(call["attribute"])), handle=keep)}
    arguments = decode(call["arguments"], handle=find)
    keywords = decode(call["keywords"], handle=find)
    result = target(*arguments, **keywords)  # pyrefly: ignore
    return {"value": encode(result, handle=keep), "changed": _changed(call["arguments"], arguments, keep)}


def _changed(before: object, arguments: object, keep: Callable[[object], Plain]) -> list[Plain]:
    """The arguments that the call changed in place, written anew; None for the others."""
    assert isinstance(before, list)
    assert isinstance(arguments, list)
    after = []
    for old, value in zip(before, arguments, strict=True):
        new = encode(value, handle=keep) if isinstance(value, list | dict | set | bytearray) else None  # pyrefly: ignore
        after.append(None if new == old else new)
    return after


def _short(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_TEXT]
    except BaseException:
        return "(its text cannot be made)"


def remember_source(source: str, name: str) -> None:
    """So that tracebacks show the lines of code that never was a file. (This is what `linecache.cache` holds.)"""
    _SOURCES[name] = source


def describe(error: BaseException, name: str) -> str:
    """The traceback as Python prints it, without our own frames, cut to a bounded length."""
    import linecache
    import traceback

    for known, source in _SOURCES.items():
        linecache.cache[known] = (len(source), None, (source + "\n").splitlines(keepends=True), known)
    try:
        trail = error.__traceback__
        while trail is not None and trail.tb_frame.f_code.co_filename != name:
            trail = trail.tb_next
        text = "".join(traceback.TracebackException(type(error), error, trail, limit=-20).format())
    except BaseException:
        text = f"{type(error).__name__}: {_short(error)}\n"
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT // 2]}\n[...]\n{text[-_MAX_TEXT // 2 :]}"
