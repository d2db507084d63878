"""The needle tests by name: haystack, needle, question, and the grid of lengths and depths.

Sources: open-compass/opencompass configs/datasets/cdme (January 2024) and configs/datasets/needlebench (March 2024);
gkamradt/LLMTest_NeedleInAHaystack at 7b90d285. Lengths and depths of NeedleBench are those of its 200K configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ZH_PROMPT = (
    "你是一个善于回答用户问题的智能AI助手\n请保持你的回答简洁清楚。不要说和下面文档中的无关的话，或重复你的回答\n"
    "用户现在给你的文档是{context}\n\n现在请问：{question}"
)
EN_PROMPT = (
    "You are an intelligent AI assistant skilled in answering user questions.\n"
    "Please keep your answers concise and clear. Do not talk about irrelevant topics or repeat your answers.\n"
    "The document given to you by the user is {context}\n\nNow, the question is: {question}"
)
_ZH_GUIDE = ("请按照", "在回答之前，请思考文档中与此问题最相关的内容是什么。")
_EN_GUIDE = (
    "Please answer in the format",
    "Before answering, please consider what in the document is most relevant to this question. ",
)


@dataclass(frozen=True)
class Needle:
    """What is hidden and asked for. texts: in the order of the document. answer: is compared; keyword: its core."""

    texts: tuple[str, ...]
    question: str
    answer: str
    keyword: str


@dataclass(frozen=True)
class Language:
    """Half of a test: which haystack and which words. buffer: tokens of a length that are left to prompt and answer."""

    haystack: str
    prompt: str
    guide: tuple[str, str]
    buffer: int
    language: str  # of the rows of needles.jsonl


@dataclass(frozen=True)
class Form:
    """One needle test.

    kind: "edit" (edit distance to the needle), "keyword", or "words" (the share of the answer's words). needle: None:
    drawn from `needlebench/needles.jsonl` for each repeat. languages: by the first part of a subset's name, "" for one.
    step: percent between several needles.
    """

    kind: str
    lengths: tuple[int, ...]
    depths: tuple[int, ...]
    num_repeats: int
    languages: Mapping[str, Language]
    needle: Needle | None = None
    step: int = 0


def guided(question: str, language: Language) -> str:
    """The question with a hint before the words that give the form of the answer."""
    mark, hint = language.guide
    before, found, after = question.partition(mark)
    return f"{before}{hint}{mark}{after.split(mark)[0]}" if found else question


def linear(count: int, *, is_rounded: bool = False) -> tuple[int, ...]:
    """Percentages from 0 to 100 at equal distances, cut to whole numbers, or rounded to even ones at halves."""
    step = 100 / (count - 1)
    return tuple(round(n * step) if is_rounded else int(step * n) for n in range(count))


_ZH = Language("CDME/zh_finance.jsonl", ZH_PROMPT, _ZH_GUIDE, 200, "Chinese")
JANUARY_NEEDLE = Needle(
    ("\n小明最喜欢的实习的地点就是上海人工智能实验室。\n",),
    "小明最喜欢的实习地点是哪里？请按照“小明最喜欢的实习地点就是________。”的格式回答。",
    "\n小明最喜欢的实习的地点就是上海人工智能实验室。\n",
    "上海人工智能实验室",
)
_TWO_NEEDLES = Needle(
    (
        '\n意大利的佛罗伦萨有一家名为"La Giostra"的餐馆，是整个佛罗伦萨中排行第一的餐馆。\n',
        '"La Giostra"餐馆的特色菜肴是松露奶酪通心粉。',
    ),
    "佛罗伦萨中排行第一的餐馆的特色菜肴是？请按照'佛罗伦萨中排行第一的餐馆的特色菜肴是______。'的格式回答。",
    "佛罗伦萨中排行第一的餐馆的特色菜肴是松露奶酪通心粉。",
    "松露奶酪通心粉",
)
SAN_FRANCISCO = Needle(
    ("\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n",),
    "What is the best thing to do in San Francisco?",
    "eat a sandwich and sit in Dolores Park on a sunny day.",
    "",
)
ESSAYS = "needle_en/"
_JANUARY = {"kind": "edit", "depths": linear(20), "num_repeats": 10, "languages": {"": _ZH}}
FORMS: Mapping[str, Form] = {
    "needle": Form(lengths=tuple(range(1000, 201_000, 1000)), needle=JANUARY_NEEDLE, **_JANUARY),
    "needle_8k": Form(lengths=tuple(range(1000, 9000, 1000)), needle=JANUARY_NEEDLE, **_JANUARY),
    "needle_32k": Form(lengths=tuple(range(1000, 33_000, 1000)), needle=JANUARY_NEEDLE, **_JANUARY),
    "needle_multi": Form(
        "keyword", tuple(range(1000, 9000, 1000)), linear(20), 10, {"": _ZH}, _TWO_NEEDLES, step=25
    ),
    "needlebench": Form(
        "keyword",
        (16_000, 48_000, 80_000, 112_000, 128_000, 144_000, 176_000, 200_000),
        (0, 10, 21, 31, 42, 52, 63, 73, 84, 94, 100),
        10,
        {
            "en": Language("needlebench/PaulGrahamEssays.jsonl", EN_PROMPT, _EN_GUIDE, 600, "English"),
            "zh": Language("needlebench/zh_finance.jsonl", ZH_PROMPT, _ZH_GUIDE, 200, "Chinese"),
        },
    ),
    "needle_en": Form(
        "words",
        tuple(round(1000 + n * 199_000 / 34) for n in range(35)),
        linear(35, is_rounded=True),
        1,
        {"": Language(ESSAYS, "", ("", ""), 200, "English")},
        SAN_FRANCISCO,
    ),
}
"""By the names that the command line knows."""
NEEDLES = "needlebench/needles.jsonl"
