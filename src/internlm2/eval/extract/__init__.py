"""From what a model wrote to what it answered: the rules of each protocol, as plain functions of text.

`PROTOCOLS` names them as the golden vectors do. All take time linear in the length of the text.
"""

from collections.abc import Callable, Mapping

from internlm2.eval.extract import agieval, choice, code, equivalent, latex, number

PROTOCOLS: Mapping[str, Callable[..., str | bool | None]] = {
    "first_capital": choice.first_capital,
    "first_option_ABCDE": choice.first_option,
    "first_capital_multi": choice.first_capitals,
    "bbh_mcq": agieval.bbh_choice,
    "bbh_freeform": agieval.bbh_text,
    "gsm8k_jan17": number.january,
    "gsm8k_feb6": number.february,
    "gsm8k_gold": number.gold,
    "math_v1": latex.version_1,
    "math_v2": latex.version_2,
    "math_equiv_v1": equivalent.version_1,
    "math_equiv_v2": equivalent.version_2,
    "humaneval_v1": code.humaneval_1,
    "humaneval_v2": code.humaneval_2,
    "mbpp_jan17": code.mbpp,
    "agieval_math": agieval.cloze,
}
"""The functions by the names of the golden vectors, with the same arguments."""
