"""The instruction levels that this machine can run; the highest is back after each test."""

from collections.abc import Iterator

import pytest

from internlm2.kernels.library import LEVELS, Library, library


@pytest.fixture
def built() -> Library:
    """The library; without it these tests would compare the twin with itself."""
    found = library()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, built: Library) -> Iterator[str]:
    """Each instruction level in turn."""
    before = built.level()
    wanted = LEVELS.index(request.param)
    if wanted > built.detected_level():
        pytest.skip(f"this processor has no {request.param}")
    assert built.set_level(wanted) == wanted
    yield request.param
    built.set_level(before)
