"""Pydantic models as arguments: their own schema, their own check. Who has a model has the package; others do without.

References within a schema are put in, since it becomes a part of another; a model that holds itself has no such form.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeGuard

from internlm2.agent.tool_type import ToolDefinitionError, ToolError

if TYPE_CHECKING:
    from pydantic import BaseModel

_REFERENCE = "#/$defs/"


def is_pydantic(annotation: object) -> "TypeGuard[type[BaseModel]]":
    """Whether an annotation is a class of pydantic's."""
    pydantic = sys.modules.get("pydantic")
    return (
        pydantic is not None and isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)
    )


def schema_of(model: "type[BaseModel]", where: str) -> dict[str, object]:
    """The JSON schema of a model, without references. Raises ToolDefinitionError where there is none."""
    import pydantic

    try:
        found = model.model_json_schema()
    except pydantic.errors.PydanticUserError as error:
        raise ToolDefinitionError(f"{where}: {model!r} has no JSON schema: {error.message}") from error
    known = found.pop("$defs", {})
    whole = _filled(found, known, (), f"{where}: {model!r}")
    assert isinstance(whole, dict)
    return whole


def reader_of(model: "type[BaseModel]") -> Callable[[object, str], object]:
    """(JSON value, where it stands) -> an instance of the model, or ToolError. Nothing is converted in silence."""
    import pydantic

    def read(value: object, where: str) -> object:
        try:
            return model.model_validate_json(json.dumps(value), strict=True)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join([where, *map(str, first["loc"])])
            raise ToolError(f"{place}: {first['msg']}.") from None

    return read


def _filled(node: object, known: Mapping[str, object], inside: tuple[str, ...], where: str) -> object:
    """A schema with what its references name in their place."""
    if isinstance(node, list):
        return [_filled(each, known, inside, where) for each in node]
    if not isinstance(node, dict):
        return node
    reference = node.get("$ref")
    if not isinstance(reference, str):
        return {key: _filled(value, known, inside, where) for key, value in node.items()}
    name = reference.removeprefix(_REFERENCE)
    if name in inside:
        raise ToolDefinitionError(f"{where} holds itself, which tools cannot describe.")
    beside = {key: value for key, value in node.items() if key != "$ref"}
    named = _filled(known[name], known, (*inside, name), where)
    assert isinstance(named, dict)
    return {**named, **beside}
