"""Running code that a model wrote: one program with its tests, or an interpreter session.

Standard library only, no torch. What protects the machine, and what does not, is in `docs/sandbox.md`.
"""

from internlm2.sandbox.interpreter import SESSION_LIMITS, Execution, Interpreter
from internlm2.sandbox.isolation import Isolation, examine_isolation
from internlm2.sandbox.limits import Limits, SandboxError
from internlm2.sandbox.program import Outcome, Status, run_program

__all__ = [
    "SESSION_LIMITS",
    "Execution",
    "Interpreter",
    "Isolation",
    "Limits",
    "Outcome",
    "SandboxError",
    "Status",
    "examine_isolation",
    "run_program",
]
