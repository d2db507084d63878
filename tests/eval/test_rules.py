"""The rules of IFEval, against IFEval's own code."""

import json
import random
import time

import pytest
from long_data import write_rows
from oracles import ifeval_follows, ifeval_instructions

from internlm2.eval import rules
from internlm2.eval.data.folder import DataError, DataFolder
from internlm2.eval.profile import find_profile
from internlm2.eval.rules import RULES, RuleError, follows, loose_forms
from internlm2.eval.task import EvalError
from internlm2.eval.tasks import build, find_item
from internlm2.eval.tasks.instructions import InstructionLevels, instruction_levels

CHECKERS = {
    "keywords:existence": "KeywordChecker",
    "keywords:frequency": "KeywordFrequencyChecker",
    "keywords:forbidden_words": "ForbiddenWords",
    "keywords:letter_frequency": "LetterFrequencyChecker",
    "language:response_language": "ResponseLanguageChecker",
    "length_constraints:number_sentences": "NumberOfSentences",
    "length_constraints:number_paragraphs": "ParagraphChecker",
    "length_constraints:number_words": "NumberOfWords",
    "length_constraints:nth_paragraph_first_word": "ParagraphFirstWordCheck",
    "detectable_content:number_placeholders": "PlaceholderChecker",
    "detectable_content:postscript": "PostscriptChecker",
    "detectable_format:number_bullet_lists": "BulletListChecker",
    "detectable_format:constrained_response": "ConstrainedResponseChecker",
    "detectable_format:number_highlighted_sections": "HighlightSectionChecker",
    "detectable_format:multiple_sections": "SectionChecker",
    "detectable_format:json_format": "JsonFormat",
    "detectable_format:title": "TitleChecker",
    "combination:two_responses": "TwoResponsesChecker",
    "combination:repeat_prompt": "RepeatPromptThenAnswer",
    "startend:end_checker": "EndChecker",
    "startend:quotation": "QuotationChecker",
    "change_case:capital_word_frequency": "CapitalWordFrequencyChecker",
    "change_case:english_capital": "CapitalLettersEnglishChecker",
    "change_case:english_lowercase": "LowercaseLettersEnglishChecker",
    "punctuation:no_comma": "CommaChecker",
}
RELATIONS = ("less than", "at least")
PIECES = {
    "keywords:existence": (["cat", "Dog", " ", "concatenate", "DOG"], [{"keywords": ["cat", "dog"]}, {"keywords": ["cat"]}]),
    "keywords:frequency": (["cat ", "Cat", "dog"], [{"keyword": " cat ", "frequency": 2, "relation": r} for r in RELATIONS]),
    "keywords:forbidden_words": (["cat", "cats", " ", "DOG", "dog-"], [{"forbidden_words": ["cat", "dog"]}]),
    "keywords:letter_frequency": (
        ["a", "A", "b", "ä"],
        [{"letter": letter, "let_frequency": 2, "let_relation": r} for r in RELATIONS for letter in "aB"],
    ),
    "length_constraints:number_sentences": (
        ["Dr. Smith came. ", "Why? ", "No! ", "It is 3.5 m. ", "e.g. this ", "\n\n", "end"],
        [{"num_sentences": 3, "relation": r} for r in RELATIONS],
    ),
    "length_constraints:number_paragraphs": (["***", "text", " ", "\n", "*", "****"], [{"num_paragraphs": n} for n in (1, 2, 3)]),
    "length_constraints:number_words": (["one", " ", "it's", "-", "zwei_3", "…"], [{"num_words": 4, "relation": r} for r in RELATIONS]),
    "length_constraints:nth_paragraph_first_word": (
        ["Cat", '"cat', "'cat's", "\n\n", "\n", " ", "dog.", "cat,x", '\'"cat'],
        [{"num_paragraphs": n, "nth_paragraph": k, "first_word": "Cat"} for n in (1, 2, 3) for k in (1, 2) if k <= n],
    ),
    "detectable_content:number_placeholders": (["[", "]", "a", "\n", "[b]"], [{"num_placeholders": n} for n in (1, 2)]),
    "detectable_content:postscript": (
        ["P.S.", "p. s.", "P.P.S", "p. p. s", " ", "\n", "x", "PS"], [{"postscript_marker": m} for m in ("P.S.", "P.P.S", "Note:")],
    ),
    "detectable_format:number_bullet_lists": (
        ["*", "* a", "**", "- b", "\n", " ", "\t", "c", "-", "\x0b"], [{"num_bullets": n} for n in (0, 1, 2, 3)],
    ),
    "detectable_format:constrained_response": (["My answer is yes.", "My answer is no", "My answer", " is maybe."], [{}]),
    "detectable_format:number_highlighted_sections": (["*", "**", "a", " ", "\n", "*b*"], [{"num_highlights": n} for n in (1, 2, 3)]),
    "detectable_format:multiple_sections": (
        ["Section", " ", "1", "SECTION 2", "\n", "x"], [{"section_spliter": s, "num_sections": 2} for s in ("Section", "SECTION")],
    ),
    "detectable_format:json_format": (['{"a": 1}', "```json\n", "```", "\n", "[", "]", "```JSON"], [{}]),
    "detectable_format:title": (["<<", ">>", "<", ">", "a", " ", "\n"], [{}]),
    "combination:two_responses": (["******", "a", "b", " ", "\n", "*"], [{}]),
    "combination:repeat_prompt": (["Say", " this", "say THIS", "\n", "x"], [{"prompt_to_repeat": " Say this"}]),
    "startend:end_checker": (["The end", "the END", '"', " ", ".", "\n"], [{"end_phrase": " The end "}]),
    "startend:quotation": (['"', "a", " ", "\n"], [{}]),
    "change_case:capital_word_frequency": (
        ["CAT ", "Cat ", "A ", "U.S.A. ", "IT'S ", "NO. ", "x-Y ", "DON'T, "],
        [{"capital_frequency": 2, "capital_relation": r} for r in RELATIONS],
    ),
    "change_case:english_capital": (["THIS IS AN ENGLISH SENTENCE ", "das ist ", "HELLO WORLD AGAIN AND AGAIN ", "12 "], [{}]),
    "change_case:english_lowercase": (["this is an english sentence ", "Das ", "hello world again and again ", "12 "], [{}]),
    "punctuation:no_comma": (["a", ",", "，", " "], [{}]),
    "language:response_language": (
        ["This is certainly an English sentence about things. ", "Dies ist ganz sicher ein deutscher Satz über Dinge. ", "12 ", "... "],
        [{"language": "en"}, {"language": "de"}],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def official():
    with pytest.MonkeyPatch.context() as patch:
        module = ifeval_instructions(patch)
        module.langdetect.DetectorFactory.seed = 0
        yield module


def test_all_25_rules_are_there():
    assert set(RULES) == set(CHECKERS) == set(PIECES)
    assert len(RULES) == 25


@pytest.mark.parametrize("rule", CHECKERS)
def test_a_rule_is_that_of_ifeval(official, rule):
    pieces, choices = PIECES[rule]
    draw = random.Random(rule)
    is_slow = rule.startswith(("language", "change_case:english"))
    seen = set()
    for _ in range(25 if is_slow else 600):
        answer = "".join(draw.choices(pieces, k=draw.randint(0, 3 if is_slow else 8)))
        for arguments in choices:
            expected = ifeval_follows(official, CHECKERS, rule, arguments, answer)
            assert follows(rule, arguments, answer) == expected, (answer, arguments)
            seen.add(expected)
    assert seen == {True, False}


def test_loose_forms_leave_out_lines_and_asterisks():
    assert loose_forms("a\n*b*\nc") == [
        "a\n*b*\nc",
        "*b*\nc",
        "a\n*b*",
        "*b*",
        "a\nb\nc",
        "b\nc",
        "a\nb",
        "b",
    ]
    assert loose_forms("a") == ["a", "", "", "", "a", "", "", ""]


def test_letters_that_are_none_are_counted_as_they_are():
    arguments = {"letter": "#", "let_frequency": 2, "let_relation": "at least"}
    assert follows("keywords:letter_frequency", arguments, "# #")
    assert not follows("keywords:letter_frequency", arguments, "#")


def test_numbers_out_of_parquet_files_are_read():
    assert follows("detectable_format:number_bullet_lists", {"num_bullets": 1.0}, "- a")


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        ("keywords:all", {}, "There is no rule 'keywords:all'"),
        ("keywords:existence", {}, "keywords is None, but must be a list of texts"),
        ("keywords:existence", {"keywords": ["(a"]}, "keywords of keywords:existence are no expression"),
        ("keywords:frequency", {"keyword": ""}, "keyword is '', but must be a text"),
        ("length_constraints:number_words", {"num_words": "3", "relation": "at least"}, "num_words is '3', but must be a whole"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "must be 'less than' or 'at least'"),
        ("detectable_format:number_bullet_lists", {"num_bullets": -1}, "num_bullets is -1"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_told(rule, arguments, message):
    with pytest.raises(RuleError, match=message.replace("(", r"\(")):
        follows(rule, arguments, "text")


def test_bait_for_expressions_is_read_in_bounded_time():
    start = time.monotonic()
    for char in ("[", "<", "*", "\n", " ", "\n ", "a.", "P.", "a\n\n", "{", "(", '"', "- ", "<<a"):
        bait = char * (1_000_000 // len(char)) + "x"
        for rule, (_, choices) in PIECES.items():
            if not rule.startswith("language"):
                follows(rule, choices[0], bait)
    assert time.monotonic() - start < 60


# -- the task ------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> DataFolder:
    rows = [
        {
            "key": 1, "prompt": "Write without commas, in two bullets.",
            "instruction_id_list": ["punctuation:no_comma", "detectable_format:number_bullet_lists"],
            "kwargs": [{}, {"num_bullets": 2, "relation": None}],
        },
        {"key": 2, "prompt": "In quotes.", "instruction_id_list": ["startend:quotation"], "kwargs": [{}]},
    ]  # fmt: skip
    write_rows(tmp_path / "ifeval/input_data.jsonl", rows)
    return DataFolder(tmp_path)


def test_a_request_is_kept_to_wholly_or_not(data):
    profile = find_profile("fixed")
    task = build("ifeval", profile, is_chat=True)
    item = find_item("ifeval:0", profile, data, is_chat=True)
    assert item.prompt.text.startswith("<|im_start|>user\nWrite without commas")
    assert item.is_long
    right = task.score(item, "- a\n- b")
    assert (right.score, right.detail) == (1.0, "strict 11 loose 11")
    loose = task.score(item, "Sure, here:\n- a\n- b")
    assert (loose.score, loose.detail) == (0.0, "strict 01 loose 11")
    assert loose.extracted == "detectable_format:number_bullet_lists"
    empty = task.score(find_item("ifeval:1", profile, data, is_chat=True), " ")
    assert (empty.score, empty.detail) == (0.0, "strict 0 loose 0")
    levels = instruction_levels([right.detail, loose.detail, empty.detail])
    assert levels == InstructionLevels(pytest.approx(100 / 3), pytest.approx(200 / 3), 60.0, 80.0)
    with pytest.raises(EvalError, match="no detail of an IFEval verdict"):
        instruction_levels(["similarity 3"])
    with pytest.raises(EvalError, match="no verdict"):
        instruction_levels([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kwargs": []}, "line 1 has no rules with an object of arguments each"),
        ({"instruction_id_list": ["a:b"], "kwargs": [{}]}, "line 1 has the unknown rule 'a:b'"),
    ],
)
def test_damaged_rows_are_told(data, tmp_path, change, message):
    row = json.loads((tmp_path / "ifeval/input_data.jsonl").read_text().split("\n")[1])
    write_rows(tmp_path / "ifeval/input_data.jsonl", [row | change])
    with pytest.raises(DataError, match=message):
        find_item("ifeval:0", find_profile("fixed"), data, is_chat=True)


def test_languages_are_told_apart_alike_each_time():
    text = "Hallo world ist was"
    assert len({rules._is_language(text, "en") for _ in range(5)}) == 1
