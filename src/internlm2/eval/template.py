"""From rounds of questions and answers to prompts, as OpenCompass assembles them.

Base mode joins all pieces with one line break, also where a piece ends in one. Chat mode makes every round a message
and drops an answer that was only begun. Source: open-compass/opencompass `openicl/icl_prompt_template.py` and
`utils/prompt.py` at b4afe3e7, https://github.com/open-compass/opencompass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.task import ChatPrompt, TextPrompt, Turn

USER, ASSISTANT = "user", "assistant"


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Replace each `{name}`, one field after the other.

    NOTE: `{name}` inside a value is replaced by a later field, as OpenCompass does it. No item of the card's benchmarks
    holds such a value.
    """
    for name, value in fields.items():
        template = template.replace(f"{{{name}}}", value)
    return template


def text_prompt(turns: Sequence[Turn], *, num_fixed: int = 0) -> TextPrompt:
    """Base mode: the pieces joined with a line break. num_fixed: turns at the beginning that belong to `head`."""
    pieces = [turn.content for turn in turns]
    head = "".join(f"{piece}\n" for piece in pieces[:num_fixed] if piece)
    return TextPrompt(head=head, tail="\n".join(piece for piece in pieces[num_fixed:] if piece))


def chat_prompt(turns: Sequence[Turn], *, num_fixed: int = 0) -> ChatPrompt:
    """Chat mode: the rounds as messages; a begun answer at the end is dropped."""
    asked = tuple(turns[:-1] if turns[-1].role == ASSISTANT else turns)
    return ChatPrompt(head=asked[:num_fixed], tail=asked[num_fixed:])


@dataclass(frozen=True)
class ShotForm:
    """How a file of worked examples is cut into turns.

    question: how each question begins. question_end, answer_start: what stands around the line break between a
    question and its answer. answer_end: how each answer ends. count: how many there are.
    """

    question: str
    question_end: str
    answer_start: str
    answer_end: str
    count: int


def read_shots(data: DataFolder, name: str, form: ShotForm) -> tuple[Turn, ...]:
    """The worked examples of a file in `shots/`, which holds one JSON string: the examples as a base model sees them.

    Raises DataError where the file does not hold examples of that form.
    """
    text = data.json(name)
    if not isinstance(text, str):
        raise data.damaged(name, "it does not hold one JSON string")
    blocks = text.split(f"\n{form.question}")
    if len(blocks) != form.count or not blocks[0].startswith(form.question):
        raise data.damaged(name, f"it does not hold {form.count} examples that begin with {form.question!r}")
    turns: list[Turn] = []
    for n, block in enumerate(blocks):
        question, border, answer = block.partition(f"{form.question_end}\n{form.answer_start}")
        if answer.endswith(f"{form.answer_end}\n"):
            answer = answer.removesuffix("\n")  # the file may end in the line break before the next question
        if not border or not answer.endswith(form.answer_end):
            raise data.damaged(name, f"example {n + 1} has no answer that ends in {form.answer_end!r}")
        question = (form.question if n else "") + question + form.question_end
        turns += [Turn(USER, question), Turn(ASSISTANT, form.answer_start + answer)]
    return tuple(turns)
