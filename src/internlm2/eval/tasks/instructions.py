"""IFEval: 541 requests with rules about the form of the answer, which are checked one by one (arXiv 2311.07911).

The verdict is the strict one on the whole request, which `strict` and `loose` in the detail complete;
`instruction_levels` makes the four numbers of the paper of them.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.profile import Profile
from internlm2.eval.rules import RULES, follows, loose_forms
from internlm2.eval.task import (
    Average,
    ChatPrompt,
    EvalError,
    Item,
    ProgramRunner,
    TextPrompt,
    Turn,
    Verdict,
)
from internlm2.eval.template import USER

MAX_TOKENS = 1280
_FILE = "ifeval/input_data.jsonl"


@dataclass(frozen=True)
class IFEval:
    """See `Task`."""

    profile: Profile
    is_chat: bool
    name: str = "ifeval"
    subsets: Sequence[str] = ("",)
    averages: Sequence[Average] = (Average("ifeval", ("",)),)
    needs_programs: bool = False

    def files(self, subset: str) -> Sequence[str]:
        """One file, as google-research publishes it."""
        return (_FILE,)

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`. gold: the names of the rules. fields: rules and arguments, as JSON."""
        rows = data.rows(_FILE, ("prompt", "instruction_id_list", "kwargs"))
        for index, row in enumerate(rows):
            rules, arguments = row["instruction_id_list"], row["kwargs"]
            is_good = isinstance(rules, list) and isinstance(arguments, list) and len(rules) == len(arguments)
            if not is_good or not rules or not all(isinstance(one, dict) for one in arguments):
                raise data.damaged(_FILE, f"line {index + 1} has no rules with an object of arguments each")
            unknown = [rule for rule in rules if rule not in RULES]
            if unknown:
                raise data.damaged(_FILE, f"line {index + 1} has the unknown rule {unknown[0]!r}")
            text = str(row["prompt"])
            yield Item(
                self.name, subset, index, ", ".join(rules),
                ChatPrompt((), (Turn(USER, text),)) if self.is_chat else TextPrompt("", text),
                max_tokens=MAX_TOKENS, is_long=True,
                fields={"rules": json.dumps(rules), "arguments": json.dumps(arguments)},
            )  # fmt: skip

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`. extracted: the rules that were kept. Raises RuleError for arguments that make no sense."""
        rules = json.loads(item.fields["rules"])
        pairs = list(zip(rules, json.loads(item.fields["arguments"]), strict=True))
        strict = [follows(rule, arguments, output) for rule, arguments in pairs]
        forms = loose_forms(output)
        loose = [any(follows(rule, arguments, form) for form in forms) for rule, arguments in pairs]
        kept = ", ".join(rule for rule, is_kept in zip(rules, strict, strict=True) if is_kept)
        return Verdict(float(all(strict)), kept, f"strict {_bits(strict)} loose {_bits(loose)}")


def _bits(kept: Sequence[bool]) -> str:
    return "".join(str(int(one)) for one in kept)


@dataclass(frozen=True)
class InstructionLevels:
    """The four numbers of IFEval, in percent: of whole requests and of single rules."""

    prompt_strict: float
    prompt_loose: float
    rule_strict: float
    rule_loose: float


def instruction_levels(details: Iterable[str]) -> InstructionLevels:
    """From the details of verdicts, or of samples without an error. Raises EvalError where there are none."""
    strict: list[str] = []
    loose: list[str] = []
    for detail in details:
        words = detail.split()
        if len(words) != 4 or set(words[1] + words[3]) - {"0", "1"}:
            raise EvalError(f"{detail!r} is no detail of an IFEval verdict.")
        strict.append(words[1])
        loose.append(words[3])
    if not strict:
        raise EvalError("There is no verdict to make a mean of.")
    return InstructionLevels(_whole(strict), _whole(loose), _single(strict), _single(loose))


def _whole(kept: Sequence[str]) -> float:
    return 100 * sum("0" not in one for one in kept) / len(kept)


def _single(kept: Sequence[str]) -> float:
    together = "".join(kept)
    return 100 * together.count("1") / len(together)
