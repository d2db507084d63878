"""`await agent.run_async(...)`: the same loop, while the program's own event loop goes on."""

import asyncio
import threading
import time

import pytest
from agent_scripts import Notes, call, calls, double

from internlm2.agent import Agent, Limits, ScriptedModel, tool
from internlm2.agent.model import ModelError

ENDINGS = [
    [calls(call("double", x=21)), "It is 42."],
    [calls(call("double", x=1)), calls(call("double", x=2)), calls(call("double", x=3))],
    [calls(call("double", x="no")), calls(call("double", x="no")), calls(call("double", x="no")), calls(call("double", x="no"))],
]  # fmt: skip


def facts(outcome):
    return (
        outcome.ending,
        outcome.answer,
        outcome.turns,
        outcome.calls,
        outcome.prompt_tokens,
        outcome.output_tokens,
    )


@pytest.mark.parametrize("script", ENDINGS)
def test_it_does_what_the_plain_run_does(script):
    def agent():
        return Agent(ScriptedModel(script), [double], limits=Limits(turns=3))

    plain, heard = Notes(), Notes()
    expected = agent().run("What?", listeners=[plain])
    found = asyncio.run(agent().run_async("What?", listeners=[heard]))
    assert facts(found) == facts(expected)
    told = [[{**event, "seconds": 0, "duration": 0} for event in events] for events in (heard, plain)]
    assert [event["event"] for event in told[0]] == [event["event"] for event in told[1]]


def test_the_event_loop_goes_on_and_many_agents_run_at_once():
    together = threading.Barrier(5, timeout=20)

    @tool
    def meet() -> str:
        """Waits for the others."""
        together.wait()
        return "met"

    async def main():
        model = [calls(call("meet")), "Done."]
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticking = asyncio.create_task(tick())
        found = await asyncio.gather(*(Agent(ScriptedModel(model), [meet]).run_async("Go") for _ in range(5)))
        ticking.cancel()
        return found, ticks

    outcomes, ticks = asyncio.run(main())
    assert [(each.answer, each.calls[0].text) for each in outcomes] == [("Done.", "met")] * 5
    assert ticks > 0


@pytest.mark.parametrize("where", ["model", "tool"])
def test_a_cancelled_task_ends_the_run_and_the_conversation_is_as_before(where):
    begun = threading.Event()

    @tool
    async def wait() -> str:
        """For ever."""
        begun.set()
        await asyncio.sleep(3600)
        return ""

    def says(ask):
        if ask.messages[-1]["content"] == "Again?":
            return "Here."
        if where == "tool":
            return calls(call("wait"))
        begun.set()
        while not ask.is_over:
            time.sleep(0.005)
        return "late"

    async def main():
        notes = Notes()
        with Agent(ScriptedModel(says), [wait]).session(listeners=[notes]) as session:
            before = list(session.messages)
            task = asyncio.create_task(session.ask_async("Now"))
            await asyncio.to_thread(begun.wait, 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert session.messages == before
            assert notes.of("end")[-1]["ending"] == "cancelled"
            return await session.ask_async("Again?")

    assert asyncio.run(main()).answer == "Here."


def test_a_task_cancelled_before_its_thread_begins_asks_nothing_for_long():
    asked = []

    def says(ask):
        asked.append(ask)
        while not ask.is_over:
            time.sleep(0.005)
        return "late"

    async def main():
        with Agent(ScriptedModel(says)).session() as session:
            task = asyncio.create_task(session.ask_async("Now"))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(task), 20)

    asyncio.run(main())
    assert len(asked) <= 1


def test_what_goes_wrong_is_raised_where_it_is_awaited():
    with pytest.raises(ModelError, match="script has 0 replies"):
        asyncio.run(Agent(ScriptedModel([])).run_async("What?"))
