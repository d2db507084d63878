"""How much two texts have in common: word F1, ROUGE-L, edit distance, similarity of code.

These are the measures of LongBench, L-Eval and the needle tests; all are from 0 to 1. What a model wrote is read up to
`MAX_CHARACTERS`, several times what those benchmarks let it write: time and memory grow with the product of lengths.
Sources: THUDM/LongBench metrics.py; the packages rouge 1.0.1 and fuzzywuzzy 0.18 that it calls; rouge-score 0.1.2.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache

from internlm2.eval.extras import library

MAX_CHARACTERS = 20_000
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_PUNCTUATION = frozenset(string.punctuation)
_ALL_PUNCTUATION = _PUNCTUATION | frozenset(_CHINESE_PUNCTUATION)


def plain_words(text: str) -> list[str]:
    """English words as SQuAD compares them: lower case, without punctuation and articles."""
    kept = "".join(char for char in text.lower() if char not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def chinese_words(text: str) -> list[str]:
    """Words as jieba cuts them, in its precise mode. Raises MissingDependencyError without it."""
    return list(_jieba()(text))


def plain_chinese_words(text: str) -> list[str]:
    """The words that hold more than punctuation and blanks, in lower case."""
    words = (
        "".join(char for char in word.lower() if char not in _ALL_PUNCTUATION) for word in chinese_words(text)
    )
    return [joined for word in words if (joined := "".join(word.split()))]


@cache
def _jieba():
    jieba = library("jieba", "Cutting Chinese text into words")
    tokenizer = jieba.Tokenizer()
    # NOTE: jieba's own way reads a marshal file out of /tmp, which anybody may have put there.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer.cut


def f1(words: Sequence[str], gold: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, each as often as it occurs."""
    num_common = (Counter(words) & Counter(gold)).total()
    if not num_common:
        return 0.0
    precision, recall = num_common / len(words), num_common / len(gold)
    return 2 * precision * recall / (precision + recall)


def qa_f1(answer: str, gold: str, *, is_chinese: bool = False) -> float:
    """F1 over normalised words."""
    words = plain_chinese_words if is_chinese else plain_words
    return f1(words(answer[:MAX_CHARACTERS]), words(gold))


def rouge_l(answer: str, gold: str, *, is_chinese: bool = False) -> float:
    """ROUGE-L over sentences, as the package `rouge` has it: each word counts once; 0 for an empty text.

    NOTE: that package recurses over both texts and fails beyond some 900 words, which LongBench counts as 0. Here such
    texts have a score.
    """
    answer = answer[:MAX_CHARACTERS]
    if is_chinese:
        answer, gold = " ".join(chinese_words(answer)), " ".join(chinese_words(gold))
    own, other = _sentences(answer), _sentences(gold)
    if not own or not other:
        return 0.0
    num_own = len({word for sentence in own for word in sentence})
    num_other = len({word for sentence in other for word in sentence})
    union: set[str] = set()
    for sentence in other:
        for candidate in own:
            union |= _common_subsequence(sentence, candidate)
    precision, recall = len(union) / num_own, len(union) / num_other
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    # NOTE: the package splits at blanks only, so that an empty sentence has the empty word.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """The words of the longest common subsequence; of several that which the package `rouge` finds."""
    width = len(second) + 1
    table = [[0] * width]
    for word in first:
        above, row = table[-1], [0] * width
        for j, other in enumerate(second, 1):
            row[j] = above[j - 1] + 1 if word == other else max(above[j], row[j - 1])
        table.append(row)
    words, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            words.add(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def edit_similarity(answer: str, gold: str) -> float:
    """1 - Levenshtein distance / length of the longer text, blanks left out; 1 for two empty texts."""
    distance = library("rapidfuzz.distance.Levenshtein", "The edit distance")
    answer, gold = (re.sub(r"\s+", "", text) for text in (answer[:MAX_CHARACTERS], gold))
    longest = max(len(answer), len(gold))
    return 1 - distance.distance(answer, gold) / longest if longest else 1.0


def code_similarity(answer: str, gold: str) -> float:
    """Twice the common subsequence over both lengths, for the first line of code; rounded to hundredths.

    The first line is taken that holds no backtick, # or //. That is `fuzz.ratio` of fuzzywuzzy with python-Levenshtein.
    """
    lines = answer[:MAX_CHARACTERS].lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not gold:
        return 0.0
    return round(library("rapidfuzz.fuzz", "Comparing code").ratio(line, gold)) / 100


def number_share(answer: str, gold: str) -> float:
    """Which share of the numbers in the answer is `gold`; 0 where there are none."""
    numbers = re.findall(r"\d+", answer[:MAX_CHARACTERS])
    return numbers.count(gold) / len(numbers) if numbers else 0.0


def class_share(answer: str, gold: str, classes: Sequence[str]) -> float:
    """1 / the number of classes that the answer names, if `gold` is one of them.

    A class whose name is a part of the gold one does not count. NOTE: as in LongBench, a class right behind such a one
    in the list of those found is not looked at, and counts.
    """
    found = [name for name in classes if name in answer]
    n = 0
    while n < len(found):
        if found[n] in gold and found[n] != gold:
            found.remove(found[n])
        n += 1
    return 1 / len(found) if gold in found else 0.0


def rouge_1(answer: str, gold: str) -> float:
    """F of ROUGE-1 as Google's package rouge-score has it: single words, without stemming."""
    return f1(_ascii_words(answer[:MAX_CHARACTERS]), _ascii_words(gold))


def rouge_l_of_whole(answer: str, gold: str) -> float:
    """F of ROUGE-L as rouge-score has it: the longest common subsequence of the whole texts, without stemming."""
    words, others = _ascii_words(answer[:MAX_CHARACTERS]), _ascii_words(gold)
    if not words or not others:
        return 0.0
    common = library("rapidfuzz.distance.LCSseq", "ROUGE").similarity(words, others)
    return 2 * common / (len(words) + len(others))


def _ascii_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
