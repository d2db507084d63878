"""A typed function becomes a tool: its schema agrees with pydantic's judgement, its arguments are held to it."""

import dataclasses
import enum
import json
import typing
from datetime import date
from typing import Annotated, Any, Literal, NotRequired, Optional

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from internlm2.agent import Picture, Tool, ToolError, ToolResult, tool
from internlm2.agent.calling import read_arguments
from internlm2.agent.function.kinds import kind_of
from internlm2.agent.tool_type import ToolDefinitionError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: float
    y: float
    label: str = "here"
    __pydantic_config__ = ConfigDict(extra="forbid")


class Box(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")
    corner: Point
    size: NotRequired[int]


LEAVES = [str, bool, int, float, None, Literal["a", 2, None], Colour, Point, Box, Literal[2, 3]]
ANNOTATIONS = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: (
        inner.map(lambda t: list[t])
        | inner.map(lambda t: dict[str, t])
        | inner.map(lambda t: Optional[t])  # noqa: UP045 - `None | None` is no type
        | st.tuples(inner, inner).map(lambda pair: tuple[pair])
        | st.tuples(inner, inner).map(lambda pair: typing.Union[pair])  # noqa: UP007
    ),
    max_leaves=4,
)
POINTS = st.fixed_dictionaries(
    {"x": st.integers(-3, 3)}, optional={"y": st.just(1.5), "label": st.just("p"), "z": st.just(0)}
)
VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 2, 3.5, -7, "", "a", "red", "blue", "3", "true"]) | POINTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x", "y", "corner", "size", "k"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def accepts(read, value) -> bool:
    try:
        read(value)
    except (ToolError, ValidationError, jsonschema.ValidationError):
        return False
    return True


@given(annotation=ANNOTATIONS, value=VALUES)
@settings(max_examples=300, deadline=None)
def test_what_is_accepted_is_what_the_schema_and_pydantic_accept(annotation, value):
    kind = kind_of(annotation, "x")
    ours = accepts(lambda v: kind.read(v, "x"), value)
    jsonschema.Draft202012Validator.check_schema(kind.schema)
    assert ours == accepts(lambda v: jsonschema.validate(v, kind.schema), value)
    adapter = TypeAdapter(annotation)
    assert ours == accepts(lambda v: adapter.validate_json(json.dumps(v), strict=True), value)


@given(annotation=ANNOTATIONS, value=VALUES)
@settings(max_examples=200, deadline=None)
def test_an_accepted_value_is_read_as_pydantic_reads_it(annotation, value):
    try:
        found = kind_of(annotation, "x").read(value, "x")
    except ToolError:
        return
    expected = TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    # A union of whole numbers and others may be read either way; the value is the same.
    assert found == expected


@given(annotation=ANNOTATIONS, data=st.data())
@settings(max_examples=200, deadline=None)
def test_pydantics_own_schema_means_the_same(annotation, data):
    value = data.draw(VALUES)
    theirs = TypeAdapter(annotation).json_schema()
    ours = kind_of(annotation, "x").schema
    assert accepts(lambda v: jsonschema.validate(v, ours), value) == accepts(
        lambda v: jsonschema.validate(v, theirs), value
    )


def test_true_is_not_the_number_one():
    """JSON Schema tells them apart; pydantic does not (it takes true for Literal[1])."""
    kind = kind_of(Literal[1, "a"], "x")
    assert kind.read(1, "x") == 1
    with pytest.raises(ToolError, match="True is given, but must be one of 1, 'a'"):
        kind.read(True, "x")


def test_name_words_and_schema_come_from_signature_and_docstring():
    @tool
    def find(
        city: str,
        unit: Literal["C", "F"] = "C",
        days: Annotated[int, "how many days ahead"] = 1,
        *,
        tags: list[str] | None = None,
    ) -> str:
        """Tell the weather.

        It may be wrong.

        Args:
            city: where, in any language.
            days: not this, the annotation wins.
            tags: what else
                to look at.
        """
        return f"{city} {unit} {days} {tags}"

    assert find.name == "find"
    assert find.description == "Tell the weather.\n\nIt may be wrong."
    assert find.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "where, in any language."},
            "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            "days": {"type": "integer", "description": "how many days ahead", "default": 1},
            "tags": {
                "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                "description": "what else\nto look at.",
                "default": None,
            },
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    assert find.run({"city": "上海", "days": 3.0}) == ToolResult("上海 C 3 None")
    assert find.function == {"name": "find", "description": find.description, "parameters": find.parameters}


@pytest.mark.parametrize(
    "doc",
    [
        "Add.\n\n:param a: the first\n:param b: the second",
        "Add.\n\nParameters\n----------\na : int\n    the first\nb : int\n    the second",
        "Add.\n\nArgs:\n    a (int): the first\n    b: the second",
    ],
)
def test_docstrings_of_three_styles_are_read(doc):
    def add(a: int, b: int) -> int:
        return a + b

    add.__doc__ = doc
    made = tool(add)
    assert made.description == "Add."
    assert [each["description"] for each in made.parameters["properties"].values()] == [
        "the first",
        "the second",
    ]


