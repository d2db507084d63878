"""MMLU, C-Eval and CMMLU: school and professional knowledge, four options, five worked examples.

Base models choose by perplexity over the letters, chat models write. Configurations: mmlu_ppl_ac766d and
mmlu_gen_a484b3 (the card's), ceval_ppl_578f8d, ceval_gen_5f30c7, cmmlu_ppl_8b9c76, cmmlu_gen_c13365.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.data.published import Subject, subjects
from internlm2.eval.extract import choice, mended
from internlm2.eval.profile import Profile
from internlm2.eval.task import Average, ChatPrompt, Item, ProgramRunner, TextPrompt, Turn, Verdict
from internlm2.eval.template import ASSISTANT, USER, fill

LETTERS = ("A", "B", "C", "D")
NUM_SHOTS = 5
MAX_TOKENS = 100
_OPTIONS = "A. {A}\nB. {B}\nC. {C}\nD. {D}"


@dataclass(frozen=True)
class _Form:
    """The templates of one benchmark. A shot is a question and its answer; the tail ends where the letter stands."""

    files: tuple[str, str]  # questions, examples
    columns: tuple[str, ...]  # of a row, "" for those that are not used
    has_header: bool
    base_shot: str
    base_tail: str
    chat_shot: tuple[str, str]
    chat_tail: str
    base_head: str = ""
    is_spaced: bool = False  # a line break between the examples and one behind them, not behind each


def _mmlu(subject: Subject) -> _Form:
    about = subject.name.replace("_", " ")
    ask = f"There is a single choice question about {about}. Answer the question by replying A, B, C or D."
    return _Form(
        files=(f"mmlu/test/{subject.name}_test.csv", f"mmlu/dev/{subject.name}_dev.csv"),
        columns=("input", *LETTERS, "target"),
        has_header=False,
        base_head=f"The following are multiple choice questions (with answers) about  {about}.\n\n",
        base_shot=f"{{input}}\n{_OPTIONS}\nAnswer: {{target}}\n",
        base_tail=f"{{input}}\n{_OPTIONS}\nAnswer: ",
        chat_shot=(f"{ask}\nQuestion: {{input}}\n{_OPTIONS}\nAnswer: ", "{target}\n"),
        chat_tail=f"{ask}\nQ: {{input}}\n{_OPTIONS}\nA: ",
        is_spaced=True,
    )


def _ceval(subject: Subject) -> _Form:
    folder = "ceval/formal_ceval"
    ask = f"以下是中国关于{subject.title}考试的单项选择题，请选出其中的正确答案。\n{{question}}\n{_OPTIONS}\n答案: "
    return _Form(
        files=(f"{folder}/val/{subject.name}_val.csv", f"{folder}/dev/{subject.name}_dev.csv"),
        columns=("", "question", *LETTERS, "answer"),
        has_header=True,
        base_shot=f"{ask}\n{{answer}}\n",
        base_tail=f"{ask}\n",
        chat_shot=(ask, "{answer}"),
        chat_tail=ask,
    )


def _cmmlu(subject: Subject) -> _Form:
    ask = f"以下是关于{subject.title}的单项选择题，请直接给出正确答案的选项。\n题目：{{question}}\n{_OPTIONS}"
    return _Form(
        files=(f"cmmlu/test/{subject.name}.csv", f"cmmlu/dev/{subject.name}.csv"),
        columns=("", "question", *LETTERS, "answer"),
        has_header=True,
        base_shot=f"{ask}\n答案是: {{answer}}\n",
        base_tail=f"{ask}\n答案是: ",
        chat_shot=(ask, "答案是: {answer}"),
        chat_tail=ask,
    )


_FORMS = {"mmlu": _mmlu, "ceval": _ceval, "cmmlu": _cmmlu}


@dataclass(frozen=True)
class Knowledge:
    """One of the three. name: "mmlu", "ceval" or "cmmlu"."""

    name: str
    profile: Profile
    is_chat: bool
    needs_programs: bool = False

    @cached_property
    def _subjects(self) -> Mapping[str, Subject]:
        return {subject.name: subject for subject in subjects(self.name)}

    @property
    def subsets(self) -> Sequence[str]:
        """The subjects, by name."""
        return tuple(self._subjects)

    @property
    def averages(self) -> Sequence[Average]:
        """All subjects alike (the card's number), by size, and by group."""
        groups: dict[str, list[str]] = {}
        for subject in self._subjects.values():
            for group in subject.groups:
                groups.setdefault(group, []).append(subject.name)
        rows = [
            Average(self.name, tuple(self.subsets)),
            Average(f"{self.name}-weighted", tuple(self.subsets), True),
        ]
        return [*rows, *(Average(f"{self.name}-{group}", tuple(names)) for group, names in groups.items())]

    def files(self, subset: str) -> Sequence[str]:
        """The questions and the worked examples."""
        return _FORMS[self.name](self._subjects[subset]).files

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`."""
        form = _FORMS[self.name](self._subjects[subset])
        examples = _read(data, form.files[1], form)[:NUM_SHOTS]
        for index, fields in enumerate(_read(data, form.files[0], form)):
            gold = fields[form.columns[-1]]
            prompt = (
                self._chat(form, examples, fields) if self.is_chat else self._base(form, examples, fields)
            )
            labels, max_tokens = ((), MAX_TOKENS) if self.is_chat else (LETTERS, 0)
            yield Item(self.name, subset, index, gold, prompt, labels=labels, max_tokens=max_tokens)

    # NOTE: the examples are filled again with the question's fields, because OpenCompass fills the whole prompt.

    @staticmethod
    def _base(form: _Form, examples: Sequence[Mapping[str, str]], fields: Mapping[str, str]) -> TextPrompt:
        border = "\n" if form.is_spaced else ""
        shots = [fill(form.base_shot, example) for example in examples]
        return TextPrompt(
            head=form.base_head,
            tail=border + fill(form.base_tail, fields),
            shots=tuple((border if n else "") + fill(shot, fields) for n, shot in enumerate(shots)),
        )

    @staticmethod
    def _chat(form: _Form, examples: Sequence[Mapping[str, str]], fields: Mapping[str, str]) -> ChatPrompt:
        fields = {**fields, form.columns[-1]: ""}  # as OpenCompass does where the answer is generated
        shots = [
            tuple(
                Turn(role, fill(fill(template, example), fields))
                for role, template in zip((USER, ASSISTANT), form.chat_shot, strict=True)
            )
            for example in examples
        ]
        return ChatPrompt(head=(), tail=(Turn(USER, fill(form.chat_tail, fields)),), shots=tuple(shots))

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`."""
        letters = "".join(LETTERS)
        if item.labels:
            extracted = output
        elif "choice" in self.profile.mends:
            extracted = mended.choice(output, letters)
        elif self.profile.choice == "first_option":
            extracted = choice.first_option(output, letters)
        else:
            extracted = choice.first_capital(output)
        return Verdict(float(extracted != "" and extracted == item.gold), extracted)


def _read(data: DataFolder, name: str, form: _Form) -> list[dict[str, str]]:
    rows = data.table(name, None if form.has_header else len(form.columns))
    if form.has_header:
        rows = rows[1:]
    found = []
    for n, row in enumerate(rows, 1):
        if len(row) < len(form.columns):
            raise data.damaged(name, f"row {n} has {len(row)} fields instead of {len(form.columns)}")
        fields = {column: value for column, value in zip(form.columns, row, strict=False) if column}
        if fields[form.columns[-1]] not in LETTERS:
            raise data.damaged(
                name, f"row {n} has the answer {fields[form.columns[-1]]!r} instead of A, B, C or D"
            )
        found.append(fields)
    return found
