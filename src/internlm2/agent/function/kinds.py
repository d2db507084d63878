"""Types and JSON: for an annotation, the schema that a model reads and the check that its arguments must pass.

Nothing is converted in silence: "3" is no whole number and 1 is no truth value. Only what JSON cannot tell apart is
brought into the asked type: 3.0 where a whole number is wanted, 3 where any number is, lists for tuples and sets.
"""

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

from internlm2.agent.function.models import is_pydantic, reader_of, schema_of
from internlm2.agent.tool_type import ToolDefinitionError, ToolError
from internlm2.config import suggest

_LISTS = (list, Sequence, Iterable, set, frozenset)  # of typing, get_origin gives those of collections.abc
_MOST_SHOWN = 80


@dataclass(frozen=True)
class Kind:
    """One type. schema: for the model. read: (JSON value, where it stands) -> Python value, or ToolError."""

    schema: dict[str, object]
    read: Callable[[object, str], object]


@dataclass(frozen=True)
class Field:
    """One named member of an object."""

    name: str
    kind: Kind
    is_required: bool


def kind_of(annotation: object, where: str, open_types: tuple[object, ...] = ()) -> Kind:
    """The kind of an annotation. where: names it in messages. Raises ToolDefinitionError for what JSON cannot say."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return described(kind_of(arguments[0], where, open_types), arguments[1:])
    if origin in (Required, NotRequired):
        return kind_of(arguments[0], where, open_types)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if annotation is Any or annotation is object:
        return Kind({}, lambda value, _: value)
    if origin is Literal:
        return _choice([(value, value) for value in arguments], where)
    kind = _container(annotation, where, open_types)
    if kind is None:
        raise ToolDefinitionError(
            f"{where} has the type {annotation!r}, which tools cannot describe. Use str, int, float, bool, list, dict, "
            "Literal, Optional, an Enum, a dataclass, a TypedDict or a pydantic model of these."
        )
    return kind


def _container(annotation: object, where: str, open_types: tuple[object, ...]) -> Kind | None:
    """The kind of a type that is made of others; None for what is not known."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in open_types:
        raise ToolDefinitionError(f"{where}: {annotation!r} holds itself, which tools cannot describe.")
    kind: Kind | None = None
    if isinstance(annotation, typing.NewType):
        kind = kind_of(annotation.__supertype__, where, open_types)
    elif origin in (Union, types.UnionType):
        kind = _union([kind_of(each, where, open_types) for each in arguments])
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        kind = _choice([(each.value, each) for each in annotation], where)
    elif _is_typeddict(annotation) or (isinstance(annotation, type) and dataclasses.is_dataclass(annotation)):
        kind = _class(annotation, where, (*open_types, annotation))
    elif is_pydantic(annotation):
        kind = Kind(schema_of(annotation, where), reader_of(annotation))
    elif origin is tuple or annotation is tuple:
        kind = _tuple(arguments or (Any, ...), where, open_types)
    elif origin in _LISTS or annotation in _LISTS:
        kind = _list(origin or annotation, arguments or (Any,), where, open_types)
    elif origin in (dict, Mapping) or annotation in (dict, Mapping):
        kind = _dict(arguments or (str, Any), where, open_types)
    return kind


def described(kind: Kind, notes: Sequence[object]) -> Kind:
    """The kind with the first text among `notes` as its description."""
    text = next((note for note in notes if isinstance(note, str)), None)
    return kind if text is None else Kind({**kind.schema, "description": text}, kind.read)


def object_schema(fields: Sequence[Field], rest: Kind | None = None) -> dict[str, object]:
    """The schema of an object with these members, and others of the kind `rest` if there is one."""
    return {
        "type": "object",
        "properties": {field.name: field.kind.schema for field in fields},
        "required": [field.name for field in fields if field.is_required],
        "additionalProperties": False if rest is None else rest.schema,
    }


