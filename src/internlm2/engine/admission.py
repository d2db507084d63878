"""What may enter the engine: a prompt and its parameters, checked and turned into sequences."""

import itertools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from internlm2.engine.compute.lora import check_known
from internlm2.engine.sampling.grammar import Constraint, Grammars
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.penalties import check_ids
from internlm2.engine.sampling.sampler import SamplingState
from internlm2.engine.schedule.request import Sequence as Request
from internlm2.engine.schedule.request import Task
from internlm2.errors import RequestError
from internlm2.model.config import ModelConfig
from internlm2.model.heads import RopeMode
from internlm2.tokenizer import Tokenizer


class Admission:
    """The limits of one loaded model.

    max_model_len: longest prompt plus answer, in tokens. adapters: names that requests may use now.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        rope_mode: RopeMode = "stateless",
        adapters: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self.max_model_len = max_model_len
        self._config = config
        self._tokenizer = tokenizer
        self._rope_mode = rope_mode
        self._adapters = adapters
        # The tokenizer's ids, unless the embedding has fewer rows.
        self._vocab_size = min(tokenizer.vocab_size, config.vocab_size)
        self._grammars = Grammars(tokenizer, stop_ids=tokenizer.stop_ids, vocab_size=self._vocab_size)
        self._ids = itertools.count()

    def generation(
        self, prompt: Sequence[int], params: SamplingParams, *, adapter: str | None = None
    ) -> list[tuple[Request, SamplingState]]:
        """A sequence for each of the `n` answers. Raises RequestError for what cannot be answered."""
        ids = list(prompt)
        params = self._fit(params, ids)
        stop_ids = self._stop_ids(params)
        bad_words = self._bad_words(params)
        first_seed = secrets.randbits(62) if params.seed is None else params.seed
        admitted: list[tuple[Request, SamplingState]] = []
        for sample in range(params.n):
            request = self._request(ids, len(ids) + params.max_tokens, Task.GENERATE, params, adapter)
            if params.prompt_logprobs is not None and sample == 0:
                request.logits_from = 0
            state = SamplingState(
                params,
                ids,
                vocab_size=self._vocab_size,
                stop_ids=stop_ids,
                bad_words_ids=bad_words,
                constraint=self._constraint(params),
                seed=(first_seed + sample) % (1 << 63),
            )
            admitted.append((request, state))
        return admitted

    def reading(
        self,
        prompt: Sequence[int],
        task: Task,
        alternatives: Sequence[int] = (),
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> Request:
        """A sequence from which something is read off. Raises RequestError for what does not fit.

        alternatives: single ids behind the prompt whose likelihood is wanted; one of them counts as its length.
        """
        ids = list(prompt)
        self._check_prompt([*ids, *alternatives[:1]], room_for=0)
        self._check_ids(alternatives[1:])
        total = len(ids) + bool(alternatives)
        request = self._request(ids, total, task, SamplingParams(priority=priority), adapter)
        request.alternatives = tuple(alternatives)
        return request

    def _request(
        self, ids: list[int], max_total: int, task: Task, params: SamplingParams, adapter: str | None
    ) -> Request:
        if adapter is not None:
            check_known(adapter, self._adapters())
        limit = params.length_limit or max_total
        scaling = self._config.rope_scaling
        is_stretched = (
            scaling is not None and scaling.kind == "dynamic" and limit > self._config.max_position_embeddings
        )
        sequence_id = next(self._ids)
        # Keys can be shared where the rotary base is the same. In reference mode it changes within a sequence.
        base: object = limit if is_stretched else None
        if is_stretched and self._rope_mode == "reference":
            base = ("alone", sequence_id)
        return Request(
            sequence_id=sequence_id,
            tokens=list(ids),
            max_total_tokens=max_total,
            task=task,
            priority=params.priority,
            length_limit=params.length_limit,
            adapter=adapter,
            namespace=(adapter, base),
        )

    def _fit(self, params: SamplingParams, ids: list[int]) -> SamplingParams:
        self._check_prompt(ids, room_for=1)
        fewer = min(params.max_tokens, self.max_model_len - len(ids))
        if params.length_limit is not None and params.length_limit < len(ids) + 1:
            raise RequestError(
                f"length_limit is {params.length_limit}, but the prompt alone has {len(ids)} tokens. Give at least "
                "the tokens of prompt and answer together."
            )
        fewer = min(fewer, (params.length_limit or self.max_model_len) - len(ids))
        return replace(params, max_tokens=fewer, min_tokens=min(params.min_tokens, fewer))

    def _check_prompt(self, ids: list[int], *, room_for: int) -> None:
        if not ids:
            raise RequestError("The prompt is empty. Give at least one token, such as BOS.")
        self._check_ids(ids)
        if len(ids) + room_for > self.max_model_len:
            raise RequestError(
                f"The prompt has {len(ids)} tokens, but this model takes {self.max_model_len} with the answer. "
                "Shorten the prompt, or load the model with a larger max_model_len or more memory_gib if it can."
            )

    def _check_ids(self, ids: Sequence[int]) -> None:
        rows = self._config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < rows:
            bad = next(i for i in ids if not 0 <= i < rows)
            raise RequestError(
                f"The prompt has token id {bad}, but ids go from 0 to {rows - 1}. The ids belong to another tokenizer."
            )

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        check_ids("stop_token_ids", params.stop_token_ids, vocab_size=self._vocab_size)
        goes_on = params.ignore_eos and not params.has_form
        own = frozenset() if goes_on else self._tokenizer.stop_ids
        return own | frozenset(params.stop_token_ids)

    def _bad_words(self, params: SamplingParams) -> list[tuple[int, ...]]:
        """Ids of each unwanted text, as it is written at the start of a word and inside a line."""
        words: dict[tuple[int, ...], None] = {}
        for text in params.bad_words:
            for spelling in (text, " " + text):
                words[tuple(self._tokenizer.encode(spelling))] = None
        return list(words)

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if not params.has_form:
            return None
        return self._grammars.compile(
            json_schema=params.json_schema, regex=params.regex, choice=params.choice
        )
