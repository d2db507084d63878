"""L-Eval: 18 or 19 tasks over documents of 3,000 to 60,000 tokens, several questions to each (arXiv 2307.11088).

Prompts: open-compass/opencompass configs/datasets/leval, whose system text is a user's turn where a model has no
system role. The card's profiles score as OpenCompass does, `fixed` as L-Eval's own Evaluation/auto_eval.py; it asks
sci_fi as well, which OpenCompass leaves out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from internlm2.eval import overlap
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.profile import Profile
from internlm2.eval.task import (
    Average,
    ChatPrompt,
    Item,
    LongPrompt,
    ProgramRunner,
    TextPrompt,
    Turn,
    Verdict,
)
from internlm2.eval.template import USER, chat_prompt, text_prompt

_DOCUMENT = "Now you are given a very long document. Please follow the instruction "
_CHOICE_SYSTEM = (
    f"{_DOCUMENT}based on this document. For multi-choice questions, there could be a single correct option or "
    "multiple correct options. Please only provide the letter corresponding to the answer (like A or AB) when "
    "answering."
)
_TOPIC_SYSTEM = (
    "Below is a record of our previous conversation on many different topics. You are the ASSISTANT, and I am the "
    "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize "
    "each <TOPIC>. At the end of the record, I will ask you to retrieve the first/second/third topic names. Now the "
    "record start."
)
_MATH_SYSTEM = (
    "Given several question answer pairs, you need to follow a similar format to answer the last question. Make sure "
    "the response is end with The answer is _ . "
)
_OPEN_SYSTEM = (
    f"{_DOCUMENT}after this document. These instructions may include summarizing a document, answering questions based "
    "on the document, or writing a required paragraph."
)
_FICTION_SYSTEM = (
    'Now you are given a scientific fiction. I will ask you some questions and the answer should be "True" or '
    '"False". Notice that you should answer the question based on the evidence in the document instead of your '
    "background knowledge."
)
_ASK = "Document is as follows.\n{context}\nQuestion:{question}\nAnswer:"
_ASK_OPEN = (
    "Document is as follows. {context}\nInstruction: {question}\nAnswer this question with {length} words."
)

_ASK_FICTION = (
    "Document is as follows. {context} Question: {question} \n"
    "Please directly give answer without any additional output or explanation\n Answer: "
)
# Behind the first question, without an answer to it.
_IN_THE_DOCUMENT = "based on the world described in the document."
_IN_THE_WORLD = "based on the real-world knowledge and facts up until your last training"
_ASK_FACT = "{question}\nPlease directly give answer without any additional output or explanation \nAnswer:"


@dataclass(frozen=True)
class _Form:
    system: str
    ask: str
    max_tokens: int


def _open(max_tokens: int, ask: str = _ASK_OPEN) -> _Form:
    return _Form(_OPEN_SYSTEM, ask, max_tokens)


_CLOSED: Mapping[str, _Form] = {
    "coursera": _Form(_CHOICE_SYSTEM, _ASK, 10),
    "gsm100": _Form(_MATH_SYSTEM, "{context}\n\n{question}\n", 512),
    "quality": _Form(_CHOICE_SYSTEM, _ASK, 10),
    "tpo": _Form(_CHOICE_SYSTEM, _ASK, 10),
    "topic_retrieval_longchat": _Form(_TOPIC_SYSTEM, _ASK, 30),
}
_OPEN: Mapping[str, _Form] = {
    "financial_qa": _open(512),
    "gov_report_summ": _open(512),
    "legal_contract_qa": _open(128),
    "meeting_summ": _open(512),
    "multidoc_qa": _open(64),
    "narrative_qa": _open(50),
    "natural_question": _open(50, _ASK_OPEN.replace("{question}", "{question}?")),
    "news_summ": _open(512),
    "paper_assistant": _open(512),
    "patent_summ": _open(512),
    "review_summ": _open(512),
    "scientific_qa": _open(64),
    "tv_show_summ": _open(512),
}
_FICTION = "sci_fi"
_FORMS = {**_CLOSED, **_OPEN, _FICTION: _Form(_FICTION_SYSTEM, _ASK_FICTION, 512)}
_CHOICES = frozenset(("coursera", "quality", "tpo"))


@dataclass(frozen=True)
class LEval:
    """See `Task`."""

    profile: Profile
    is_chat: bool
    name: str = "leval"
    needs_programs: bool = False

    @property
    def _is_mended(self) -> bool:
        return "leval" in self.profile.mends

    @property
    def subsets(self) -> Sequence[str]:
        """The 18 tasks that OpenCompass runs; with `fixed` also sci_fi. Of L-Eval's own, codeU is not here."""
        return (*_CLOSED, *((_FICTION,) if self._is_mended else ()), *_OPEN)

    @property
    def averages(self) -> Sequence[Average]:
        """All tasks alike, those with one right answer, those that are written freely."""
        return [
            Average("leval", tuple(self.subsets)),
            Average("leval-closed", tuple(name for name in self.subsets if name not in _OPEN)),
            Average("leval-open", tuple(_OPEN)),
        ]

    def files(self, subset: str) -> Sequence[str]:
        """One file: documents, each with its questions."""
        return (f"LEval/{'Open' if subset in _OPEN else 'Closed'}-ended-tasks/{subset}.jsonl",)

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`. The index counts questions over all documents. fields: the kind of scorer."""
        name = self.files(subset)[0]
        rows = data.rows(name, ("instructions", "outputs", "input", "evaluation"))
        index = 0
        for n, row in enumerate(rows, 1):
            questions, answers = row["instructions"], row["outputs"]
            if not isinstance(questions, list) or not isinstance(answers, list):
                raise data.damaged(name, f"line {n} has no lists of questions and answers")
            if len(questions) != len(answers):
                raise data.damaged(
                    name, f"line {n} has {len(questions)} questions, but {len(answers)} answers"
                )
            context = str(row["input"])
            pairs = [
                ((str(question),), str(answer)) for question, answer in zip(questions, answers, strict=True)
            ]
            if subset == _FICTION:
                pairs = [
                    pair for (question,), answer in pairs for pair in _in_story_and_world(question, answer)
                ]
            for asked, answer in pairs:
                gold = self._gold(subset, answer)
                length = len(answer.split())
                write = partial(self._write, _FORMS[subset], context, asked, str(length))
                yield Item(
                    self.name, subset, index, gold, LongPrompt(write), max_tokens=_FORMS[subset].max_tokens,
                    fields={"evaluation": str(row["evaluation"])}, is_long=True, cuts_middle=self._is_mended,
                )  # fmt: skip
                index += 1

    def _gold(self, subset: str, answer: str) -> str:
        if subset == "gsm100":
            return answer.replace(",", "")
        if self._is_mended and subset in _CHOICES:
            return re.sub(r"[^A-D]", "", answer.split(maxsplit=1)[0]) if answer.split() else ""
        return answer[1:2] if subset == "quality" else answer

    def _write(
        self, form: _Form, context: str, asked: tuple[str, ...], length: str
    ) -> TextPrompt | ChatPrompt:
        question, *facts = asked
        before, after = form.ask.split("{context}")
        ask = before + context + after.replace("{length}", length).replace("{question}", question)
        turns = [Turn(USER, form.system), Turn(USER, ask)]
        turns += [Turn(USER, _ASK_FACT.replace("{question}", fact)) for fact in facts]
        return chat_prompt(turns) if self.is_chat else text_prompt(turns)

    # -- verdicts -----------------------------------------------------------------------------------------------

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`."""
        if item.subset not in _OPEN:
            return self._closed(item, output)
        if not self._is_mended:
            return Verdict(overlap.rouge_1(output, item.gold), output.strip())
        if item.fields["evaluation"] == "f1":
            return Verdict(overlap.qa_f1(output, item.gold), output.strip())
        return Verdict(overlap.rouge_l_of_whole(output, item.gold), output.strip())

    def _closed(self, item: Item, output: str) -> Verdict:
        if item.subset in _CHOICES:
            return self._choice(item, output)
        if item.subset == "gsm100":
            number = _digits_behind(output, is_mended=self._is_mended)
            return Verdict(float(number != "" and number == item.gold), number)
        if item.subset == _FICTION:
            return _true_or_false(item, output)
        return self._topic(item, output)

    def _choice(self, item: Item, output: str) -> Verdict:
        if not self._is_mended:
            pattern = r"[A-D]+" if item.subset == "coursera" else r"[A-Z]"
            found = re.search(pattern, output)
            extracted = found[0] if found else ""
            return Verdict(float(extracted != "" and extracted == item.gold), extracted)
        extracted = _letters(output, is_several=item.subset == "coursera")
        if extracted == item.gold:
            return Verdict(1.0, extracted)
        is_part = bool(extracted) and set(extracted) <= set(item.gold)
        return Verdict(0.25 if is_part else 0.0, extracted, "a part of the options" if is_part else "")

    def _topic(self, item: Item, output: str) -> Verdict:
        if self._is_mended:  # the first line of more than a letter, blanks and capitals aside
            lines = [line for line in output.split("\n") if len(line) > 1]
            line = lines[0] if lines else output
            is_right = "".join(item.gold.lower().split(" ")) in "".join(line.lower().split(" "))
            return Verdict(float(is_right), line)
        said = _short(output)
        return Verdict(float(_short(item.gold) in said or item.gold in said), said)


def _in_story_and_world(question: str, answer: str) -> list[tuple[tuple[str, ...], str]]:
    """What sci_fi asks twice, in the story and then in the world; the answers are one, such as "True [fact: False]"."""
    story, _, fact = answer.lower().partition("[fact:")
    about_world = question.replace(_IN_THE_DOCUMENT, _IN_THE_WORLD)
    return [((question,), story.strip()), ((question, about_world), fact.strip().removesuffix("]").strip())]


def _true_or_false(item: Item, output: str) -> Verdict:
    """The first word decides that holds one of the two; within a word true goes first, as in L-Eval."""
    words = (word for word in output.lower().split() if "true" in word or "false" in word)
    word = next(words, "")
    said = "true" if "true" in word else "false" if word else ""
    return Verdict(float(said == item.gold), said)


def _short(text: str) -> str:
    """OpenCompass' general form of an answer: up to the first full stop, comma or line end, without marks, articles."""
    words = re.sub(r"[^\w\s]", "", re.split(r"[\n.,]", text, maxsplit=1)[0])
    return " ".join(re.sub(r"\b(a|an|the)\b", "", words, flags=re.IGNORECASE).split())


