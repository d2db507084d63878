"""Random requests after the server's own description find no 5xx, and errors have OpenAI's shape."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
NUM_OPERATIONS = 14


def fire(server, num_examples: int) -> set[int]:
    """Requests that fit the description and requests that do not, to every path. Returns the statuses seen."""
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) == NUM_OPERATIONS
    seen: set[int] = set()
    for operation in operations:
        for mode in MODES:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=num_examples,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            def one(case) -> None:
                got = case.call(timeout=60)
                seen.add(got.status_code)
                assert got.status_code < 500, (got.status_code, case.as_curl_command())
                if got.status_code >= 400 and case.method != "HEAD":
                    error = json.loads(got.content)["error"]
                    assert error["message"]
                    assert set(error) == {"message", "type", "param", "code"}

            try:
                one()
            except (schemathesis.errors.SchemathesisError, Unsatisfiable):
                assert mode is GenerationMode.NEGATIVE  # a path without parameters has no wrong request
    return seen


def test_no_request_brings_a_fault(tiny):
    assert {200, 400, 404} <= fire(tiny, 4)


@pytest.mark.slow
def test_no_request_brings_a_fault_in_many_tries(tools):
    assert {200, 400, 404} <= fire(tools, 40)
