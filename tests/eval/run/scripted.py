"""Runs of a model that says what a function says."""

from collections.abc import Callable
from pathlib import Path

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.model import ScriptedModel
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import RunSettings, choose_questions
from internlm2.eval.results import Results
from internlm2.eval.runner import evaluate
from internlm2.eval.task import Item


def gold(item: Item) -> str:
    return item.gold


def asked(data: DataFolder, settings: RunSettings):
    return choose_questions(data, find_profile(settings.profile), settings)


def run(
    data: DataFolder, folder: Path, settings: RunSettings, say: Callable[[Item], str] = gold, **more
) -> Results:
    parts = asked(data, settings)
    items = {item.key: item for part in parts for item in part.items}
    return evaluate(ScriptedModel(lambda request: say(items[request.key])), parts, folder, settings, **more)


def as_in_the_examples(item: Item) -> str:
    if item.labels:
        return item.gold
    if item.task == "math":
        return f"So.\nFinal Answer: The final answer is ${item.gold}$. I hope it is correct.\n"
    return f"So the answer is {item.gold}."
