"""The JSON schema that calls of tools have to obey, for a grammar that holds the model to it."""

from collections.abc import Mapping, Sequence

from internlm2.errors import RequestError

_DATA = frozenset({"const", "enum", "default", "examples"})  # what stands under these is no schema


def schema_of_calls(plugins: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The schema of a call of any of the functions. References inside a function's own schema go on to hold."""
    places: dict[str, object] = {}
    calls: list[dict[str, object]] = []
    for n, plugin in enumerate(plugins):
        given = plugin.get("parameters")
        if given is None:
            parameters: dict[str, object] = {
                "type": "object",
                "properties": {},
                "additionalProperties": False,
            }
        elif isinstance(given, Mapping):
            parameters = {"type": "object", **given}
        else:
            raise RequestError(
                f"The parameters of the tool {plugin['name']!r} are {given!r:.80}, but must be a JSON schema such as "
                '{"type": "object", "properties": {}}.'
            )
        name = f"tool{n}"
        places[name] = _moved(parameters, f"#/$defs/{name}")
        properties = {"name": {"const": plugin["name"]}, "parameters": {"$ref": f"#/$defs/{name}"}}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    head = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {
        **head,
        "$defs": places,
        "x-guidance": {"whitespace_pattern": " ?"},
    }  # no blank lines inside a call


def _moved(schema: object, place: str) -> object:
    """A schema that now stands at `place`: its references from the root are made to begin there."""
    if isinstance(schema, Mapping):
        moved: dict[str, object] = {}
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
                moved[key] = place + value[1:]
            elif key in _DATA and not isinstance(value, Mapping):
                moved[key] = value
            else:
                moved[key] = _moved(value, place)
        return moved
    if isinstance(schema, list | tuple):
        return [_moved(each, place) for each in schema]
    return schema
