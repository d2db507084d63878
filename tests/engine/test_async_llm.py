"""Coroutines get what synchronous callers get; whoever leaves, leaves nothing behind."""

import asyncio
import gc
import threading
import time

import pytest
import torch

from internlm2 import LLM, AsyncLLM, SamplingParams
from internlm2.errors import ChatError, RequestError

MESSAGES = [{"role": "user", "content": "你好, world"}]
LONG = SamplingParams(max_tokens=150, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(chat_folder):
    return LLM(chat_folder, dtype="float32", memory_gib=0.01, max_num_seqs=16)


@pytest.fixture(autouse=True)
def _nothing_stays(llm):
    yield
    gc.collect()
    llm.frontend.settle()
    assert not llm.frontend.engine.has_work
    assert not llm.frontend._streams
    assert_free(llm)


def assert_free(llm: LLM) -> None:
    scheduler = llm.frontend.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.pool.num_held == 0


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def go(llm: LLM, function):
    """Run `function(AsyncLLM)` in a loop of its own; a deadlock fails instead of hanging."""

    async def main():
        async with AsyncLLM.of(llm) as twin:
            return await asyncio.wait_for(function(twin), timeout=60)

    return asyncio.run(main())


async def joined(stream) -> tuple[str, list[int]]:
    pieces = [piece async for piece in stream]
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason is not None
    return "".join(p.text for p in pieces), [t for p in pieces for t in p.token_ids]


def test_the_constructor_takes_what_llm_takes(chat_folder):
    async def main():
        async with AsyncLLM(chat_folder, dtype="float32", max_model_len=12) as twin:
            assert twin.llm.max_model_len == 12
            return await twin.chat(MESSAGES[:0] or [{"role": "user", "content": "a"}])

    with pytest.raises(RequestError, match="but this model takes 12"):
        asyncio.run(main())
    with pytest.raises(TypeError, match="unexpected keyword argument 'bogus'"):
        AsyncLLM(chat_folder, bogus=1)


def test_many_at_once_equal_the_synchronous_answers(llm):
    prompts = [[1, *range(60 + i, 64 + 3 * i)] for i in range(24)]
    each = [
        SamplingParams(max_tokens=5 + i, ignore_eos=True, temperature=float(i % 2), seed=i, n=1 + i % 2)
        for i in range(24)
    ]
    expected = [llm.generate([p], own)[0] for p, own in zip(prompts, each, strict=True)]

    async def ask(twin):
        alone = [twin.generate([p], own) for p, own in zip(prompts, each, strict=True)]
        streams = [joined(twin.stream(p, own)) for p, own in zip(prompts[::2], each[::2], strict=True)]
        together, *others = await asyncio.gather(twin.generate(prompts, each), *alone, *streams)
        return together, others

    together, others = go(llm, ask)
    assert [out.samples for out in together] == [out.samples for out in expected]
    assert [out.samples for (out,) in others[:24]] == [out.samples for out in expected]
    assert others[24:] == [(out.text, out.token_ids) for out in expected[::2]]


def test_chats_scores_and_embeddings_are_the_same(llm):
    params = SamplingParams(max_tokens=8)
    texts = ["Hello", "world, hello"]

    async def ask(twin):
        return await asyncio.gather(
            twin.chat(MESSAGES, params), joined(twin.stream_chat(MESSAGES, params)),
            twin.score(texts, [" a", " b"]), twin.embed(texts),
        )  # fmt: skip

    chat, (text, ids), scores, vectors = go(llm, ask)
    expected = llm.chat(MESSAGES, params)
    assert (chat.token_ids, text, ids) == (expected.token_ids, expected.text, expected.token_ids)
    for score, own in zip(scores, llm.score(texts, [" a", " b"]), strict=True):
        assert score.token_ids == own.token_ids
        assert score.token_logprobs == pytest.approx(own.token_logprobs, abs=1e-5)
    torch.testing.assert_close(vectors, llm.embed(texts), atol=1e-5, rtol=1e-5)


def test_a_cancelled_task_frees_its_pages(llm):
    async def ask(twin):
        tasks = [asyncio.create_task(twin.generate([[1, 70 + i]], LONG)) for i in range(4)]
        tasks += [asyncio.create_task(joined(twin.stream([1, 90 + i], LONG))) for i in range(4)]
        kept = asyncio.create_task(twin.generate([[1, 80]], LONG))
        steps = llm.stats.num_steps
        while llm.stats.num_steps < steps + 5:
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {asyncio.CancelledError}
        return await kept

    assert go(llm, ask)[0].token_ids == llm.generate([[1, 80]], LONG)[0].token_ids


@pytest.mark.parametrize("way", ["break", "aclose", "never started"])
def test_leaving_a_stream_lets_the_request_go_at_once(llm, way):
    async def ask(twin):
        if way == "break":
            async for _ in twin.stream("Hello", LONG):
                break
        elif way == "aclose":
            stream = twin.stream("Hello", LONG)
            await anext(stream)
            await stream.aclose()
            assert [piece async for piece in stream] == []
        else:
            twin.stream("Hello", LONG)
        produced = llm.stats.num_output_tokens
        await asyncio.to_thread(wait_for, lambda: not llm.frontend.engine.has_work)
        assert llm.stats.num_output_tokens - produced < 100
        assert_free(llm)

    go(llm, ask)


def test_bad_input_raises_at_once_and_computes_nothing(llm):
    async def ask(twin):
        steps = llm.stats.num_steps
        with pytest.raises(RequestError, match="The prompt is empty"):
            twin.stream([])
        with pytest.raises(ChatError):
            twin.stream_chat([{"role": "nobody", "content": "x"}])
        with pytest.raises(RequestError, match="prompts is one text"):
            await twin.generate("Hello")
        with pytest.raises(RequestError, match="token id 9999"):
            await twin.generate([[1, 70], [9999]])
        with pytest.raises(RequestError, match="The continuation is empty"):
            await twin.score(["a"], [""])
        assert not llm.frontend._streams
        assert llm.stats.num_steps == steps

    go(llm, ask)


def test_a_failing_step_reaches_every_open_request_and_the_next_one_works(llm, monkeypatch):
    def fail(batch):
        raise OSError("out of memory")

    async def ask(twin):
        good = await twin.generate([[1, 70]], SamplingParams(max_tokens=4))
        with monkeypatch.context() as patch:
            patch.setattr(llm.frontend.engine.runner, "forward", fail)
            tasks = [twin.generate([[1, 70 + i]], LONG) for i in range(3)]
            tasks += [joined(twin.stream([1, 80 + i], LONG)) for i in range(3)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [str(result) for result in results] == ["out of memory"] * 6
            await asyncio.to_thread(wait_for, lambda: not llm.frontend.engine.has_work)
        assert await twin.generate([[1, 70]], SamplingParams(max_tokens=4)) == [
            llm.generate([[1, 70]], SamplingParams(max_tokens=4))[0]
        ]
        return good

    assert len(go(llm, ask)) == 1


def test_close_tells_whoever_waits(llm):
    async def main():
        twin = AsyncLLM.of(llm)
        task = asyncio.create_task(joined(twin.stream("Hello", LONG)))
        await asyncio.sleep(0)
        await twin.close()
        with pytest.raises(RequestError, match="AsyncLLM was closed before the answer was complete"):
            await task
        await twin.close()
        with pytest.raises(RequestError, match="This AsyncLLM is closed"):
            twin.stream("Hello")
        with pytest.raises(RequestError, match="This AsyncLLM is closed"):
            await twin.generate(["Hello"])

    asyncio.run(main())
    assert llm.generate([[1, 70]], SamplingParams(max_tokens=2))  # of `of`: lives on


def test_a_model_of_its_own_is_closed_with_it(chat_folder):
    async def main():
        async with AsyncLLM(chat_folder, dtype="float32") as twin:
            await twin.generate([[1, 70]], SamplingParams(max_tokens=2))
            return twin.llm

    own = asyncio.run(main())
    with pytest.raises(RequestError, match="This model was closed"):
        own.generate([[1, 70]])


def test_outside_a_loop_it_says_what_to_do(llm):
    with pytest.raises(RequestError, match="Call it inside `async def`, or use LLM elsewhere"):
        AsyncLLM.of(llm).stream("Hello")


def test_an_idle_thread_takes_no_steps_and_no_time(llm):
    async def ask(twin):
        await twin.generate([[1, 70]], SamplingParams(max_tokens=2))
        await asyncio.sleep(0.05)
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.25

    go(llm, ask)


def test_synchronous_threads_and_several_event_loops_share_one_model(llm):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    prompts = [[1, 60 + i, 61, 62] for i in range(6)]
    expected = [out.token_ids for out in llm.generate(prompts, params)]
    found: dict[object, list[list[int]]] = {}
    twin = AsyncLLM.of(llm)

    def sync(name: int) -> None:
        for _ in range(3):
            found["sync", name] = [out.token_ids for out in llm.generate(prompts, params)]
            found["stream", name] = [
                [t for piece in llm.stream(p, params) for t in piece.token_ids] for p in prompts
            ]

    def loop(name: int) -> None:
        async def ask():
            for _ in range(3):
                answers = await asyncio.gather(*(joined(twin.stream(p, params)) for p in prompts))
                found["async", name] = [ids for _, ids in answers]
                found["whole", name] = [out.token_ids for out in await twin.generate(prompts, params)]

        asyncio.run(ask())

    threads = [threading.Thread(target=f, args=(i,), daemon=True) for f in (sync, loop) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "deadlock"
    asyncio.run(twin.close())
    assert len(found) == 8
    assert all(answers == expected for answers in found.values())


def test_a_loop_that_is_gone_does_not_stop_the_others(llm):
    twin = AsyncLLM.of(llm)
    left: list[object] = []

    async def leave():
        left.append(twin.stream("Hello", LONG))  # neither read nor closed when the loop ends

    asyncio.run(leave())

    async def ask():
        return await twin.generate([[1, 70]], LONG)

    assert asyncio.run(ask())[0].token_ids == llm.generate([[1, 70]], LONG)[0].token_ids
    left.clear()
    asyncio.run(twin.close())
