"""Functions as programs really have them: partials, methods, generators, new types, pydantic models."""

import enum
import functools
import json
import re
import typing
from datetime import date
from typing import Literal

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field

from internlm2.agent import ToolError, tool
from internlm2.agent.function.kinds import kind_of
from internlm2.agent.tool_type import ToolDefinitionError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def test_a_default_of_none_may_be_given_as_null():
    @tool
    def it(count: int = None, name: str | None = None) -> str:  # noqa: RUF013 - as many people write it
        """Nothing.

        Args:
            count: how many.
        """
        return repr((count, name))

    assert it.run({"count": None}).text == it.run({}).text == "(None, None)"
    assert it.run({"count": 3}).text == "(3, None)"
    with pytest.raises(ToolError, match="whole number"):
        it.run({"count": "3"})
    schema = it.parameters["properties"]
    assert schema["count"] == {
        "anyOf": [{"type": "integer"}, {"type": "null"}],
        "description": "how many.",
        "default": None,
    }
    assert schema["name"] == {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}


def test_functions_that_yield_are_refused():
    def plain(n: int):
        yield n

    async def asynchronous(n: int):
        yield n

    for each in (plain, asynchronous, functools.partial(plain, 3)):
        with pytest.raises(ToolDefinitionError, match="yields"):
            tool(name="it")(each)


class Odd(enum.Enum):
    THING = object()


@pytest.mark.parametrize("choice", [Odd, Literal[b"x"], Literal["a", Colour.RED], list[Odd]])
def test_choices_that_json_cannot_write_are_refused_where_the_tool_is_made(choice):
    with pytest.raises(ToolDefinitionError, match=r"it\(x\).* JSON cannot write"):
        kind_of(choice, "it(x)")


class Adder:
    """Adds."""

    def __call__(self, x: int, y: int = 1) -> int:
        """Add two numbers."""
        return x + y

    def method(self, x: int) -> int:
        """Add one."""
        return x + 1


def test_methods_partials_and_callable_objects_are_tools_and_bound_arguments_are_hidden():
    def secret(query: str, *, key: str, limit: int = 3) -> str:
        """Search."""
        return f"{query} {key} {limit}"

    found = tool(name="search")(functools.partial(functools.partial(secret, limit=5), key="k"))
    assert found.description == "Search."
    assert list(found.parameters["properties"]) == found.parameters["required"] == ["query"]
    assert found.run({"query": "q"}).text == "q k 5"
    with pytest.raises(ToolError, match="Unknown argument 'key'"):
        found.run({"query": "q", "key": "mine"})
    added = tool(name="add")(Adder())
    assert added.run({"x": 1}).text == "2"
    assert added.description == "Add two numbers."
    assert list(added.parameters["properties"]) == ["x", "y"]
    assert tool(Adder().method).run({"x": 1}).text == "2"


UserId = typing.NewType("UserId", int)


def test_a_new_type_is_what_it_is_made_of():
    assert kind_of(UserId, "it").schema == {"type": "integer"}


class Item(BaseModel):
    name: str = Field(description="of the thing", min_length=1)
    due: date | None = None
    count: int = 1


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")
    items: list[Item]
    main: Item | None = None
    colour: Colour = Colour.RED


class Tree(BaseModel):
    children: list["Tree"] = []


def test_a_pydantic_model_is_described_and_checked_by_itself():
    @tool
    def order(it: Order, others: list[Item] = []) -> str:  # noqa: B006
        """Order things."""
        return f"{it!r} {others!r}"

    text = json.dumps(order.parameters)
    assert "$ref" not in text
    assert "of the thing" in text
    good = {"items": [{"name": "tea", "due": "2024-03-26"}], "colour": "blue"}
    jsonschema.validate({"it": good}, order.parameters)
    told = order.run({"it": good, "others": [{"name": "x"}]}).text
    assert "Item(name='tea', due=datetime.date(2024, 3, 26), count=1)" in told
    assert "Colour.BLUE" in told
    for wrong, place in [
        ({"items": [{"name": 3}]}, "it.items.0.name"),
        ({"items": [{"name": ""}]}, "it.items.0.name"),
        ({"items": [{"name": "tea", "count": "3"}]}, "it.items.0.count"),
        ({"items": "x"}, "it.items"),
        ({"items": [], "z": 1}, "it.z"),
        (3, "it"),
    ]:
        with pytest.raises(ToolError, match=re.escape(place)):
            order.run({"it": wrong})
        assert not jsonschema.Draft202012Validator(order.parameters).is_valid({"it": wrong})


def test_a_pydantic_model_that_holds_itself_is_refused():
    with pytest.raises(ToolDefinitionError, match="holds itself"):
        kind_of(Tree, "it(x)")