def test_arguments_arrive_as_the_types_that_are_annotated():
    seen = []

    @tool(name="take", description="Takes.")
    def anything(  # noqa: PLR0917
        p: Point, box: Box, when: date, both: tuple[int, str], some: set[int], colour: Colour, **rest: int
    ):
        seen.append((p, box, when, both, some, colour, rest))

    arguments = {
        "p": {"x": 1, "y": 2.5}, "box": {"corner": {"x": 0, "y": 0, "label": "o"}}, "when": "2024-03-26",
        "both": [1, "a"], "some": [1, 1, 2], "colour": "blue", "more": 4,
    }  # fmt: skip
    assert anything.run(arguments) == ToolResult("")
    corner = Point(0.0, 0.0, "o")
    assert seen == [
        (Point(1.0, 2.5), {"corner": corner}, date(2024, 3, 26), (1, "a"), {1, 2}, Colour.BLUE, {"more": 4})
    ]
    assert (anything.name, anything.description) == ("take", "Takes.")
    with pytest.raises(ToolError, match=r"more: 'x' is given, but must be a whole number"):
        anything.run({**arguments, "more": "x"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Missing argument: count."),
        ({"count": "3"}, "count: '3' is given, but must be a whole number."),
        ({"count": True}, "count: True is given, but must be a whole number."),
        ({"count": 1.5}, "count: 1.5 is given"),
        ({"cuont": 1}, "Unknown argument 'cuont'. Did you mean 'count'?"),
        ({"count": 1, "share": 10**400}, "must be a number of ordinary size"),
        ({"count": 1, "points": [{"x": 1}]}, "Missing argument of points[0]: y."),
        ({"count": 1, "points": [{"x": 1, "y": "2"}]}, "points[0].y: '2' is given, but must be a number."),
        ({"count": 1, "points": [{"x": 1, "y": 2, "w": 0}]}, "Unknown argument 'points[0].w'."),
        ({"count": 1, "unit": "K"}, "unit: 'K' is given, but must be one of 'C', 'F'."),
        ({"count": 1, "maybe": 3}, "must be a text. Or: maybe: 3 is given, but must be null."),
        ({"count": 1, "unit": "x" * 10_000}, "..."),
    ],
)
def test_wrong_arguments_are_told_by_place(arguments, message):
    @tool
    def work(
        count: int,
        share: float = 0.5,
        points: list[Point] = [],  # noqa: B006
        unit: Literal["C", "F"] = "C",
        maybe: str | None = None,
    ) -> None:
        raise AssertionError("was called")

    with pytest.raises(ToolError) as caught:
        work.run(arguments)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_dataclass_that_refuses_its_values_is_told():
    @dataclasses.dataclass
    class Positive:
        value: int

        def __post_init__(self):
            if self.value <= 0:
                raise ValueError("value must be above 0")

    def work(value: Positive) -> None: ...

    with pytest.raises(ToolError, match="value: value must be above 0"):
        tool(work).run({"value": {"value": -1}})


def no_type(a): ...
def positional(a: int, /): ...
def star(*a: int): ...
def odd_key(a: dict[int, str]): ...
def a_class(a: "threading"): ...  # noqa: F821
def unknown(a: complex): ...


@dataclasses.dataclass
class Tree:
    children: "list[Tree]"


def recursive(tree: Tree): ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_type, r"no_type\(a\) has no type"),
        (positional, "called by names only"),
        (star, "called by names only"),
        (odd_key, "keys in JSON are texts"),
        (a_class, "cannot be read: name 'threading' is not defined"),
        (unknown, "has the type <class 'complex'>, which tools cannot describe"),
        (recursive, "holds itself"),
        (lambda: 1, "A tool is named '<lambda>'"),
    ],
)
def test_functions_that_no_tool_can_be_made_of_are_refused(function, message):
    with pytest.raises(ToolDefinitionError, match=message):
        tool(function)


def test_callables_without_a_name_need_one():
    class Add:
        def __call__(self, a: int) -> int:
            return a + 1

    with pytest.raises(ToolDefinitionError, match="has no name of its own"):
        tool(Add())


@pytest.mark.parametrize("name", ["", "two words", "1st", "x" * 65, "名"])
def test_names_that_apis_refuse_are_refused(name):
    with pytest.raises(ToolDefinitionError, match="A tool is named"):
        Tool(name, "", {}, lambda _: ToolResult(""))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        (None, ""),
        ({"a": [1, "中"]}, '{"a": [1, "中"]}'),
        (Point(1, 2), '{"x": 1, "y": 2, "label": "here"}'),
        ([Colour.RED, {3, 1}, date(2024, 1, 2)], '["red", [1, 3], "2024-01-02"]'),
        (3.5, "3.5"),
        (b"raw", "b'raw'"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
    ],
)
def test_what_a_function_returns_becomes_text(value, text):
    def give() -> Any:
        return value

    assert tool(give).run({}) == ToolResult(text)


def test_pictures_and_results_pass_as_they_are():
    picture = Picture("image/png", b"\x89PNG")
    results = [picture, ToolResult("t", (picture,), is_error=True)]

    def give(n: int) -> Any:
        return results[n]

    assert tool(give).run({"n": 0}) == ToolResult("", (picture,))
    assert tool(give).run({"n": 1}) == results[1]


@pytest.mark.parametrize(
    "text", ["[1]", "3", "{'a': 1}", '{"a": NaN}', '{"a": Infinity}', '{"a": 1', '{"a": 1} x', "[" * 100_000]
)
def test_arguments_that_are_no_json_object_are_refused(text):
    with pytest.raises(ToolError, match="JSON object"):
        read_arguments(text)
    assert read_arguments("  ") == {}


def test_typed_dicts_of_the_standard_library_are_known_too():
    class Plain(typing.TypedDict, total=False):
        a: typing.Required[int]
        b: str

    kind = kind_of(Plain, "x")
    assert kind.schema["required"] == ["a"]
    assert kind.read({"a": 1}, "x") == {"a": 1}
    with pytest.raises(ToolError, match=r"x\.b: 1 is given"):
        kind.read({"a": 1, "b": 1}, "x")
