"""Servers that the tests of this folder share."""

import pytest
from serve_running import DEFAULTS, running

from internlm2 import LLM


@pytest.fixture(scope="session")
def tiny_llm(chat_folder):
    return LLM(chat_folder, dtype="float32", memory_gib=0.02, max_num_seqs=16, max_model_len=512)


@pytest.fixture(scope="session")
def tool_llm(official_folder):
    return LLM(official_folder, dtype="float32", memory_gib=0.02, max_num_seqs=16)


# Servers end with their module: other tests count the threads of the process.
@pytest.fixture(scope="module")
def tiny(tiny_llm):
    with running(tiny_llm, defaults=DEFAULTS) as server:
        yield server


@pytest.fixture(scope="module")
def tools(tool_llm):
    with running(tool_llm, defaults=DEFAULTS) as server:
        yield server
