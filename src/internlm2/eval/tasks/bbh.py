"""BIG-Bench Hard: 27 tasks, three worked examples with reasoning in the prompt file (bbh_gen_5b92b0, base and chat)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.extract import agieval, mended
from internlm2.eval.profile import Profile
from internlm2.eval.task import Average, ChatPrompt, Item, ProgramRunner, TextPrompt, Turn, Verdict
from internlm2.eval.template import USER, fill

MAX_TOKENS = 512
EARLY_STOP = ("\n\nQ:", "\nQ: ")
CHOICE = (
    "temporal_sequences", "disambiguation_qa", "date_understanding", "tracking_shuffled_objects_three_objects",
    "penguins_in_a_table", "geometric_shapes", "snarks", "ruin_names", "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_five_objects", "logical_deduction_three_objects", "hyperbaton",
    "logical_deduction_five_objects", "logical_deduction_seven_objects", "movie_recommendation",
    "salient_translation_error_detection", "reasoning_about_colored_objects",
)  # fmt: skip
FREE = (
    "multistep_arithmetic_two", "navigate", "dyck_languages", "word_sorting", "sports_understanding",
    "boolean_expressions", "object_counting", "formal_fallacies", "causal_judgement", "web_of_lies",
)  # fmt: skip


@dataclass(frozen=True)
class BBH:
    """See `Task`."""

    profile: Profile
    is_chat: bool
    name: str = "bbh"
    needs_programs: bool = False

    @property
    def subsets(self) -> Sequence[str]:
        """The 27 tasks."""
        return CHOICE + FREE

    @property
    def averages(self) -> Sequence[Average]:
        """All tasks alike: the card's number."""
        everything = CHOICE + FREE
        return [
            Average("bbh", everything),
            Average("bbh-weighted", everything, True),
            Average("bbh-choice", CHOICE),
            Average("bbh-free", FREE),
        ]

    def files(self, subset: str) -> Sequence[str]:
        """The questions and the prompt with worked examples."""
        return (f"BBH/data/{subset}.json", f"BBH/lib_prompt/{subset}.txt")

    def items(self, data: DataFolder, subset: str) -> Iterator[Item]:
        """See `Task.items`."""
        name, prompt_name = self.files(subset)
        shots = data.text(prompt_name)
        ask = "Q: {input}\nA: Let's think step by step."
        template = f"Follow the given examples and answer the question.\n{shots}\n\n{ask}"
        content = data.checked(name, data.json(name), ("examples",), "the file")
        examples = content["examples"]
        if not isinstance(examples, list):
            raise data.damaged(name, "`examples` is no list")
        for index, example in enumerate(examples):
            row = data.checked(name, example, ("input", "target"), f"example {index}")
            fields = {"input": str(row["input"]), "target": ""}
            text = fill(template, fields)
            prompt = ChatPrompt((), (Turn(USER, text),)) if self.is_chat else TextPrompt("", text)
            early = () if self.is_chat else EARLY_STOP
            yield Item(
                self.name, subset, index, str(row["target"]), prompt, max_tokens=MAX_TOKENS,
                stop=early if "bbh" in self.profile.mends else (), early_stop=early,
            )  # fmt: skip

    def score(self, item: Item, output: str, run: ProgramRunner | None = None) -> Verdict:
        """See `Task.score`. The gold answers of the choice tasks are read like the model's."""
        is_choice = item.subset in CHOICE
        if "bbh" in self.profile.mends:
            answer = mended.statement(output.partition("\n\nQ:")[0].partition("\nQ: ")[0])
            extracted = mended.bracketed_letter(answer) if is_choice else mended.plain_words(answer)
            gold = mended.bracketed_letter(item.gold) if is_choice else mended.plain_words(item.gold)
        elif is_choice:
            extracted, gold = agieval.bbh_choice(output), agieval.bbh_choice(item.gold)
        else:
            extracted, gold = agieval.bbh_text(output), item.gold
        return Verdict(float(extracted == gold), extracted)
