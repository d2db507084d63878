"""Plain values as JSON, exactly: what passes between the tests and the code under test.

Only values whose behaviour is Python's own cross over (numbers, text, bytes, lists, tuples, sets, dicts, None).
An object of any other class stays where it is and crosses as a numbered handle, so its `__eq__`, `__hash__` or
`__reduce__` never runs on the side that decides.
"""

import sys
from collections.abc import Callable
from itertools import islice
from types import GeneratorType

MAX_DEPTH = 150
MAX_ITERATOR_ITEMS = 100_000
_SAFE_INTEGER = 1 << 53
_AS_THEY_ARE = (bool, str, float)
_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset"}
_ITERATORS = (GeneratorType, map, filter, zip, enumerate, reversed, type(iter([])), type(iter(())))
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


_RARE: dict[type, Callable[..., Plain]] = {
    int: hex,
    bytes: bytes.hex,
    bytearray: bytearray.hex,
    complex: lambda value: [value.real, value.imag],
    range: lambda value: [value.start, value.stop, value.step],
}


class CannotSendError(Exception):
    """A value that cannot be written as plain data."""


def encode(value: object, *, handle: Callable[[object], Plain], depth: int = 0) -> Plain:
    """A value as JSON-able data.

    handle: gives the stand-in for a value that is not plain, or raises CannotSendError.
    Raises CannotSendError for values that are nested too deep or contain themselves.
    """
    if depth > MAX_DEPTH:
        raise CannotSendError(f"The value is nested more than {MAX_DEPTH} deep.")
    kind = type(value)
    if value is None or kind in _AS_THEY_ARE or (kind is int and abs(value) < _SAFE_INTEGER):  # pyrefly: ignore
        return value  # pyrefly: ignore[bad-return]

    def inner(item: object) -> Plain:
        return encode(item, handle=handle, depth=depth + 1)

    if kind is list:
        return [inner(item) for item in value]  # pyrefly: ignore[not-iterable]
    if kind in _SEQUENCES:
        return {_SEQUENCES[kind]: [inner(item) for item in value]}  # pyrefly: ignore[not-iterable]
    if kind is dict:
        return {"dict": [[inner(key), inner(item)] for key, item in value.items()]}  # pyrefly: ignore
    plainer = _plainer(value)
    return _rare(value, inner, handle) if plainer is value else inner(plainer)


def _plainer(value: object) -> object:
    """The plain value that a well-known subclass stands for (equal to it in Python's own eyes)."""
    kind = type(value)
    if kind.__module__ == "collections" and isinstance(value, dict):  # Counter, defaultdict, OrderedDict
        return dict(value)
    if kind.__module__ == "numpy" and isinstance(value, float):
        return float(value)
    if isinstance(value, tuple) and "_fields" in kind.__dict__:  # a named tuple
        return tuple(value)
    if kind in _VIEWS:
        return list(value)  # pyrefly: ignore
    return value


def _rare(value: object, inner: Callable[[object], Plain], handle: Callable[[object], Plain]) -> Plain:
    kind = type(value)
    name = kind.__name__
    if kind in _RARE:
        return {name: _RARE[kind](value)}
    if (kind.__module__, name) in (("decimal", "Decimal"), ("fractions", "Fraction")):
        return {name: str(value)}
    if kind in _ITERATORS:
        items = [inner(item) for item in islice(value, MAX_ITERATOR_ITEMS + 1)]  # pyrefly: ignore
        if len(items) > MAX_ITERATOR_ITEMS:
            raise CannotSendError(f"The iterator has more than {MAX_ITERATOR_ITEMS:,} items.")
        return {"iterator": items}
    return handle(value)


def decode(data: object, *, handle: Callable[[object], object]) -> object:
    """The value that `encode` wrote; always of exactly a built-in type, or what `handle` gives.

    Raises ValueError for data that `encode` does not write.
    """
    if isinstance(data, list):
        return [decode(item, handle=handle) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError(f"A value has {len(data)} tags; one is allowed.")
    (tag, content), *_ = data.items()
    if tag == "handle":
        return handle(content)
    if tag == "dict":
        return {decode(k, handle=handle): decode(v, handle=handle) for k, v in content}
    if tag in _MAKERS:
        return _MAKERS[tag](decode(content, handle=handle))
    raise ValueError(f"A value has the unknown tag {tag!r}.")


def _imported(module: str, name: str) -> Callable[[str], object]:
    """Imported when the first such value comes: these modules cost 10 ms and are rare."""
    __import__(module)
    return getattr(sys.modules[module], name)


_MAKERS: dict[str, Callable[[object], object]] = {
    "int": lambda text: int(str(text), 16),
    "tuple": tuple,  # pyrefly: ignore
    "set": set,  # pyrefly: ignore
    "frozenset": frozenset,  # pyrefly: ignore
    "bytes": lambda text: bytes.fromhex(str(text)),
    "bytearray": lambda text: bytearray.fromhex(str(text)),
    "complex": lambda parts: complex(*parts),  # pyrefly: ignore
    "range": lambda parts: range(*parts),  # pyrefly: ignore
    "Decimal": lambda text: _imported("decimal", "Decimal")(str(text)),
    "Fraction": lambda text: _imported("fractions", "Fraction")(str(text)),
    "iterator": iter,  # pyrefly: ignore
}
