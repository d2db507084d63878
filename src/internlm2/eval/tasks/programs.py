"""HumanEval and MBPP: programs, judged by running their tests (a82cae, 8e312c and sanitized_mbpp 1e1056).

What a model wrote is never run here: the caller's runner does that, in a sandbox, with the tests out of its reach.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.extract import code, mended
from internlm2.eval.profile import Profile
from internlm2.eval.task import (
    Average,
    ChatPrompt,
    Item,
    ProgramRunner,
    TextPrompt,
    Turn,
    Verdict,
    require_runner,
)
from internlm2.eval.template import ASSISTANT, USER, ShotForm, chat_prompt, fill, read_shots, text_prompt

MAX_TOKENS = 512
TIMEOUT_SECONDS = 3.0
MBPP_TIMEOUT_SECONDS = 2.0  # OpenCompass sets an alarm at 2 s inside a process that it ends after 3 s
MENDED_TIMEOUT_SECONDS = 20.0  # a reference program takes 3 s and more


@dataclass(frozen=True)
class _Trial:
    """A program with its tests; see `ProgramRunner`."""

    program: str
    tests: str
    entry_points: Sequence[str]
    timeout_seconds: float

    def verdict(self, item: Item, extracted: str, run: ProgramRunner | None) -> Verdict:
        passed = require_runner(item, run)(
            self.program, self.timeout_seconds, tests=self.tests, entry_points=self.entry_points
        )
        return Verdict(float(passed), extracted, "the tests passed" if passed else "the tests failed")


def _before(source: str, name: str) -> str:
    """The imports and helpers that stand before the function `name` in the prompt: tests may use them too."""
    tree = ast.parse(f"{source}    pass\n")
    line = next(one.lineno for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == name)
    return "".join(source.splitlines(keepends=True)[: line - 1])


def _defined(program: str, tests: str) -> list[str]:
    """The functions and classes of a reference program that the tests name, such as "sum"."""
    found = re.findall(r"^(?:async def|def|class) +(\w+)", program, re.MULTILINE)
    named = set(re.findall(r"\w+", tests))
    return [name for name in found if name in named]


@dataclass(frozen=True)
class HumanEval:
    """Completing 164 functions; the share that passes its tests is pass@1. See `Task`."""

    profile: Profile
    is_chat: bool
    name: str = "humaneval"
    subsets: Sequence[str] = ("",)
    averages: Sequence[Average] = (Average("humaneval", ("",)),)
    needs_programs: bool = True

    def files(self, subset: str) -> Sequence[str]:
        """One file."""
        return ("humaneval/human-eval-v2-20210705.jsonl",)

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`. gold: the reference body. fields: prompt, test and entry_point."""
        early = () if self.is_chat else ("\nclass ", "\ndef ", "\nif ", "\nprint(")
        names = ("prompt", "canonical_solution", "test", "entry_point")
        for index, row in enumerate(data.rows(self.files(subset)[0], names)):
            fields = {name: str(row[name]) for name in names}
            source = fields["prompt"]
            prompt: TextPrompt | ChatPrompt = TextPrompt("", source)
            if self.is_chat:
                prompt = ChatPrompt((), (Turn(USER, f"Complete the following python code:\n{source}"),))
            yield Item(
                self.name, subset, index, fields.pop("canonical_solution"), prompt, max_tokens=MAX_TOKENS,
                stop=early if "humaneval" in self.profile.mends else (), early_stop=early, fields=fields,
            )  # fmt: skip

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`."""
        if "humaneval" in self.profile.mends:
            completion = mended.function_body(output, item.fields["entry_point"])
        elif self.is_chat or self.profile.humaneval_base == 2:
            completion = code.humaneval_2(output)
        else:
            completion = code.humaneval_1(output)
        name, source = item.fields["entry_point"], item.fields["prompt"]
        tests = f"{_before(source, name)}{item.fields['test']}\ncheck({name})"
        return _Trial(f"{source}{completion}", tests, (name,), TIMEOUT_SECONDS).verdict(item, completion, run)


@dataclass(frozen=True)
class SanitizedMBPP:
    """Writing 257 small programs: rows 7 to 263 of the sanitized file, which are the ids 11 to 510. See `Task`."""

    profile: Profile
    is_chat: bool
    name: str = "sanitized_mbpp"
    subsets: Sequence[str] = ("",)
    averages: Sequence[Average] = (Average("sanitized_mbpp", ("",)),)
    needs_programs: bool = True

    def files(self, subset: str) -> Sequence[str]:
        """The problems and the worked examples."""
        return ("mbpp/sanitized-mbpp.jsonl", "shots/mbpp_base.json")

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`. gold: the reference program. fields: tests and imports."""
        name, shots_name = self.files(subset)
        form = ShotForm("You are an expert Python programmer", "", "[BEGIN]\n", "[DONE] \n\n ", 3)
        shots = read_shots(data, shots_name, form)
        template = (
            "You are an expert Python programmer, and here is your task: {text} "
            "Your code should pass these tests:\n\n {test_list}  \n"
        )
        early = () if self.is_chat else ("[DONE]",)
        rows = data.rows(name, ("prompt", "code", "test_imports", "test_list"))
        for index, row in list(enumerate(rows))[7:264]:
            tests, imports = row["test_list"], row["test_imports"]
            if not isinstance(tests, list) or not isinstance(imports, list):
                raise data.damaged(name, f"the tests of line {index + 1} are no list")
            lines = "\n".join(map(str, tests))
            # in the order of OpenCompass' columns, which matters where a value holds another's name in braces
            fields = {"code": str(row["code"]), "test_list": lines, "text": str(row["prompt"])}
            turns = [*shots, Turn(USER, fill(template, fields)), Turn(ASSISTANT, "[BEGIN]\n")]
            yield Item(
                self.name, subset, index, fields["code"],
                (chat_prompt if self.is_chat else text_prompt)(turns, num_fixed=len(shots)),
                max_tokens=MAX_TOKENS, stop=early if "mbpp" in self.profile.mends else (), early_stop=early,
                fields={"tests": lines, "imports": "\n".join(map(str, imports))},
            )  # fmt: skip

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`."""
        is_mended = "mbpp" in self.profile.mends
        extracted = (mended.whole_program if is_mended else code.mbpp)(output)
        imports, tests = (f"{item.fields['imports']}\n" if is_mended else ""), item.fields["tests"]
        trial = _Trial(
            f"{imports}{extracted}", f"{imports}{tests}", _defined(item.gold, tests),
            MENDED_TIMEOUT_SECONDS if is_mended else MBPP_TIMEOUT_SECONDS,
        )  # fmt: skip
        return trial.verdict(item, extracted, run)
