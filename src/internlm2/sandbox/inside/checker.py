"""The trusted side of a program: runs the tests against the code in the other process.

The untrusted code never runs here: its functions are stand-ins that send a call and take plain data back. So it cannot
patch `assert`, return an object with a lying `__eq__`, read the tests, or learn the sentinel.
"""

import builtins
import sys
import types
from collections.abc import Collection, Iterator

from internlm2.sandbox import wire
from internlm2.sandbox.inside.values import CannotSendError, Plain, decode, encode
from internlm2.sandbox.inside.worker import describe, new_main, remember_source

NAME = "<tests>"
_MODULES = sys.stdlib_module_names - {"antigravity", "this"}


class ProgramError(Exception):
    """The code under test raised an error of a class that the tests do not know."""


class ProgramEndedError(BaseException):
    """The process of the code under test is gone. Not an Exception: a test's `except Exception` must not hide it."""


class _Channel:
    """Sends calls to the untrusted process and makes values of its answers."""

    def __init__(self, calls: int, answers: int) -> None:
        self._calls, self._answers = calls, answers

    def next_answer(self) -> dict[str, object]:
        answer = wire.receive(self._answers)
        if answer is None:
            raise ProgramEndedError
        return answer

    def ask(self, message: dict[str, object]) -> dict[str, object]:
        try:
            wire.send(self._calls, message)
        except BrokenPipeError:
            raise ProgramEndedError from None
        answer = self.next_answer()
        if "raised" in answer:
            raise _error(str(answer["raised"]), str(answer.get("text")))
        return answer

    def call(self, number: int, arguments: tuple[object, ...], keywords: dict[str, object]) -> object:
        sent = [self.write(value) for value in arguments]
        answer = self.ask({"object": number, "arguments": sent, "keywords": self.write(keywords)})
        changed = answer.get("changed")
        if isinstance(changed, list):
            for value, new in zip(arguments, changed, strict=False):
                if new is not None:
                    _replace(value, self.read(new))
        return self.read(answer.get("value"))

    def read(self, data: object) -> object:
        return decode(data, handle=self._stand_in)

    def write(self, value: object) -> Plain:
        return encode(value, handle=_reference)

    def _stand_in(self, number: object) -> object:
        if not isinstance(number, int):
            raise ValueError("A handle is not a number.")
        return StandIn(self, number)


class StandIn:
    """Something that lives in the untrusted process. Equal to itself alone; it can be called and passed back."""

    def __init__(self, channel: _Channel, number: int) -> None:
        self._sandbox_channel, self._sandbox_number = channel, number
        self.__name__ = "program"

    def __call__(self, *arguments: object, **keywords: object) -> object:
        return self._sandbox_channel.call(self._sandbox_number, arguments, keywords)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        answer = self._sandbox_channel.ask({"object": self._sandbox_number, "attribute": name})
        return self._sandbox_channel.read(answer.get("value"))


def _reference(value: object) -> Plain:
    if isinstance(value, StandIn):
        return {"handle": value._sandbox_number}
    name = getattr(value, "__name__", "")
    if isinstance(value, type | types.BuiltinFunctionType) and getattr(builtins, name, None) is value:
        return {"handle": name}
    raise CannotSendError(
        f"The tests pass a {type(value).__name__}, which cannot be sent to the code under test."
    )


def _replace(value: object, new: object) -> None:
    """Make a list, dict, set or bytearray of the tests hold what the call left in its copy."""
    if isinstance(value, list | bytearray) and type(new) is type(value):
        value[:] = new
    elif isinstance(value, dict | set) and type(new) is type(value):
        value.clear()
        value.update(new)  # pyrefly: ignore


def _error(name: str, text: str) -> BaseException:
    kind = CannotSendError if name == "CannotSendError" else getattr(builtins, name, None)
    # NOTE: StopIteration would quietly end a `map` or `zip` of the tests, and with it their comparisons
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, StopIteration):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError wants five arguments
            pass
    return ProgramError(f"{name}: {text}")


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def check(requests: int, replies: int, calls: int, answers: int) -> None:
    """Wait until the code has run, run the tests, and send the sentinel back if all is well."""
    request = wire.receive(requests)
    if request is None:
        return
    tests = str(request["tests"])
    entry_points = request["entry_points"]
    assert isinstance(entry_points, list)
    channel = _Channel(calls, answers)
    try:
        first = channel.next_answer()
        if "raised" in first:
            verdict: dict[str, object] = {
                "where": "code",
                "kind": first["raised"],
                "text": first.get("text", ""),
            }
        else:
            _run(tests, entry_points, channel)
            verdict = {"sentinel": request["sentinel"]}
    except ProgramEndedError:
        verdict = {"ended": True}
    except BaseException as error:
        verdict = {"where": "tests", "kind": type(error).__name__, "text": describe(error, NAME)}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    wire.send(replies, verdict)


def _run(tests: str, entry_points: Collection[str], channel: _Channel) -> None:
    remember_source(tests, NAME)
    code = compile(tests, NAME, "exec")
    names = new_main("tests").__dict__
    for name in dict.fromkeys(_names(code)):
        if name.startswith("__") or (hasattr(builtins, name) and name not in entry_points):
            continue  # a program that redefines `len` or `set` must not redefine it for the tests
        answer = channel.ask({"name": name})
        if "missing" in answer:
            continue
        if name in _MODULES and name not in entry_points:
            names[name] = _imported(name)  # the true one, whatever the program calls so
        elif "module" in answer:
            if str(answer["module"]).split(".")[0] in _MODULES:
                names[name] = _imported(str(answer["module"]))
        else:
            value = channel.read(answer.get("value"))
            if isinstance(value, StandIn):
                value.__name__ = name
            names[name] = value
    exec(code, names)


def _imported(module: str) -> types.ModuleType:
    __import__(module)
    return sys.modules[module]
