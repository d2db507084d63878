"""How far an agent may go."""

import math
from dataclasses import dataclass, fields

from internlm2.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one question. Raises RequestError for a value that is not positive.

    turns: answers of the model. seconds: wall time. tokens: of all prompts and answers together; None: any.
    tool_seconds: of one call. result_chars: of one result; longer ones lose their middle. pictures: of one result,
    each of at most picture_bytes. parallel_calls: run at the same time. calls_per_turn: of one answer; more are
    refused. same_failures: how often a call may fail with the same arguments before it is refused; as many refusals
    end the run.
    """

    turns: int = 12
    seconds: float = 600.0
    tokens: int | None = None
    tool_seconds: float = 60.0
    result_chars: int = 16_000
    pictures: int = 8
    picture_bytes: int = 4 << 20
    parallel_calls: int = 8
    calls_per_turn: int = 16
    same_failures: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise RequestError(f"{field.name} is {value}, but must be a number above 0.")
