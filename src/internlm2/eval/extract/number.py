"""The numbers of GSM8K, as OpenCompass read them on 17 January and on 6 February 2024.

Source of the rules: open-compass/opencompass `datasets/gsm8k.py`, https://github.com/open-compass/opencompass.
"""

import re


def gold(text: str) -> str:
    """What stands after `#### `, without thousands commas. Raises ValueError where the mark is missing."""
    _, mark, answer = text.partition("#### ")
    if not mark:
        raise ValueError("no '#### ' before the answer")
    return answer.partition("#### ")[0].replace(",", "")


def january(text: str) -> str:
    """Digits and points of the last word with a digit before the first blank line; "5*3=15" gives "5315"."""
    words = text.partition("\n\n")[0].split(" ")
    last = next((word for word in reversed(words) if any(c.isdigit() for c in word)), "")
    return "".join(c for c in last if c.isdigit() or c == ".").strip(".")


def february(text: str) -> str:
    """The last number before `Question:`, or "NULL"; a thousands comma splits it."""
    numbers = re.findall(r"-?\d+\.\d+|-?\d+", text.partition("Question:")[0])
    return numbers[-1] if numbers else "NULL"


def nearly_equal(answer: str, gold: str) -> bool:
    """Equal as text, or within 1e-6 of the whole number `gold`; the rule from 4 February on."""
    if answer == gold:
        return True
    try:
        return abs(float(answer) - int(gold)) < 1e-6
    except (ValueError, OverflowError):
        return False
