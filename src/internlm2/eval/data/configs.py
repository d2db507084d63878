"""The worked examples of GSM8K, MATH and MBPP, out of OpenCompass' configuration files.

They are Python, of which only the literal rounds are read; nothing is run.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

_CONFIGS = {
    "shots/gsm8k_base.json": ("gsm8k/gsm8k_gen_1d7fe4.py",),
    "shots/math_base.json": ("math/math_gen_265cce.py", "math/math_evaluatorv2_gen_265cce.py"),
    "shots/mbpp_base.json": (
        "mbpp/sanitized_mbpp_gen_1e1056.py",
        "mbpp/deprecated_sanitized_mbpp_gen_1e1056.py",
    ),
}
_ROOTS = ("", "datasets", "configs/datasets", "opencompass/configs/datasets")


def shots_of_configs(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in `shots/` that the configurations below `source` allow to write."""
    for name, configs in _CONFIGS.items():
        paths = [source / root / config for root in _ROOTS for config in configs]
        path = next((path for path in paths if path.is_file()), None)
        pieces = [] if path is None else _rounds(path.read_text(encoding="utf-8"))
        if pieces:
            # the file of MBPP ends in the line break before the next question
            text = "\n".join(pieces) + ("\n" if "mbpp" in name else "")
            yield name, json.dumps(text).encode()


def _rounds(source: str) -> list[str]:
    """The prompts of the longest list of rounds, without the question itself, which holds a field in braces."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "round" and isinstance(node.value, ast.List):
            pieces = [piece for one in node.value.elts if (piece := _prompt(one)) is not None]
            found = max(found, pieces, key=len)
    fields = ("{question}", "{problem}", "{text}")
    last = next((n for n, piece in enumerate(found) if any(field in piece for field in fields)), 0)
    return found[:last]


def _prompt(node: ast.expr) -> str | None:
    values: list[ast.expr] = []
    if isinstance(node, ast.Call):
        values = [keyword.value for keyword in node.keywords if keyword.arg == "prompt"]
    elif isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        values = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "prompt"]
    texts = [
        value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)
    ]
    return texts[0] if texts else None
