"""The Triton kernels in Triton's interpreter, in a process that asks for it before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # Triton is 200 MB and no dependency on a CPU: `pip install triton`
def test_every_kernel_equals_its_twin():
    pytest.importorskip("triton", reason="the `gpu` extra brings it")
    cases = Path(__file__).with_name("triton_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
