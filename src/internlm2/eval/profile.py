"""Named protocols: the two that may have made the model card, and one with the known faults mended.

The card does not say which state of OpenCompass made its numbers: that of the release (17 January 2024) or that of the
update three weeks later (5 February). Prompts are the same in all; what differs is how answers are read.
"""

from dataclasses import dataclass

from internlm2.config import suggest
from internlm2.errors import ConfigError


@dataclass(frozen=True)
class Mend:
    """A known fault of the card's scoring, and what the profile `fixed` does instead. name: as tasks ask for it."""

    name: str
    fault: str
    instead: str


MENDS = (
    Mend(
        "context",
        "Prompts over 2048 tokens lose examples (MMLU: 375 base, 461 chat), then their beginning (two BBH sets).",
        "No limit but that of the model.",
    ),
    Mend(
        "choice",
        "The first capital or the first of 43 patterns decides: `(A) because B is wrong` counts as B.",
        "The last clear statement decides: a box, `answer is X`, a letter that stands for itself.",
    ),
    Mend(
        "several-choices",
        "Where several options are right, `A、C` and `(A)(C)` count as A.",
        "All letters of the statement count, in any order and spelling.",
    ),
    Mend(
        "several-golds",
        "Seven questions of gaokao-mathqa have several right letters and can never be met.",
        "Each of them is right.",
    ),
    Mend(
        "cloze",
        "Gold answers of gaokao-mathcloze keep their dollar signs: a perfect answer reaches 40 of 118.",
        "Dollar signs go, several blanks are compared one by one, and values count, not spelling.",
    ),
    Mend(
        "bbh",
        "The first `answer is ` decides even where reasoning corrects it; capitals and quotes count.",
        "The last one before a further question decides; capitals, quotes and blanks do not count.",
    ),
    Mend(
        "gsm8k",
        "Signs are lost, `5*3=15` is read as 5315, thousands commas split numbers.",
        "The number after the last `answer is`, a box or the last number; commas and signs are understood.",
    ),
    Mend(
        "math",
        "Answers are cut at decimal points and lists run together: perfect answers reach 92.3 %.",
        "The last box or `answer is` as it stands; equal values are equal, however they are spelled.",
    ),
    Mend(
        "humaneval",
        "Bodies are cut at blank lines or lose them: reference programs reach 77.4 or 93.3 %.",
        "Only what follows the function is cut; a whole function is taken as it is.",
    ),
    Mend(
        "mbpp",
        "Backslashes are deleted, test_imports ignored, 2 s are all: reference programs reach 93.4 %.",
        "Programs stay as they are, the imports of the tests are made, and 20 s are given.",
    ),
    Mend(
        "needle",
        "Right answers in other words than the needle's lose points, chats get a bare text, and lengths are GPT-4's.",
        "The keyword decides, chats get a message, and lengths are counted in the model's tokens.",
    ),
    Mend(
        "longbench",
        "qasper is asked in the words of hotpotqa, chats get lists and code as messages, long prompts lose the start.",
        "LongBench's own prompts; those six tasks are plain text; prompts that are too long lose their middle.",
    ),
    Mend(
        "leval",
        "Of several right options the first run decides, and open questions are scored by ROUGE-1.",
        "L-Eval's own scorers: a quarter for a part of the options, F1 or ROUGE-L for open questions.",
    ),
)
"""Every mend of the profile `fixed`. Nothing else in this room differs from the card without being listed here."""


@dataclass(frozen=True)
class Profile:
    """One protocol.

    choice: how chat answers to MMLU, C-Eval and CMMLU are read, "first_capital" or "first_option". gsm8k: "january" or
    "february". humaneval_base: version 1 or 2 of the truncation for base models. min_tokens: shortest answer of a base
    model. max_context_tokens: of prompt and answer together; None: what the model has. mends: names out of `MENDS`.
    """

    name: str
    choice: str
    gsm8k: str
    humaneval_base: int
    min_tokens: int
    max_context_tokens: int | None
    mends: frozenset[str] = frozenset()


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("card-2024-01", "first_capital", "january", 1, 3, 2048),
        Profile("card-2024-02", "first_option", "february", 2, 1, 2048),
        Profile("fixed", "first_option", "february", 2, 1, None, frozenset(mend.name for mend in MENDS)),
    )
}


def find_profile(name: str) -> Profile:
    """The profile of that name. Raises ConfigError with the known ones."""
    if name not in PROFILES:
        raise ConfigError(f"There is no profile {name!r}. {suggest(name, list(PROFILES))}")
    return PROFILES[name]
