"""Folders that several files spoil in their own ways."""

import shutil
from pathlib import Path

import pytest
from quantized_folders import write


@pytest.fixture(scope="module")
def int4(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("quantized") / "int4")


@pytest.fixture
def copy(int4, tmp_path) -> Path:
    return Path(shutil.copytree(int4, tmp_path / "copy"))
