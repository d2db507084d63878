"""LongBench: 21 tasks in English, Chinese and code, with texts of 1,000 to 20,000 words (arXiv 2308.14508).

The prompts are those of its `dataset2prompt.json`, which lies beside the data. The card's profiles ask as OpenCompass
does (configs/datasets/longbench), `fixed` as LongBench's own pred.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from internlm2.eval import overlap
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.profile import Profile
from internlm2.eval.task import (
    Average,
    ChatPrompt,
    EvalError,
    Item,
    LongPrompt,
    ProgramRunner,
    TextPrompt,
    Turn,
    Verdict,
)
from internlm2.eval.template import USER

GROUPS: Mapping[str, Sequence[str]] = {
    "single-document-qa": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document-qa": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
CHINESE = frozenset(("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"))
FIRST_LINE = frozenset(("trec", "triviaqa", "samsum", "lsht"))
PLAIN = FIRST_LINE | {"lcc", "repobench-p"}
"""Tasks that LongBench gives to chat models as text to continue."""
_ROUGE = frozenset(("dureader", "gov_report", "qmsum", "multi_news", "vcsum", "samsum"))
_NUMBERS = frozenset(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"))
_CLASSES = frozenset(("trec", "lsht"))
_CODE = frozenset(("lcc", "repobench-p"))
_PROMPTS, _LENGTHS = "LongBench/dataset2prompt.json", "LongBench/dataset2maxlen.json"
_SEPARATOR = "\x1f"  # between gold answers and between classes; no row holds it


@dataclass(frozen=True)
class LongBench:
    """See `Task`."""

    profile: Profile
    is_chat: bool
    name: str = "longbench"
    needs_programs: bool = False

    @property
    def _is_mended(self) -> bool:
        return "longbench" in self.profile.mends

    @property
    def subsets(self) -> Sequence[str]:
        """The 21 tasks."""
        return tuple(task for group in GROUPS.values() for task in group)

    @property
    def averages(self) -> Sequence[Average]:
        """The mean of the six groups, each task alike, each group."""
        weights = tuple(1 / len(GROUPS) / len(group) for group in GROUPS.values() for _ in group)
        return [
            Average("longbench", tuple(self.subsets), weights=weights),
            Average("longbench-tasks", tuple(self.subsets)),
            *(Average(f"longbench-{name}", tuple(group)) for name, group in GROUPS.items()),
        ]

    def files(self, subset: str) -> Sequence[str]:
        """The questions, the prompts, and the longest answers."""
        return (f"LongBench/{subset}.jsonl", _PROMPTS, _LENGTHS)

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`. fields: length in words or characters as the data counts it, answers, classes."""
        template, max_tokens = self._form(data, subset)
        name = self.files(subset)[0]
        rows = data.rows(name, ("input", "context", "answers", "length", "all_classes"))
        for index, row in enumerate(rows):
            answers = row["answers"]
            if not isinstance(answers, list) or not answers:
                raise data.damaged(name, f"line {index + 1} has no list of answers")
            classes = row["all_classes"] if isinstance(row["all_classes"], list) else []
            context, question = str(row["context"]), str(row["input"])
            fields = {
                "length": str(row["length"]),
                "answers": _SEPARATOR.join(map(str, answers)),
                "classes": _SEPARATOR.join(map(str, classes)),
            }
            yield Item(
                self.name, subset, index, str(answers[0]),
                LongPrompt(partial(self._write, template, subset, context, question)),
                max_tokens=max_tokens, fields=fields, is_long=True, cuts_middle=self._is_mended,
            )  # fmt: skip

    def _form(self, data: DataFolder, subset: str) -> tuple[str, int]:
        """The prompt with its two places, and the longest answer in tokens."""
        prompts, lengths = data.json(_PROMPTS), data.json(_LENGTHS)
        source = subset
        if subset == "qasper" and not self._is_mended:
            source = "hotpotqa"
        prompt = prompts.get(source) if isinstance(prompts, dict) else None
        length = lengths.get(source) if isinstance(lengths, dict) else None
        if not isinstance(prompt, str) or "{context}" not in prompt:
            raise data.damaged(_PROMPTS, f"it holds no prompt for {source}")
        if not isinstance(length, int):
            raise data.damaged(_LENGTHS, f"it holds no number for {source}")
        if not self._is_mended and subset == "narrativeqa":
            prompt = prompt.replace("asconcisely", "as concisely")
        if not self._is_mended and subset == "multi_news" and not prompt.endswith("\n"):
            prompt += "\n"
        return prompt, length

    def _write(self, template: str, subset: str, context: str, question: str) -> TextPrompt | ChatPrompt:
        before, after = template.split("{context}")
        text = before.replace("{input}", question) + context + after.replace("{input}", question)
        is_turn = self.is_chat and not (self._is_mended and subset in PLAIN)
        return ChatPrompt((), (Turn(USER, text),)) if is_turn else TextPrompt("", text)

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`. The best score over all gold answers; OpenCompass adds up those of numbers and classes."""
        answers = item.fields["answers"].split(_SEPARATOR)
        classes = item.fields["classes"].split(_SEPARATOR) if item.fields["classes"] else []
        text = output.lstrip("\n").split("\n")[0] if item.subset in FIRST_LINE else output
        scores = [_score(item.subset, text, answer, classes) for answer in answers]
        is_added = not self._is_mended and item.subset in (_NUMBERS | _CLASSES)
        return Verdict(min(1.0, sum(scores)) if is_added else max(scores), text.strip())


def _score(task: str, text: str, gold: str, classes: Sequence[str]) -> float:
    is_chinese = task in CHINESE
    if task in _CLASSES:
        return overlap.class_share(text, gold, classes)
    if task in _NUMBERS:
        return overlap.number_share(text, _number(task, gold))
    if task in _CODE:
        return overlap.code_similarity(text, gold)
    if task in _ROUGE:
        return overlap.rouge_l(text, gold, is_chinese=is_chinese)
    return overlap.qa_f1(text, gold, is_chinese=is_chinese)


def _number(task: str, gold: str) -> str:
    """The number of "Paragraph 7" or "段落7"; the gold of passage_count is one."""
    if task == "passage_count":
        return gold
    _, mark, number = gold.partition("段落" if task == "passage_retrieval_zh" else "Paragraph ")
    digits = number[: len(number) - len(number.lstrip("0123456789"))]
    if not mark or not digits:
        raise EvalError(f"A gold answer of {task} is {gold!r}, which names no paragraph.")
    return digits
