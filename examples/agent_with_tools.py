"""A model with a tool of your own, the calculator, and a transcript.

    python examples/agent_with_tools.py demo "How many days are 3 weeks?"

The demo model is small and seldom calls a tool rightly; an InternLM2 chat model does.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Literal

import internlm2
from internlm2.agent import Agent, EngineModel, Limits, Renderer, TranscriptWriter, calculator, tool


@tool
def convert_time(
    amount: Annotated[float, "how much"],
    unit: Annotated[Literal["minutes", "hours", "days", "weeks"], "the unit of amount"],
    into: Annotated[Literal["minutes", "hours", "days", "weeks"], "the unit wanted"],
) -> float:
    """Convert a length of time from one unit into another."""
    minutes = {"minutes": 1, "hours": 60, "days": 1440, "weeks": 10080}
    return amount * minutes[unit] / minutes[into]


def main(model: str = "demo", question: str = "How many days are 3 weeks?") -> None:
    llm = internlm2.LLM(model)
    thinker = EngineModel(llm, internlm2.SamplingParams(max_tokens=200), name=model)
    agent = Agent(thinker, [convert_time, calculator()], limits=Limits(turns=4))
    path = Path(mkdtemp()) / "transcript.jsonl"
    with TranscriptWriter(path) as writer:
        outcome = agent.run(question, listeners=[writer, Renderer()])
    print(outcome.answer or outcome.reason)
    print(f"Transcript: {path}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
