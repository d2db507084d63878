"""What the model card of InternLM2 claims, to stand beside what is measured here.

Source: the table of https://huggingface.co/internlm/internlm2-7b (README.md, January 2024). All numbers are percent.
"""

from collections.abc import Mapping

CARD_NAMES: Mapping[str, str] = {
    "mmlu": "MMLU",
    "agieval": "AGIEval",
    "bbh": "BBH",
    "gsm8k": "GSM8K",
    "math": "MATH",
    "humaneval": "HumanEval",
    "sanitized_mbpp": "MBPP(Sanitized)",
}
"""The tasks as the card spells them, in its order."""

_COLUMNS = {
    "InternLM2-7B": (65.8, 49.9, 65.0, 70.8, 20.2, 43.3, 51.8),
    "InternLM2-Chat-7B": (63.7, 47.2, 61.2, 70.7, 23.0, 59.8, 51.4),
    "InternLM2-20B": (67.7, 53.0, 72.1, 76.1, 25.5, 48.8, 63.0),
    "InternLM2-Chat-20B": (66.5, 50.3, 68.3, 79.6, 31.9, 67.1, 65.8),
}
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    model: dict(zip(CARD_NAMES, scores, strict=True)) for model, scores in _COLUMNS.items()
}
"""By model, then by task."""


def nearest(name: str, *, is_chat: bool) -> str:
    """The model of the card that a name means; where it means none, the 7B model of the same mode."""
    plain = name.lower().replace("_", "-")
    for model in PUBLISHED:
        if model.lower() in plain:
            return model
    return "InternLM2-Chat-7B" if is_chat else "InternLM2-7B"
