"""The benchmarks by name, and how to find one item of them.

`build` gives a `Task` bound to a profile and a mode; `find_item` reads a key such as "mmlu.anatomy:3".
"""

import re
from collections.abc import Callable, Mapping
from functools import partial

from internlm2.config import suggest
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.profile import Profile
from internlm2.eval.task import EvalError, Item, Task
from internlm2.eval.tasks.agieval import AGIEval
from internlm2.eval.tasks.arithmetic import GSM8K, MATH
from internlm2.eval.tasks.bbh import BBH
from internlm2.eval.tasks.instructions import IFEval
from internlm2.eval.tasks.knowledge import Knowledge
from internlm2.eval.tasks.long.leval import LEval
from internlm2.eval.tasks.long.longbench import LongBench
from internlm2.eval.tasks.long.needle import NeedleTest
from internlm2.eval.tasks.long.needle_forms import FORMS as NEEDLES
from internlm2.eval.tasks.programs import HumanEval, SanitizedMBPP

TASKS: Mapping[str, Callable[[Profile, bool], Task]] = {
    "mmlu": partial(Knowledge, "mmlu"),
    "agieval": AGIEval,
    "bbh": BBH,
    "gsm8k": GSM8K,
    "math": MATH,
    "humaneval": HumanEval,
    "sanitized_mbpp": SanitizedMBPP,
    "ceval": partial(Knowledge, "ceval"),
    "cmmlu": partial(Knowledge, "cmmlu"),
    "ifeval": IFEval,
    "longbench": LongBench,
    "leval": LEval,
    **{name: partial(NeedleTest, name) for name in NEEDLES},
}
"""Every benchmark; the first seven are those of the model card, in its order."""
CARD_TASKS = tuple(TASKS)[:7]


def build(name: str, profile: Profile, *, is_chat: bool) -> Task:
    """The benchmark `name` under a profile, for a base or a chat model. Raises EvalError for other names."""
    if name not in TASKS:
        raise EvalError(f"There is no benchmark {name!r}. {suggest(name, list(TASKS))}")
    return TASKS[name](profile, is_chat)


def find_item(key: str, profile: Profile, data: DataFolder, *, is_chat: bool) -> Item:
    """The item that TASK[.SUBSET]:INDEX names, such as "gsm8k:0" or "bbh.navigate:12".

    Raises EvalError for a key of another form or that names nothing, DataError for missing files.
    """
    parts = re.fullmatch(r"([^.:]+)(?:\.([^:]+))?:(\d{1,9})", key)
    if parts is None:
        raise EvalError(f"{key!r} names no item. Write TASK:INDEX or TASK.SUBSET:INDEX, such as gsm8k:0.")
    name, subset, index = parts[1], parts[2] or "", int(parts[3])
    task = build(name, profile, is_chat=is_chat)
    if subset not in task.subsets:
        if task.subsets == ("",):
            raise EvalError(f"{name} has no subsets. Write {name}:{index}.")
        if not subset:
            raise EvalError(f"{name} has subsets. Write one, such as {name}.{task.subsets[0]}:{index}.")
        raise EvalError(f"{name} has no subset {subset!r}. {suggest(subset, list(task.subsets))}")
    last = None
    for item in task.items(data, subset):
        last = item.index
        if item.index == index:
            return item
    raise EvalError(
        f"{key} is not there: the items of {name} end at {last}." if last is not None else f"{name} is empty."
    )
