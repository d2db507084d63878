"""Text in, text out: a model and its tokenizer together, for prompts, conversations, streams and scores.

BOS is added to text prompts, as the official tokenizer does; chats end at `</s>` and `<|im_end|>` always.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch

from internlm2.checkpoint.load import require_head
from internlm2.checkpoint.plan import PREFILL_CHUNK_TOKENS
from internlm2.engine.build import EngineOptions, load
from internlm2.engine.core import Stats
from internlm2.engine.frontend import Job, Pieces, Ticket
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.schedule.request import Task
from internlm2.engine.speculative import NUM_DRAFT_TOKENS
from internlm2.engine.text import Output, Score, join
from internlm2.errors import RequestError, check
from internlm2.model.heads import CausalLM, RopeMode

Message = Mapping[str, object]
Prompt = str | Sequence[int]


class LLM:
    """A language model that answers, one caller or many threads at a time.

    path: local folder, GGUF file, Hugging Face id, or "demo". dtype: "float32", "bfloat16", "float16" or "auto"
    (as the files).

    max_model_len: longest prompt plus answer, in tokens; None: the trained length (with dynamic scaling: what the
    memory allows); "auto": the longest that fits into 90 % of the free memory. memory_gib: for keys and values;
    None: 4 GiB, or one sequence of the longest length if that is more. kv_dtype: "int8" halves their memory.
    host_memory_gib: where idle keys and values of a GPU go instead of being forgotten.

    max_num_seqs: how many sequences run at once. chunk_tokens: how many prompt tokens one step computes.
    prefix_cache: keep the keys of past prompts for new ones that begin alike. deterministic: an answer is bitwise
    the same whatever else is served (slower; see docs/architecture.md). adapters: LoRA folders by name.

    speculative: guess up to num_draft_tokens tokens and check them in one step, with the same answer: "lookup" copies
    from the text so far, a path names a smaller model of the same vocabulary. Where two tokens are as good as equally
    likely, rounding may choose the other one; it depends on how many tokens a step computes.

    tensor_parallel: split the model over so many GPUs ("cuda") or processes of this machine ("cpu"); memory_gib is
    then that of each. quantization: weights in "int8", "int4" or "int4-symmetric", or "bfloat16" unchanged, packed for
    the C++ kernels of the CPU: several times faster for a few requests at once; docs/kernels.md says what is lost.
    "auto" packs bfloat16 where that is faster and no other option needs plain weights, and quantised files as they
    are; None or "none": plain tensors. On a GPU: "int8", "int4" or "fp8", docs/gpu.md. `weights` says
    how it turned out.

    >>> llm = LLM("demo")
    >>> llm.chat([{"role": "user", "content": "Hello"}]).text
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        rope_mode: RopeMode = "stateless",
        max_model_len: int | Literal["auto"] | None = None,
        kv_dtype: str | None = None,
        memory_gib: float | None = None,
        host_memory_gib: float = 0.0,
        max_num_seqs: int = 64,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        prefix_cache: bool = True,
        deterministic: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
        speculative: str | Path | None = None,
        num_draft_tokens: int = NUM_DRAFT_TOKENS,
        tensor_parallel: int = 1,
        quantization: str | None = "auto",
    ) -> None:
        options = EngineOptions(
            dtype=dtype,
            device=device,
            rope_mode=rope_mode,
            max_model_len=max_model_len,
            kv_dtype=kv_dtype,
            memory_gib=memory_gib,
            host_memory_gib=host_memory_gib,
            max_num_seqs=max_num_seqs,
            chunk_tokens=chunk_tokens,
            prefix_cache=prefix_cache,
            deterministic=deterministic,
            adapters=adapters,
            speculative=speculative,
            num_draft_tokens=num_draft_tokens,
            tensor_parallel=tensor_parallel,
            quantization=quantization,
        )
        loaded = load(path, options, head=CausalLM, use="generating text")
        self.model = require_head(loaded.model, CausalLM, use="generating text")
        self.weights = loaded.weights
        self.tokenizer = loaded.tokenizer
        self.max_model_len = loaded.max_model_len
        self.frontend = loaded.frontend
        self.adapters = loaded.adapters
        self._close = loaded.close

    def close(self) -> None:
        """End its thread, and the other processes of a split model; requests that are open raise RequestError.

        A model that nobody uses any more ends by itself; `with LLM(...) as llm:` ends it for certain.
        """
        self.frontend.close()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def stats(self) -> Stats:
        """Counters of the engine since it began."""
        return self.frontend.engine.stats

    # -- answers ------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Output]:
        """Complete prompts; results in prompt order. A str gets BOS; a list of ids is taken as it is.

        params: for all prompts, or one for each. Raises RequestError for empty prompts, ids outside the vocabulary
        and prompts that leave no room for an answer, before anything is computed.
        """
        return self.frontend.finish(self.begin_generate(prompts, params, adapter=adapter))

    def begin_generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        on_mail: Callable[[], None] | None = None,
    ) -> Job[list[Output]]:
        """As `generate`, without waiting: for callers that wait in their own way, as `AsyncLLM` does."""
        _check_list(prompts, "prompts")
        each = self._each(params, len(prompts))
        encoded = [self.encode(prompt) for prompt in prompts]
        tickets = self.frontend.submit(
            self.frontend.prepare(ids, own, adapter=adapter, on_mail=on_mail)
            for ids, own in zip(encoded, each, strict=True)
        )
        return Job(tickets, lambda: [_output(*row) for row in zip(encoded, tickets, each, strict=True)])

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Message] | None = None,
        adapter: str | None = None,
    ) -> Output:
        """Answer a conversation of {"role", "content"} messages. Raises ChatError for malformed ones."""
        ids = self.tokenizer.apply_chat(messages, tools=tools)
        return self.generate([ids], params, adapter=adapter)[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Message] | None = None,
        adapter: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Pieces:
        """As `chat`, piece by piece; never half a character, never the start of a stop string."""
        ids = self.tokenizer.apply_chat(messages, tools=tools)
        return self.stream(ids, params, adapter=adapter, on_progress=on_progress)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Pieces:
        """Complete one prompt, piece by piece; the last piece of an answer carries a finish_reason.

        on_progress: called while the prompt is read, with the tokens that are done and all of them. Leaving the loop
        early, or dropping the stream, aborts the request. Raises RequestError at once.
        """
        ticket = self.begin_stream(prompt, params, adapter=adapter)
        return Pieces(self.frontend, ticket, on_progress)

    def begin_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        on_mail: Callable[[], None] | None = None,
    ) -> Ticket:
        """As `stream`, without reading it."""
        [own] = self._each(params, 1)
        prepared = self.frontend.prepare(
            self.encode(prompt), own, adapter=adapter, on_mail=on_mail, is_stream=True
        )
        return self.frontend.submit([prepared])[0]

    # -- what is read off a text --------------------------------------------------------------------------

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], *, adapter: str | None = None
    ) -> list[Score]:
        """Log-likelihood of each continuation after its prompt, in one pass each.

        Two texts are encoded together, as they would stand in a document; where their border falls inside a token,
        that token counts to the continuation. Raises RequestError for an empty continuation.
        """
        return self.frontend.finish(self.begin_score(prompts, continuations, adapter=adapter))

    def begin_score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        *,
        adapter: str | None = None,
        on_mail: Callable[[], None] | None = None,
    ) -> Job[list[Score]]:
        """As `score`, without waiting. Pairs that differ in their last token only are one pass together."""
        _check_list(prompts, "prompts")
        _check_list(continuations, "continuations")
        if len(prompts) != len(continuations):
            raise RequestError(
                f"There are {len(prompts)} prompts and {len(continuations)} continuations. Give one for each."
            )
        pairs = [self._pair(*pair) for pair in zip(prompts, continuations, strict=True)]
        # What stands before the last ids, behind where it is scored from -> the last ids.
        passes: dict[tuple[int, ...], list[int]] = {}
        found: list[tuple[list[int], tuple[int, ...], int]] = []  # continuation, its pass, its place there
        for ids, start in pairs:
            key = (start, *ids[:-1])
            last_ids = passes.setdefault(key, [])
            found.append((ids[start:], key, len(last_ids)))
            last_ids.append(ids[-1])
        tickets = self.frontend.submit(
            self.frontend.prepare_task(
                before,
                Task.SCORE,
                logits_from=start - 1,
                top=1,
                alternatives=last_ids,
                adapter=adapter,
                on_mail=on_mail,
            )
            for (start, *before), last_ids in passes.items()
        )
        by_key = dict(zip(passes, tickets, strict=True))
        return Job(tickets, lambda: [_score(ids, by_key[key], place) for ids, key, place in found])

    def embed(self, texts: Sequence[Prompt], *, adapter: str | None = None) -> torch.Tensor:
        """The mean of the last hidden states over all tokens of each text: (texts, C) float32."""
        return self.frontend.finish(self.begin_embed(texts, adapter=adapter))

    def begin_embed(
        self,
        texts: Sequence[Prompt],
        *,
        adapter: str | None = None,
        on_mail: Callable[[], None] | None = None,
    ) -> Job[torch.Tensor]:
        """As `embed`, without waiting."""
        _check_list(texts, "texts")
        tickets = self.frontend.submit(
            self.frontend.prepare_task(self.encode(text), Task.EMBED, adapter=adapter, on_mail=on_mail)
            for text in texts
        )
        return Job(tickets, lambda: _stack(tickets, self.model.config.hidden_size))

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: text gets BOS, ids stay."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        try:
            if isinstance(prompt, bytes):
                raise TypeError
            return [index(token) for token in prompt]  # numbers of numpy or torch become plain ones
        except TypeError:
            raise RequestError(f"A prompt is {prompt!r}, but must be a text or a list of ids.") from None

    def _pair(self, prompt: Prompt, continuation: Prompt) -> tuple[list[int], int]:
        """All ids, and where the continuation begins."""
        if isinstance(prompt, str) and isinstance(continuation, str):
            alone, ids = self.encode(prompt), self.encode(prompt + continuation)
            agreed = [a == b for a, b in zip(alone, ids, strict=False)]
            start = agreed.index(False) if False in agreed else min(len(alone), len(ids))
        else:
            before = self.encode(prompt)
            after = (
                self.tokenizer.encode(continuation)
                if isinstance(continuation, str)
                else self.encode(continuation)
            )
            ids, start = [*before, *after], len(before)
        if start == len(ids) or start == 0:
            what = "continuation" if start else "prompt"
            raise RequestError(f"The {what} is empty. Scoring needs at least one token on each side.")
        return ids, start

    @staticmethod
    def _each(
        params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * count
        is_good = isinstance(params, Sequence) and all(isinstance(own, SamplingParams) for own in params)
        check(is_good, "params", params, "SamplingParams(...), or a list of them, one for each prompt")
        if len(params) != count:
            raise RequestError(
                f"There are {len(params)} params for {count} prompts. Give one, or one for each."
            )
        return params


def _check_list(values: object, name: str) -> None:
    if isinstance(values, (str, bytes)):
        raise RequestError(f"{name} is one text, but must be a list. Write [text].")
    if not isinstance(values, Sequence):
        raise RequestError(f"{name} is a {type(values).__name__}, but must be a list.")


def _stack(tickets: list[Ticket], width: int) -> torch.Tensor:
    vectors = [ticket.last_updates[0].vector for ticket in tickets]
    return torch.stack([v for v in vectors if v is not None]) if tickets else torch.empty(0, width)


def _output(ids: list[int], ticket: Ticket, params: SamplingParams) -> Output:
    by_sample = [[p for p in ticket.pieces if p.sample == sample] for sample in range(params.n)]
    samples = tuple(join(pieces, has_logprobs=params.logprobs is not None) for pieces in by_sample)
    prompt_logprobs = [u.prompt_logprobs for u in ticket.last_updates if u.prompt_logprobs is not None]
    first = samples[0]
    return Output(
        first.text,
        first.token_ids,
        ids,
        first.finish_reason,
        first.logprobs,
        list(prompt_logprobs[0]) if prompt_logprobs else None,
        samples,
        ticket.requests[0].num_cached,
    )


def _score(token_ids: list[int], ticket: Ticket, place: int) -> Score:
    """place: of the last token among the alternatives."""
    every = ticket.last_updates[0].prompt_logprobs
    assert every is not None
    before = len(token_ids) - 1
    found = [*every[:before], every[before + place]]
    each = [token.logprob for token in found]
    is_greedy = all(token.logprob >= token.top[0][1] for token in found)
    return Score(sum(each), token_ids, each, is_greedy)
