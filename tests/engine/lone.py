"""An engine around a bare model, for tests that speak in token ids."""

import torch

from internlm2 import SamplingParams
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.engine.core import Engine
from internlm2.engine.sampling.sampler import SamplingState
from internlm2.engine.schedule.pages import PagePool
from internlm2.engine.schedule.request import Sequence, Task
from internlm2.engine.schedule.scheduler import Scheduler


def make_engine(
    model, *, num_pages=400, page_size=4, num_host_pages=0, max_num_seqs=8, chunk_tokens=16, kv_dtype=None,
    deterministic=False, prefix_cache=True,
):  # fmt: skip
    """Small pages and chunks, so that every border is met."""
    weight = model.model.tok_embeddings.weight
    pool = PagePool(
        num_pages, page_size=page_size, num_host_pages=num_host_pages,
        shares_prefixes=prefix_cache and not deterministic,
    )  # fmt: skip
    cache = PageCache(
        model.config, num_pages=num_pages, page_size=page_size, dtype=weight.dtype, device=torch.device("cpu"),
        kv_dtype=kv_dtype, num_host_pages=num_host_pages,
    )  # fmt: skip
    for block in (cache.keys, cache.values):  # what was never written must never be read
        block.fill_(100 if kv_dtype else torch.nan)
    scheduler = Scheduler(
        pool, max_num_seqs=max_num_seqs, chunk_tokens=chunk_tokens, fixed_chunks=deterministic
    )
    return Engine(Runner(model, cache, is_deterministic=deterministic), scheduler)


def make_sequence(number, prompt, params, *, namespace=None):
    """A sequence and its sampling state, as the admission makes them."""
    sequence = Sequence(
        sequence_id=number, tokens=list(prompt), max_total_tokens=len(prompt) + params.max_tokens,
        priority=params.priority, length_limit=params.length_limit, namespace=namespace,
    )  # fmt: skip
    if params.prompt_logprobs is not None:
        sequence.logits_from = 0
    state = SamplingState(
        params, prompt, vocab_size=512, stop_ids=frozenset(params.stop_token_ids), seed=params.seed or 0
    )
    return sequence, state


def updates(engine, prompts, params, *, namespaces=None, each_step=lambda: None):
    """All updates of each prompt, all served together; integrity is checked after every step."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    found = {number: [] for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        namespace = None if namespaces is None else namespaces[number]
        sequence, state = make_sequence(number, prompt, each[number], namespace=namespace)
        engine.add(sequence, state, top=each[number].prompt_logprobs)
    while engine.has_work:
        for update in engine.step():
            assert update.error is None
            found[update.sequence.sequence_id].append(update)
        engine.scheduler.check_integrity()
        each_step()
    assert engine.scheduler.pool.num_held == 0
    return [found[number] for number in range(len(prompts))]


def answers(engine, prompts, params, *, namespaces=None, each_step=lambda: None):
    """The new tokens of each prompt, all served together."""
    every = updates(engine, prompts, params, namespaces=namespaces, each_step=each_step)
    return [[token for update in own for token in update.token_ids] for own in every]


def read_off(engine, prompt, task, *, logits_from=0, top=None):
    """What a prompt-only task finds."""
    sequence = Sequence(sequence_id=10_000, tokens=list(prompt), max_total_tokens=len(prompt), task=task)
    sequence.logits_from = logits_from
    engine.add(sequence, top=top)
    while engine.has_work:
        updates = engine.step()
    assert task is not Task.GENERATE
    return updates[-1]
