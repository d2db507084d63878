"""Scorers that we did not write: those that lm-evaluation-harness took over from LongBench and IFEval.

The files are loaded by themselves: importing the whole package takes seconds, and its IFEval would fetch data.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from internlm2.eval import rules


def _load(name: str, monkeypatch: pytest.MonkeyPatch, stubs: dict[str, ModuleType]) -> ModuleType:
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs lm-evaluation-harness")
    path = Path(found.submodule_search_locations[0]) / name
    for module, stub in stubs.items():
        monkeypatch.setitem(sys.modules, module, stub)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def longbench_metrics(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """LongBench's metrics; fuzzywuzzy, which nobody keeps, is what it was with python-Levenshtein."""
    from rapidfuzz import fuzz

    def ratio(first: str, second: str) -> int:
        return round(fuzz.ratio(first, second)) if first and second else 0

    stub = ModuleType("fuzzywuzzy")
    stub.fuzz = SimpleNamespace(ratio=ratio)
    return _load("tasks/longbench/metrics.py", monkeypatch, {"fuzzywuzzy": stub})


def ifeval_instructions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """IFEval's rules; sentences and words are counted with our libraries, because its own fetches data."""
    util = ModuleType("lm_eval.tasks.ifeval.instructions_util")
    util.LANGUAGE_CODES = {"en": "English", "de": "German", "zh": "Chinese"}
    util.count_sentences = lambda text: len(rules._sentences()(text))
    util.count_words = lambda text: len(__import__("nltk").tokenize.RegexpTokenizer(r"\w+").tokenize(text))
    util.nltk = SimpleNamespace(
        word_tokenize=lambda text: [w for one in rules._sentences()(text) for w in rules._words()(one)]
    )
    package = ModuleType("lm_eval.tasks.ifeval")
    package.instructions_util = util
    stubs = {package.__name__: package, util.__name__: util}
    return _load("tasks/ifeval/instructions.py", monkeypatch, stubs)


def ifeval_follows(
    module: ModuleType, registry: dict[str, str], rule: str, arguments: dict, answer: str
) -> bool:
    """Whether an answer keeps to a rule, as IFEval's own loop decides it."""
    checker = getattr(module, registry[rule])(rule)
    checker.build_description(**arguments)
    return bool(answer.strip() and checker.check_following(answer))