def read_object(
    value: object, where: str, fields: Sequence[Field], rest: Kind | None = None
) -> dict[str, object]:
    """The members of a JSON object as Python values; absent ones stay absent. Raises ToolError."""
    if not isinstance(value, Mapping):
        raise _wrong(value, where, "an object")
    known = {field.name: field for field in fields}
    found: dict[str, object] = {}
    for name, member in value.items():
        inner = f"{where}.{name}" if where else str(name)
        if name in known:
            found[name] = known[name].kind.read(member, inner)
        elif rest is not None:
            found[str(name)] = rest.read(member, inner)
        else:
            hint = suggest(str(name)[:_MOST_SHOWN], list(known)) if known else "There are none."
            raise ToolError(f"Unknown argument {inner[:_MOST_SHOWN]!r}. {hint}")
    missing = [name for name, field in known.items() if field.is_required and name not in found]
    if missing:
        inside = f" of {where}" if where else ""
        raise ToolError(f"Missing argument{'s' if len(missing) > 1 else ''}{inside}: {', '.join(missing)}.")
    return found


def _wrong(value: object, where: str, allowed: str) -> ToolError:
    shown = repr(value)
    shown = shown if len(shown) <= _MOST_SHOWN else shown[:_MOST_SHOWN] + "..."
    return ToolError(f"{where or 'The arguments'}: {shown} is given, but must be {allowed}.")


def _text(value: object, where: str) -> object:
    if not isinstance(value, str):
        raise _wrong(value, where, "a text")
    return value


def _bool(value: object, where: str) -> object:
    if not isinstance(value, bool):
        raise _wrong(value, where, "true or false")
    return value


def _int(value: object, where: str) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(value, where, "a whole number")
    return value


def _float(value: object, where: str) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(value, where, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(value, where, "a number of ordinary size")
    return number


def _none(value: object, where: str) -> object:
    if value is not None:
        raise _wrong(value, where, "null")
    return None


def _parsed(make: Callable[[str], object], allowed: str) -> Callable[[object, str], object]:
    def read(value: object, where: str) -> object:
        try:
            return make(str(_text(value, where)))
        except ValueError:
            raise _wrong(value, where, allowed) from None

    return read


_PLAIN: dict[object, Kind] = {
    str: Kind({"type": "string"}, _text),
    bool: Kind({"type": "boolean"}, _bool),
    int: Kind({"type": "integer"}, _int),
    float: Kind({"type": "number"}, _float),
    None: Kind({"type": "null"}, _none),
    type(None): Kind({"type": "null"}, _none),
    Path: Kind({"type": "string"}, _parsed(Path, "a path")),
    date: Kind(
        {"type": "string", "format": "date"}, _parsed(date.fromisoformat, "a date such as 2024-03-26")
    ),
    datetime: Kind(
        {"type": "string", "format": "date-time"},
        _parsed(datetime.fromisoformat, "a time such as 2024-03-26T12:00:00+08:00"),
    ),
}


def _choice(pairs: Sequence[tuple[object, object]], where: str) -> Kind:
    """One of some values, each with what it means in Python."""
    values = [value for value, _ in pairs]
    for value in values:
        if not (value is None or type(value) in (str, bool, int, float)):
            raise ToolDefinitionError(
                f"{where} has the choice {value!r:.80}, which JSON cannot write. Use texts, numbers, true and false."
            )
    allowed = "one of " + ", ".join(map(repr, values))

    def read(value: object, where: str) -> object:
        for known, meaning in pairs:
            if type(known) is type(value) and known == value:
                return meaning
        raise _wrong(value, where, allowed)

    names: dict[type, str] = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
        type(None): "null",
    }
    kinds = sorted({names.get(type(value), "") for value in values})
    schema: dict[str, object] = {"enum": list(values)}
    return Kind({"type": kinds[0], **schema} if len(kinds) == 1 and kinds[0] else schema, read)


def _union(kinds: Sequence[Kind]) -> Kind:
    def read(value: object, where: str) -> object:
        problems = []
        for kind in kinds:
            try:
                return kind.read(value, where)
            except ToolError as error:
                problems.append(str(error))
        raise ToolError(" Or: ".join(dict.fromkeys(problems)))

    return Kind({"anyOf": [kind.schema for kind in kinds]}, read)


