"""The untrusted side of an interpreter session: cells run one after another and share their variables.

A reply carries the value of a last expression as `repr` text, a traceback cut to the user's frames, and matplotlib
figures as PNG. What is printed goes through the process's own descriptors 1 and 2, so that C code is caught as well.
"""

import binascii
import io
import signal
import sys
import types

from internlm2.sandbox import wire
from internlm2.sandbox.inside.worker import describe, flush, new_main, remember_source

_MAX_VALUE_CHARACTERS = 20_000
_MAX_PICTURES = 8
_MAX_PICTURE_BYTES = 2 << 20


def serve(requests: int, replies: int) -> None:
    """Answer requests until the host closes the pipe."""
    module = new_main("__main__")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt that comes late ends nothing
    while (request := wire.receive(requests)) is not None:
        reply = _execute(str(request["code"]), f"<cell {request['number']}>", module)
        flush()
        wire.send(replies, {"number": request["number"], **reply})


def _execute(code: str, name: str, module: types.ModuleType) -> dict[str, object]:
    value: str | None = None
    reply: dict[str, object] = {}
    remember_source(code, name)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            body, last = _compile(code, name)
            exec(body, module.__dict__)
            if last is not None:
                value = _show(eval(last, module.__dict__), module)  # noqa: S307 - this is the sandbox
            reply["pictures"] = _pictures()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except BaseException as error:
        reply["error"] = type(error).__name__
        reply["traceback"] = describe(error, name)
        return reply
    return {**reply, "value": value}


def _compile(code: str, name: str) -> tuple[types.CodeType, types.CodeType | None]:
    """The statements, and the last one apart if it is an expression not followed by a semicolon."""
    import ast  # 5 ms that a program with tests need not pay

    tree = ast.parse(code, name)
    if tree.body and isinstance(tree.body[-1], ast.Expr) and not code.rstrip().endswith(";"):
        body = ast.Module(tree.body[:-1], tree.type_ignores)
        return compile(body, name, "exec"), compile(ast.Expression(tree.body[-1].value), name, "eval")
    return compile(tree, name, "exec"), None


def _show(value: object, module: types.ModuleType) -> str | None:
    if value is None:
        return None
    module.__dict__["_"] = value
    text = repr(value)
    if len(text) > _MAX_VALUE_CHARACTERS:
        return f"{text[:_MAX_VALUE_CHARACTERS]} [... {len(text) - _MAX_VALUE_CHARACTERS:,} more characters]"
    return text


def _pictures() -> list[str]:
    """The open matplotlib figures as base64 PNG; they are closed. None when matplotlib was not used."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    pictures = []
    for number in pyplot.get_fignums()[:_MAX_PICTURES]:
        target = io.BytesIO()
        pyplot.figure(number).savefig(target, format="png")
        if target.tell() <= _MAX_PICTURE_BYTES:
            pictures.append(binascii.b2a_base64(target.getvalue(), newline=False).decode("ascii"))
        else:
            print(
                f"[figure {number} is larger than {_MAX_PICTURE_BYTES:,} bytes and left out]", file=sys.stderr
            )
    pyplot.close("all")
    return pictures