def _letters(output: str, *, is_several: bool) -> str:
    """The options that an answer names, as L-Eval reads them: "A" where it names none.

    One option: the first of A to D anywhere. Several: letters that the answer begins with, else single letters before a
    blank, full stop or bracket.
    """
    if output in "ABCD":
        return output  # also nothing at all
    if not is_several:
        return next((char for char in output if char in "ABCD"), "A")
    start = re.match(r"[A-D]*", output)
    leading = start[0] if start else ""
    if len(leading) > 1:
        return "".join(sorted(set(leading)))
    rest = output[len(leading) :].split("Question", maxsplit=1)[0]
    named = leading + "".join(re.findall(r"[A-Z](?=[\s.)])", rest))
    return "".join(sorted(set(named) & set("ABCD"))) or "A"


def _digits_behind(output: str, *, is_mended: bool) -> str:
    """The digits of the number behind `The answer is`; L-Eval takes the last number where nothing says so."""
    _, found, after = output.partition("The answer is")
    if is_mended:
        said = re.search(r"The answer is (\S+)", output)
        words = [said[1]] if said else output.split("\n\n", maxsplit=1)[0].split(" ")[::-1]
    else:
        words = after.split(" ") if found else []
    number = next((word for word in words if any(char.isdigit() for char in word)), "")
    number = number.partition(".")[0] if is_mended else number
    return "".join(char for char in number if char.isdigit())
