"""The samples in the repository, and the full benchmark data where the machine has it."""

import json
import os
from pathlib import Path

import pytest

from internlm2.eval.data.folder import DataFolder

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "eval"


@pytest.fixture(scope="session")
def sample() -> DataFolder:
    """A few rows of each benchmark; origin and licences: tests/data/eval/ORIGIN.md."""
    return DataFolder(SAMPLE)


@pytest.fixture(scope="session")
def shared() -> DataFolder:
    """All rows, where INTERNLM2_SHARED_DATA or ../shared/data holds them."""
    given = os.environ.get("INTERNLM2_SHARED_DATA")
    folder = (Path(given) if given else ROOT.parent / "shared" / "data") / "benchmarks"
    if not folder.is_dir():
        pytest.skip("needs the full benchmark data: set INTERNLM2_SHARED_DATA")
    return DataFolder(folder)


@pytest.fixture(scope="session")
def golden_prompts() -> dict[str, str]:
    return json.loads((SAMPLE / "golden" / "prompts.json").read_text(encoding="utf-8"))
