"""AGIEval: 21 sets of Chinese and English examinations, without worked examples (configs 2f14ad and 64afd3).

Base models choose by perplexity where one option is right, and write where several may be or none are given; chat
models always write. Pinned: the files of June 2023 (b1187aa), which OpenCompass ships.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.extract import agieval, choice, equivalent, mended
from internlm2.eval.extract.value import same_values
from internlm2.eval.profile import Profile
from internlm2.eval.task import Average, ChatPrompt, Item, ProgramRunner, TextPrompt, Turn, Verdict
from internlm2.eval.template import USER, fill

MAX_TOKENS = 1024
_GAOKAO = "以下是一道中国高考{}选择题，请选择正确的答案。"
_ENGLISH = "The following is a {} question. Please select the correct answer."
_INTROS = {
    "gaokao-chinese": _GAOKAO.format("语文"),
    "gaokao-english": _GAOKAO.format("英语"),
    "gaokao-geography": _GAOKAO.format("地理"),
    "gaokao-history": _GAOKAO.format("历史"),
    "gaokao-biology": _GAOKAO.format("生物"),
    "gaokao-chemistry": _GAOKAO.format("化学"),
    "gaokao-mathqa": _GAOKAO.format("数学"),
    "logiqa-zh": "以下是一道中国公务员考试题，请选择正确的答案。",
    "lsat-ar": _ENGLISH.format("LSAT Analytical Reasoning"),
    "lsat-lr": _ENGLISH.format("LSAT Logical Reasoning"),
    "lsat-rc": _ENGLISH.format("LSAT Reading Comprehension"),
    "logiqa-en": _ENGLISH.format("Logic Reasoning"),
    "sat-math": _ENGLISH.format("SAT Math"),
    "sat-en": _ENGLISH.format("SAT English"),
    "sat-en-without-passage": _ENGLISH.format("SAT English"),
    "aqua-rat": _ENGLISH.format("AQUA-RAT"),
    "gaokao-physics": _GAOKAO.format("物理"),
    "jec-qa-kd": "以下是一道中国司法考试基础知识题，请选择正确的答案。",
    "jec-qa-ca": "以下是一道中国司法考试案例分析题，请选择正确的答案。",
    "gaokao-mathcloze": "以下是一道中国高考数学填空题，请填入正确的答案。",
    "math": _ENGLISH.format("Math"),
}
SEVERAL = frozenset({"gaokao-physics", "jec-qa-kd", "jec-qa-ca"})
CLOZE = frozenset({"gaokao-mathcloze", "math"})
_FIVE_OPTIONS = frozenset({"lsat-ar", "lsat-lr", "lsat-rc", "aqua-rat"})
# NOTE: the jec-qa sets are Chinese, but the card's configuration forgot them and asks in English.
_CHINESE = frozenset(name for name in _INTROS if name.startswith("gaokao") or name == "logiqa-zh")


@dataclass(frozen=True)
class AGIEval:
    """See `Task`."""

    profile: Profile
    is_chat: bool
    name: str = "agieval"
    needs_programs: bool = False

    @property
    def subsets(self) -> Sequence[str]:
        """The 21 sets; the passages of sat-en are asked twice, with and without."""
        return tuple(_INTROS)

    @property
    def averages(self) -> Sequence[Average]:
        """All sets alike: the card's number."""
        chinese = tuple(name for name in _INTROS if name in _CHINESE or name.startswith("jec"))
        english = tuple(name for name in _INTROS if name not in chinese)
        return [
            Average("agieval", tuple(_INTROS)),
            Average("agieval-weighted", tuple(_INTROS), True),
            Average("agieval-chinese", chinese),
            Average("agieval-english", english),
        ]

    def files(self, subset: str) -> Sequence[str]:
        """One file for each set."""
        return (f"AGIEval/data/v1/{subset}.jsonl",)

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`."""
        name = self.files(subset)[0]
        for index, row in enumerate(data.rows(name, ("passage", "question", "options", "label"))):
            options, label = row["options"] or [], row["label"]
            if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
                raise data.damaged(name, f"the options of line {index + 1} are no list of texts")
            gold = "".join(label) if isinstance(label, list) else label or row.get("answer")
            fields = {
                "question": f"{row['passage'] or ''}{row['question']}",
                "options": "\n".join(options),
                "label": str(gold or ""),
            }
            yield self._item(subset, index, fields)

    def _item(self, subset: str, index: int, fields: dict[str, str]) -> Item:
        by_perplexity = not self.is_chat and subset not in SEVERAL | CLOZE
        gold = fields["label"]
        if not by_perplexity:
            fields = {**fields, "label": ""}
        text = fill(self._template(subset, by_perplexity=by_perplexity), fields)
        prompt = ChatPrompt((), (Turn(USER, text),)) if self.is_chat else TextPrompt("", text)
        labels = ("ABCDE" if subset in _FIVE_OPTIONS else "ABCD") if by_perplexity else ""
        max_tokens = 0 if by_perplexity else MAX_TOKENS
        return Item(self.name, subset, index, gold, prompt, labels=tuple(labels), max_tokens=max_tokens)

    def _template(self, subset: str, *, by_perplexity: bool) -> str:
        """The question up to where the answer stands, with each hint spaced as the configurations have it."""
        is_cloze = subset in CLOZE
        hint = "The answer is "
        if subset in _CHINESE:
            is_tight = by_perplexity or (is_cloze and not self.is_chat)
            hint = "答案是：" if is_tight else "答案是： "
        if is_cloze:
            border = "\n" if self.is_chat else ""
            return f"{_INTROS[subset]}\n{{question}}{border}{hint}"
        return f"{_INTROS[subset]}\n{{question}}\n{{options}}\n{hint}"

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`."""
        if item.subset in CLOZE:
            return self._score_cloze(item, output)
        mends = self.profile.mends
        if item.subset in SEVERAL:
            is_mended = "several-choices" in mends
            extracted = mended.choices(output, "ABCD") if is_mended else choice.first_capitals(output)
            # the gold answer of one question holds a full stop
            gold = "".join(sorted(set(item.gold) & set("ABCD"))) if is_mended else item.gold
            return Verdict(float(extracted != "" and extracted == gold), extracted)
        if item.labels:
            extracted = output
        else:
            read = mended.choice if "choice" in mends else choice.first_option
            extracted = read(output, "ABCDE")
        golds = item.gold.split() if " " in item.gold else list(item.gold)
        allowed = golds if "several-golds" in mends else [item.gold]
        return Verdict(float(extracted != "" and extracted in allowed), extracted)

    def _score_cloze(self, item: Item, output: str) -> Verdict:
        if "cloze" in self.profile.mends:
            extracted = mended.blanks(output) if item.subset == "gaokao-mathcloze" else mended.formula(output)
            return Verdict(float(same_values(extracted, item.gold)), extracted)
        found = agieval.cloze(output)
        return Verdict(float(equivalent.hendrycks(found, item.gold)), found or "")
