"""GSM8K and MATH: word problems and competition problems, four worked examples from a file (1d7fe4 and 265cce)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.extract import equivalent, latex, mended, number
from internlm2.eval.extract.boxed import boxed_content
from internlm2.eval.extract.value import same_values
from internlm2.eval.profile import Profile
from internlm2.eval.task import Average, ChatPrompt, Item, ProgramRunner, TextPrompt, Turn, Verdict
from internlm2.eval.template import USER, ShotForm, chat_prompt, fill, read_shots, text_prompt

MAX_TOKENS = 512


def _prompt(shots: Sequence[Turn], question: str, *, is_chat: bool) -> TextPrompt | ChatPrompt:
    turns = [*shots, Turn(USER, question)]
    return (chat_prompt if is_chat else text_prompt)(turns, num_fixed=len(shots))


@dataclass(frozen=True)
class GSM8K:
    """Grade school mathematics, the test split. See `Task`."""

    profile: Profile
    is_chat: bool
    name: str = "gsm8k"
    subsets: Sequence[str] = ("",)
    averages: Sequence[Average] = (Average("gsm8k", ("",)),)
    needs_programs: bool = False

    def files(self, subset: str) -> Sequence[str]:
        """The questions and the worked examples."""
        return ("gsm8k/test.jsonl", "shots/gsm8k_base.json")

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`."""
        name, shots_name = self.files(subset)
        shots = read_shots(data, shots_name, ShotForm("Question: ", "\nAnswer:", "", "\n", 4))
        template = "Question: {question}\nLet's think step by step\nAnswer:"
        early = () if self.is_chat else ("\nQuestion:",)
        stop = {"january": ("\n\n",), "february": ("Question:",)}[self.profile.gsm8k]
        for index, row in enumerate(data.rows(name, ("question", "answer"))):
            try:
                gold = number.gold(str(row["answer"]))
            except ValueError as error:
                raise data.damaged(name, f"line {index + 1} has {error}") from error
            question = fill(template, {"question": str(row["question"]), "answer": ""})
            yield Item(
                self.name, subset, index, gold, _prompt(shots, question, is_chat=self.is_chat),
                max_tokens=MAX_TOKENS, stop=stop, early_stop=early,
            )  # fmt: skip

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`."""
        if "gsm8k" in self.profile.mends:
            extracted = mended.number(output.partition("Question:")[0])
            return Verdict(float(mended.same_numbers(extracted, item.gold)), extracted)
        if self.profile.gsm8k == "january":
            extracted = number.january(output)
            return Verdict(float(extracted == item.gold), extracted)
        extracted = number.february(output)
        return Verdict(float(number.nearly_equal(extracted, item.gold)), extracted)


@dataclass(frozen=True)
class MATH:
    """Competition mathematics, 5000 test problems. See `Task`."""

    profile: Profile
    is_chat: bool
    name: str = "math"
    subsets: Sequence[str] = ("",)
    averages: Sequence[Average] = (Average("math", ("",)),)
    needs_programs: bool = False

    def files(self, subset: str) -> Sequence[str]:
        """The problems and the worked examples."""
        return ("math/math.json", "shots/math_base.json")

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`. The index counts the entries of the file; `fields` keep level and type."""
        name, shots_name = self.files(subset)
        shots = read_shots(data, shots_name, ShotForm("Problem:\n", "\nSolution:", "", "\n", 4))
        template = "Problem:\n{problem}\nSolution:\n"
        early = () if self.is_chat else ("\nProblem:",)
        problems = data.json(name)
        if not isinstance(problems, dict):
            raise data.damaged(name, "it is no JSON object of problems")
        for index, (key, problem) in enumerate(problems.items()):
            row = data.checked(name, problem, ("problem", "solution"), f"problem {key!r}")
            gold = boxed_content(str(row["solution"]))
            if gold is None:
                raise data.damaged(name, f"the solution of problem {key!r} has no \\boxed answer")
            question = fill(template, {"problem": str(row["problem"]), "solution": ""})
            yield Item(
                self.name, subset, index, gold, _prompt(shots, question, is_chat=self.is_chat),
                max_tokens=MAX_TOKENS, stop=early if "math" in self.profile.mends else (), early_stop=early,
                fields={kind: str(row[kind]) for kind in ("level", "type") if kind in row},
            )  # fmt: skip

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`. Base models are read by version 1, chat models by version 2."""
        if "math" in self.profile.mends:
            extracted = mended.formula(output.partition("\nProblem:")[0])
            return Verdict(float(same_values(extracted, item.gold)), extracted)
        if self.is_chat:
            extracted = latex.version_2(output)
            return Verdict(float(equivalent.version_2(extracted, item.gold)), extracted)
        extracted = latex.version_1(output)
        return Verdict(float(equivalent.version_1(extracted, item.gold)), extracted)
