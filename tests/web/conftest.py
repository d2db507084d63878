"""A server and a browser for the tests of the page."""

import pytest
from page_browser import browsing, chatting
from page_stories import telling

from internlm2 import LLM


@pytest.fixture(scope="session")
def page_llm(official_folder):
    return LLM(official_folder, dtype="float32", memory_gib=0.02, max_num_seqs=8, max_model_len=4096)


@pytest.fixture(scope="module")
def told(page_llm):
    with telling(page_llm) as pair:
        yield pair


@pytest.fixture(scope="module")
def browser():
    with browsing() as found:
        yield found


@pytest.fixture
def book(told):
    """What the model says in this test: nothing so far."""
    _, book = told
    book.stories.clear()
    book.may_go_on.clear()
    return book


@pytest.fixture
def chat(browser, told, book):
    server, _ = told
    with chatting(browser, server.url) as found:
        yield found
