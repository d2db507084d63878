"""The 25 rules of IFEval: whether an answer keeps to what was asked of its form (arXiv 2311.07911).

Source: google-research instruction_following_eval/instructions.py. Its expressions are quadratic in places; what is
written out here finds the same in time linear in the answer. An answer is read up to `MAX_CHARACTERS`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from internlm2.errors import InternLM2Error
from internlm2.eval.extras import library

MAX_CHARACTERS = 50_000
Arguments = Mapping[str, object]


class RuleError(InternLM2Error):
    """A rule that is not known, or without what it needs."""


def follows(rule: str, arguments: Arguments, answer: str) -> bool:
    """Whether an answer keeps to a rule, such as "length_constraints:number_words". An empty answer never does.

    arguments: as the data has them, such as {"num_words": 300, "relation": "at least"}. Raises RuleError for an unknown
    rule, or arguments that it cannot use.
    """
    if rule not in RULES:
        raise RuleError(f"There is no rule {rule!r}. Known: {', '.join(RULES)}.")
    answer = answer[:MAX_CHARACTERS]
    try:
        return bool(answer.strip()) and RULES[rule](answer, arguments)
    except re.error as error:
        raise RuleError(f"The keywords of {rule} are no expression: {error}.") from error


def loose_forms(answer: str) -> list[str]:
    """An answer as it is, then without its first line, its last, or both, and all of these without asterisks."""
    lines = answer.split("\n")
    parts = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*parts, *(part.replace("*", "") for part in parts)]


# -- arguments --------------------------------------------------------------------------------------------------


def _text(arguments: Arguments, name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value:
        raise RuleError(f"{name} is {value!r}, but must be a text.")
    return value


def _texts(arguments: Arguments, name: str) -> list[str]:
    value = arguments.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise RuleError(f"{name} is {value!r}, but must be a list of texts.")
    return value


def _number(arguments: Arguments, name: str) -> int:
    value = arguments.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # parquet files make it so where a column has gaps
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RuleError(f"{name} is {value!r}, but must be a whole number.")
    return value


def _holds(count: int, arguments: Arguments, number: str, relation: str = "relation") -> bool:
    kind = _text(arguments, relation)
    if kind not in ("less than", "at least"):
        raise RuleError(f"{relation} is {kind!r}, but must be 'less than' or 'at least'.")
    limit = _number(arguments, number)
    return count < limit if kind == "less than" else count >= limit


# -- libraries --------------------------------------------------------------------------------------------------


@cache
def _sentences() -> Callable[[str], Sequence[str]]:
    punkt = library("punkt", "Counting sentences")
    return punkt.PunktSentenceTokenizer(punkt.load_model("english")).tokenize


@cache
def _words() -> Callable[[str], Sequence[str]]:
    return library("nltk.tokenize.destructive", "Counting words in capitals").NLTKWordTokenizer().tokenize


@cache
def _languages():
    """Profiles of languages; seeded, because langdetect draws parts of a text at random."""
    found = library("langdetect.detector_factory", "Telling languages apart")
    factory = found.DetectorFactory()
    factory.load_profile(found.PROFILES_DIRECTORY)
    factory.set_seed(0)
    return factory


def _is_language(answer: str, code: str) -> bool:
    """Whether langdetect takes it for that language; a text without any letters counts as every language."""
    detector = _languages().create()
    detector.append(answer)
    try:
        return detector.detect() == code
    except library("langdetect", "Telling languages apart").LangDetectException:
        return True


# -- rules ------------------------------------------------------------------------------------------------------


def _keywords(answer: str, arguments: Arguments) -> bool:
    return all(re.search(word, answer, re.IGNORECASE) for word in _texts(arguments, "keywords"))


def _keyword_frequency(answer: str, arguments: Arguments) -> bool:
    count = len(re.findall(_text(arguments, "keyword").strip(), answer, re.IGNORECASE))
    return _holds(count, arguments, "frequency")


def _forbidden_words(answer: str, arguments: Arguments) -> bool:
    words = _texts(arguments, "forbidden_words")
    return not any(re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in words)


def _letter_frequency(answer: str, arguments: Arguments) -> bool:
    # NOTE: the original draws a letter at random where the data names something else, such as "#".
    letter = _text(arguments, "letter").strip().lower()
    return _holds(answer.lower().count(letter), arguments, "let_frequency", "let_relation")


def _language(answer: str, arguments: Arguments) -> bool:
    return _is_language(answer, _text(arguments, "language"))


def _num_sentences(answer: str, arguments: Arguments) -> bool:
    return _holds(len(_sentences()(answer)), arguments, "num_sentences")


def _num_paragraphs(answer: str, arguments: Arguments) -> bool:
    """Parts between `***`; the first and the last may be empty."""
    first, *others = re.split(r"\s?\*\*\*\s?", answer)
    last = others[-1:]
    middle = others[:-1]
    if not all(part.strip() for part in middle):
        return False
    count = len(middle) + sum(bool(part.strip()) for part in (first, *last))
    return count == _number(arguments, "num_paragraphs")


def _num_words(answer: str, arguments: Arguments) -> bool:
    return _holds(len(re.findall(r"\w+", answer)), arguments, "num_words")


def _first_word(answer: str, arguments: Arguments) -> bool:
    """So many paragraphs between blank lines, and the first word of the n-th. NOTE: n counts empty ones, too."""
    paragraphs = answer.split("\n\n")
    count = sum(bool(part.strip()) for part in paragraphs)
    n = _number(arguments, "nth_paragraph")
    if not 1 <= n <= count or not paragraphs[n - 1].strip():
        return False
    word = paragraphs[n - 1].split(maxsplit=1)[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower()
    wanted = _text(arguments, "first_word").lower()
    return count == _number(arguments, "num_paragraphs") and word == wanted


def _placeholders(answer: str, arguments: Arguments) -> bool:
    """Brackets around anything, each closed in its line."""
    count = 0
    for line in answer.split("\n"):
        end = -1
        while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
            count += 1
    return count >= _number(arguments, "num_placeholders")


def _postscript(answer: str, arguments: Arguments) -> bool:
    marker = _text(arguments, "postscript_marker").strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker, marker.lower()), answer.lower()) is not None


def _bullets(answer: str, arguments: Arguments) -> bool:
    """Lines that begin with a hyphen, or with an asterisk that no other follows.

    NOTE: an asterisk alone in its line counts and takes the next line with it.
    """
    lines = [line.lstrip() for line in answer.split("\n")]
    count = sum(line.startswith("-") for line in lines)
    n = 0
    while n < len(lines):
        if lines[n] == "*":
            count += n + 1 < len(lines)
            n += 1
        elif lines[n].startswith("*"):
            count += lines[n][1] != "*"
        n += 1
    return count == _number(arguments, "num_bullets")


def _constrained(answer: str, arguments: Arguments) -> bool:
    return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


def _highlights(answer: str, arguments: Arguments) -> bool:
    single = [part.strip("*") for part in re.findall(r"\*[^\n*]*\*", answer)]
    double = [part[2:-2] for part in re.findall(r"\*\*[^\n*]*\*\*", answer)]
    return sum(bool(part.strip()) for part in (*single, *double)) >= _number(arguments, "num_highlights")


def _sections(answer: str, arguments: Arguments) -> bool:
    marks = re.findall(rf"{_text(arguments, 'section_spliter').strip()}\s?\d+", answer)
    return len(marks) >= _number(arguments, "num_sections")


def _json(answer: str, arguments: Arguments) -> bool:
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(answer: str, arguments: Arguments) -> bool:
    """Something between << and >> in one line."""
    for line in answer.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_responses(answer: str, arguments: Arguments) -> bool:
    """Two different parts with six asterisks between them, and nothing empty but at the ends."""
    parts = [part.strip() for part in answer.split("******")]
    if not all(parts[1:-1]):
        return False
    filled = [part for part in parts if part]
    return len(filled) == 2 and filled[0] != filled[1]


def _repeat_prompt(answer: str, arguments: Arguments) -> bool:
    return answer.strip().lower().startswith(_text(arguments, "prompt_to_repeat").strip().lower())


def _end(answer: str, arguments: Arguments) -> bool:
    return answer.strip().strip('"').lower().endswith(_text(arguments, "end_phrase").strip().lower())


def _capital_words(answer: str, arguments: Arguments) -> bool:
    words = (word for sentence in _sentences()(answer) for word in _words()(sentence))
    return _holds(sum(word.isupper() for word in words), arguments, "capital_frequency", "capital_relation")


def _capitals(answer: str, arguments: Arguments) -> bool:
    return answer.isupper() and _is_language(answer, "en")


def _lowercase(answer: str, arguments: Arguments) -> bool:
    return answer.islower() and _is_language(answer, "en")


def _no_comma(answer: str, arguments: Arguments) -> bool:
    return "," not in answer


def _quotation(answer: str, arguments: Arguments) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


RULES: Mapping[str, Callable[[str, Arguments], bool]] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _num_sentences,
    "length_constraints:number_paragraphs": _num_paragraphs,
    "length_constraints:number_words": _num_words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capitals,
    "change_case:english_lowercase": _lowercase,
    "punctuation:no_comma": _no_comma,
}
"""By the names of the data."""
