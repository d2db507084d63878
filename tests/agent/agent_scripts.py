"""Replies and tools that several tests use."""

import json

from internlm2.agent import Reply, ToolCall, ToolError, tool

# Code that makes a picture, with a stand-in for matplotlib.
DRAW = """
import sys, types
class figure:
    def __init__(self, number): pass
    def savefig(self, target, format):
        target.write(b"\\x89PNG\\r\\n\\x1a\\n" + b"rest")
fake = types.ModuleType("matplotlib.pyplot")
fake.figure, fake.get_fignums, fake.close = figure, (lambda: [1]), (lambda which: None)
sys.modules["matplotlib"] = types.ModuleType("matplotlib")
sys.modules["matplotlib.pyplot"] = fake
"""


def call(name: str, _id: str = "any", **arguments: object) -> ToolCall:
    return ToolCall(_id, name, json.dumps(arguments))


def calls(*given: ToolCall, text: str = "", **options: object) -> Reply:
    return Reply(text, given, **options)


@tool
def double(x: int) -> int:
    """Double a number."""
    return 2 * x


@tool
def fail(why: str = "no") -> str:
    """Always fails."""
    raise ToolError(f"It failed: {why}.")


class Notes(list):
    """A listener that keeps events."""

    def __call__(self, event):
        self.append(dict(event))

    def of(self, kind):
        return [event for event in self if event["event"] == kind]