def _list(target: object, arguments: tuple, where: str, open_types: tuple[object, ...]) -> Kind:
    item = kind_of(arguments[0], f"{where}[]", open_types)

    def read(value: object, place: str) -> object:
        if not isinstance(value, list):
            raise _wrong(value, place, "a list")
        items = [item.read(each, f"{place}[{n}]") for n, each in enumerate(value)]
        if target in (set, frozenset):
            try:
                return set(items) if target is set else frozenset(items)
            except TypeError:
                raise _wrong(value, place, "a list of plain values") from None
        return items

    return Kind({"type": "array", "items": item.schema}, read)


def _tuple(arguments: tuple, where: str, open_types: tuple[object, ...]) -> Kind:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        inner = _list(list, arguments[:1], where, open_types)
        return Kind(inner.schema, lambda value, place: tuple(typing.cast(list, inner.read(value, place))))
    items = [kind_of(each, f"{where}[{n}]", open_types) for n, each in enumerate(arguments)]

    def read(value: object, place: str) -> object:
        if not isinstance(value, list) or len(value) != len(items):
            raise _wrong(value, place, f"a list of {len(items)} values")
        return tuple(
            item.read(each, f"{place}[{n}]") for n, (item, each) in enumerate(zip(items, value, strict=True))
        )

    count = len(items)
    return Kind(
        {"type": "array", "prefixItems": [i.schema for i in items], "minItems": count, "maxItems": count},
        read,
    )


def _dict(arguments: tuple, where: str, open_types: tuple[object, ...]) -> Kind:
    if arguments[0] is not str:
        raise ToolDefinitionError(
            f"{where} is a dict with keys of type {arguments[0]!r}, but keys in JSON are texts. Use dict[str, ...]."
        )
    rest = kind_of(arguments[1], f"{where}{{}}", open_types)
    return Kind(
        {"type": "object", "additionalProperties": rest.schema},
        lambda value, place: read_object(value, place, (), rest),
    )


def _is_typeddict(cls: object) -> bool:
    """As typing.is_typeddict, which does not know the twin of typing_extensions."""
    return isinstance(cls, type) and issubclass(cls, dict) and "__required_keys__" in vars(cls)


def _class(cls: object, where: str, open_types: tuple[object, ...]) -> Kind:
    hints = hints_of(cls, where)
    if _is_typeddict(cls):
        needed = getattr(cls, "__required_keys__")  # noqa: B009 - every TypedDict has it; type checkers do not know
        fields = [
            Field(name, kind_of(hint, f"{where}.{name}", open_types), name in needed)
            for name, hint in hints.items()
        ]
        return Kind(object_schema(fields), lambda value, place: read_object(value, place, fields))
    assert isinstance(cls, type)
    fields = []
    for each in dataclasses.fields(cls):
        if each.init:
            missing = dataclasses.MISSING
            is_required = each.default is missing and each.default_factory is missing
            kind = kind_of(hints[each.name], f"{where}.{each.name}", open_types)
            kind = kind if each.default is missing else with_default(kind, each.default)
            fields.append(Field(each.name, kind, is_required))

    def read(value: object, place: str) -> object:
        members = read_object(value, place, fields)
        try:
            return cls(**members)
        except (TypeError, ValueError) as error:  # what its own checks say
            raise ToolError(f"{place}: {error}") from error

    return Kind(object_schema(fields), read)


def with_default(kind: Kind, default: object) -> Kind:
    """The kind with its default in the schema, where JSON can write it. One with the default None also takes null."""
    value = default.value if isinstance(default, enum.Enum) else default
    if value is None and not _takes_null(kind):
        bare = {key: part for key, part in kind.schema.items() if key != "description"}
        kind = described(_union([Kind(bare, kind.read), _PLAIN[None]]), [kind.schema.get("description")])
    if value is None or isinstance(value, str | bool | int | float):
        is_number = not isinstance(value, float) or math.isfinite(value)
        return Kind({**kind.schema, "default": value}, kind.read) if is_number else kind
    return kind


def _takes_null(kind: Kind) -> bool:
    try:
        kind.read(None, "")
    except ToolError:
        return False
    return True


def hints_of(subject: object, where: str) -> dict[str, object]:
    """The annotations, resolved. Raises ToolDefinitionError when a name in them is unknown."""
    try:
        return typing.get_type_hints(subject, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise ToolDefinitionError(
            f"The annotations of {where} cannot be read: {error}. Types have to be known where the module begins."
        ) from error
