"""Strict configuration: TOML file or dict -> frozen dataclass, command line on top.

An unknown key, a wrong type or an impossible value is an error that names the key, so a
misspelt option never trains or answers with defaults in silence.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import cattrs
import cattrs.errors
import tomli_w

from internlm2 import files
from internlm2.errors import ConfigError, InternLM2Error

T = TypeVar("T")


def from_dict(cls: type[T], data: Mapping[str, object], *, where: str) -> T:
    """Build the dataclass `cls` (nested ones too) from plain data.

    where: what to call the source in messages, such as the file name.
    Raises ConfigError for unknown keys, wrong types, and whatever `__post_init__` refuses.
    """
    check_keys(cls, data, where=where)
    try:
        return _converter().structure(dict(data), cls)
    except cattrs.errors.ClassValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(error)}") from error


def check_keys(cls: type, data: Mapping[str, object], *, where: str) -> None:
    """Raise ConfigError when `data` has a key that the dataclass `cls` (or a nested one) does not know."""
    hints = get_type_hints(cls)
    for key, value in data.items():
        if key not in hints:
            raise ConfigError(f"{where}: unknown key {key!r}. {suggest(key, list(hints))}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            check_keys(hints[key], value, where=f"{where} [{key}]")


def suggest(word: str, known: list[str]) -> str:
    """A sentence that offers the nearest known word, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."


def load_toml(cls: type[T], path: Path, *, overrides: Mapping[str, object] | None = None) -> T:
    """Read a TOML file into `cls`; `overrides` (from the command line) win over the file.

    Raises ConfigError when the file is missing, is not TOML, or does not fit `cls`.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"No configuration file {path}. Check the path given to --config.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}. Mend that line and try again.") from error
    return from_dict(cls, data | dict(overrides or {}), where=str(path))


def save_toml(config: object, path: Path) -> None:
    """Write a dataclass as TOML, so that `load_toml` gives an equal one. Fields that are None are left out."""
    data = cattrs.Converter().unstructure(config)
    files.write_text(path, tomli_w.dumps(_without_none(data)))


def _without_none(data: dict[str, object]) -> dict[str, object]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in data.items()
        if value is not None
    }


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    # NOTE: cattrs calls float("0.5"), int(0.7) and str(3) without a word; only exact types pass here.
    converter.register_structure_hook(float, _strict(float, (int, float), "a number"))
    converter.register_structure_hook(int, _strict(int, (int,), "a whole number"))
    converter.register_structure_hook(str, _strict(str, (str,), "a text in quotes"))
    converter.register_structure_hook(bool, _strict(bool, (bool,), "true or false"))
    converter.register_structure_hook_func(_is_number_or_word, _number_or_word)
    return converter


def _is_number_or_word(kind: object) -> bool:
    """Whether a field is as `int | Literal["auto"] | None`."""
    return get_origin(kind) in (Union, UnionType) and any(
        get_origin(part) is Literal for part in get_args(kind)
    )


def _number_or_word(value: object, kind: object) -> object:
    words = [word for part in get_args(kind) for word in get_args(part)]
    if value is None or value in words or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ConfigError(f"is {value!r}, but must be a whole number or {' or '.join(map(repr, words))}")


def _strict(target: type, accepted: tuple[type, ...], words: str):
    def structure(value: object, _: type) -> object:
        is_bool = isinstance(value, bool) and target is not bool
        if is_bool or not isinstance(value, accepted):
            raise ConfigError(f"is {value!r}, but must be {words}")
        return target(value)

    return structure


def _first_problem(error: cattrs.errors.BaseValidationError) -> str:
    if isinstance(error, cattrs.errors.ClassValidationError):
        for inner, note in error.group_exceptions()[0]:
            if isinstance(inner, cattrs.errors.BaseValidationError):
                return _first_problem(inner)
            if isinstance(inner, KeyError):
                return f"key {note.name!r} is missing"
            return f"key {note.name!r} {inner}"
    for inner in error.exceptions:
        if isinstance(inner, InternLM2Error):
            return str(inner)
    return str(error.exceptions[0])
