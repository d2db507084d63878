"""Our engine as the model `internlm2` of lm-evaluation-harness 0.4 (package `lm_eval`, extra `lm-eval`).

Importing this file makes the model known to `lm_eval`; `main` is its command line with the model known. Tokens,
windows and cuts are those of the harness's own `hf` model, so that scores can be compared; docs/lm-eval.md says what
differs. The engine batches by itself, and requests that begin alike share what they have in common.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeVar

import torch

from internlm2.checkpoint.memory import count_parameters
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import resolve_model
from internlm2.checkpoint.source import expected_shapes
from internlm2.config import from_dict
from internlm2.engine.frontend import Job
from internlm2.engine.llm import LLM
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.text import Output, Score
from internlm2.errors import MissingDependencyError, RequestError
from internlm2.eval.backends.engine import WINDOW, WINDOW_TOKENS, fingerprint
from internlm2.log import logger
from internlm2.tokenizer import export

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise MissingDependencyError(
        f"lm-evaluation-harness is not installed ({error}). Run: pip install 'internlm2[lm-eval]'"
    ) from error

T = TypeVar("T")

_ADAPTER = "adapter"
_TOGETHER = 60  # continuations of one text at most: whole questions of 2, 3, 4, 5 or 6 choices
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "min_tokens", "ignore_eos",
)  # fmt: skip
_WITHOUT_EFFECT = {"do_sample": None, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""What tasks give besides: read elsewhere, or allowed with the one value that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What `--model_args` takes besides `pretrained`; engine options mean what they mean to `LLM`.

    dtype: "auto" is that of the files. max_length: longest text in tokens; None: the model's. max_gen_toks: longest
    answer where the task names none. add_bos_token: None does what the tokenizer's files say. prefix_token_id: what
    stands before a text without context; None: the start id, or the end id of vocabularies without one.
    """

    dtype: str = "auto"
    max_length: int | None = None
    max_gen_toks: int = 256
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    quantization: str | None = "auto"
    kv_dtype: str | None = None
    memory_gib: float | None = None
    max_num_seqs: int = 64
    adapter: str | None = None
    speculative: str | None = None
    tensor_parallel: int = 1
    deterministic: bool = False


@register_model("internlm2")
class InternLM2(TemplateLM):
    """An `LLM` behind the harness's interface.

    pretrained: folder, GGUF file, Hugging Face id or "demo". device: "cuda..." falls back to the CPU where there is no
    such device, as `hf` does, because the command line of the harness always names one. batch_size and
    max_batch_size: accepted and not needed. options: see `ModelArguments`; unknown ones raise ConfigError.

    >>> lm_eval.simple_evaluate(InternLM2("demo", dtype="float32"), tasks=["gsm8k"])
    """

    def __init__(
        self,
        pretrained: str | LLM,
        *,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        if options.pop("trust_remote_code", False):
            raise RequestError(
                "trust_remote_code has no meaning here: no code of a model folder is ever run. Leave it out."
            )
        self.arguments = from_dict(ModelArguments, options, where="model_args")
        self.name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        self._path = resolve_model(pretrained) if isinstance(pretrained, str) else None
        self.llm = pretrained if isinstance(pretrained, LLM) else _load(self._path, device, self.arguments)
        self._adapter = None if self.arguments.adapter is None else _ADAPTER
        self._device = next(self.llm.model.parameters()).device

    # -- what the harness asks about tokens ---------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        eos = self.llm.tokenizer.eos_id
        if eos is None:
            raise RequestError(
                "This vocabulary has no end token, which stands before texts without context. "
                "Give prefix_token_id=ID in --model_args."
            )
        return eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        if self.arguments.prefix_token_id is not None:
            return self.arguments.prefix_token_id
        bos = self.llm.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The longest text that the model reads, in tokens. Scoring adds one behind it where the engine has room."""
        return min(self.arguments.max_length or self.llm.max_model_len, self.llm.max_model_len)

    @property
    def _max_scored(self) -> int:
        return min(self.max_length + 1, self.llm.max_model_len)

    @property
    def max_gen_toks(self) -> int:
        """The longest answer where the task names none."""
        return self.arguments.max_gen_toks

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: object) -> list[int]:
        """Ids of a text. Control tokens that it spells are control tokens: that is how chat templates arrive."""
        tokenizer = self.llm.tokenizer
        if add_special_tokens is None:
            own = self.arguments.add_bos_token
            has_start = string.startswith(tokenizer.id_to_token(self.prefix_token_id))
            add_special_tokens = (own is None or own) and not has_start
        return tokenizer.encode(string, bos=add_special_tokens, allow_special=True)

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its cache of prompts by: they depend on the template alone."""
        return f"{self.name.replace('/', '__')}-internlm2"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in Jinja, for the record. Raises RequestError when one is asked for by name."""
        if isinstance(chat_template, str):
            raise RequestError(
                f"--apply_chat_template names {chat_template!r}, but there is one template only. Leave the name out."
            )
        return export.chat_template(self.llm.tokenizer) if chat_template else None

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, object]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text. Without add_generation_prompt its last message stays open."""
        return self.llm.tokenizer.render_chat(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final=not add_generation_prompt,
        )

    # -- the three kinds of requests ----------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **ignored: object,
    ) -> list[tuple[float, bool]]:
        num_cut = sum(len(before) + len(after) > self._max_scored for _, before, after in requests)
        _warn(num_cut, len(requests), f"texts are longer than max_length={self.max_length}")
        # Neighbours that continue one text, such as the letters of a question, are asked together, but not too many.
        together = groupby(enumerate(requests), key=lambda pair: (pair[0] // _TOGETHER, pair[1][1]))
        jobs = (
            self._begin_score(before, [after for _, (_, _, after) in own]) for (_, before), own in together
        )
        answers: list[tuple[float, bool]] = []
        scores = tqdm(
            chain.from_iterable(self._in_order(jobs)),
            "Running loglikelihood requests", len(requests), disable=disable_tqdm,
        )  # fmt: skip
        for (texts, _, _), found in zip(requests, scores, strict=True):
            answers.append((found.logprob, found.is_greedy))
            if texts is not None:  # a window of a long text has no key of its own
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of max_length tokens that hold as much context as fits."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = [(None, *window) for own in windows for window in own]
        values = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        totals: list[float] = []
        for request, own in zip(requests, windows, strict=True):
            totals.append(sum(next(values)[0] for _ in own))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._max_scored - 1,
            context_len=1,
        )
        return map(make_disjoint_window, pairs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each ended before any of its stop texts."""
        arguments: list[tuple[str, dict[str, object]]] = [request.arguments for request in requests]
        asked = [(context, given, self._params(given)) for context, given in arguments]
        encoded = [self.tok_encode(context) for context, _, _ in asked]
        rooms = [self._room(params) for _, _, params in asked]
        num_cut = sum(len(ids) > room for ids, room in zip(encoded, rooms, strict=True))
        _warn(num_cut, len(asked), f"prompts leave no room for their answer in max_length={self.max_length}")
        jobs = (
            self.llm.begin_generate([ids[-room:]], params, adapter=self._adapter)
            for ids, room, (_, _, params) in zip(encoded, rooms, asked, strict=True)
        )
        outputs: Iterator[list[Output]] = self._in_order(jobs)
        answers: list[str] = []
        bar = tqdm(outputs, "Running generate_until requests", len(asked), disable=disable_tqdm)
        for (context, given, _), found in zip(asked, bar, strict=True):
            answers.append(found[0].text)
            self.cache_hook.add_partial("generate_until", (context, given), answers[-1])
        return answers

    def get_model_info(self) -> dict[str, object]:
        """What the harness writes into its results about the model."""
        model = self.llm.model
        return {
            "model_num_parameters": count_parameters(expected_shapes(model.config)).total,
            "model_dtype": str(next(model.parameters()).dtype),
            "model_revision": "",
            "model_sha": "" if self._path is None else fingerprint(self._path),
        }

    # -- the engine ---------------------------------------------------------------------------------------

    def _begin_score(self, before: list[int], continuations: list[list[int]]) -> Job[list[Score]]:
        limit, longest = self._max_scored, max(map(len, continuations))
        if longest >= limit:
            raise RequestError(
                f"A continuation has {longest} tokens, but with one before it only {limit} fit. "
                "Give a larger max_length in --model_args, or leave this task out."
            )
        texts = [before[-(limit - len(after)) :] for after in continuations]
        return self.llm.begin_score(texts, continuations, adapter=self._adapter)

    def _params(self, given: Mapping[str, object]) -> SamplingParams:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        eos = self.llm.tokenizer.id_to_token(self.eot_token_id)
        stop = [text for text in handle_stop_sequences(kwargs.pop("until"), eos=eos) if text]
        max_tokens = kwargs.pop("max_gen_toks")
        for name, allowed in _WITHOUT_EFFECT.items():
            value = kwargs.pop(name, allowed)
            if allowed is not None and value != allowed:
                raise RequestError(f"The task gives {name}={value!r}, but this model takes {allowed!r} only.")
        unknown = [name for name in kwargs if name not in _SAMPLING]
        if unknown:
            raise RequestError(
                f"The task gives {unknown[0]}={kwargs[unknown[0]]!r} for its answers, which this model does not know. "
                f"Known: until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}. Change it with --gen_kwargs."
            )
        if kwargs.get("temperature", 0.0) == 0.0:  # filters do nothing to a greedy choice
            kwargs = {name: value for name, value in kwargs.items() if name not in ("top_k", "top_p")}
        return SamplingParams(max_tokens=max_tokens, stop=tuple(stop), **kwargs)

    def _room(self, params: SamplingParams) -> int:
        room = self.max_length - params.max_tokens
        if room < 1:
            raise RequestError(
                f"The task wants {params.max_tokens} tokens of answer, but prompt and answer together may have "
                f"{self.max_length}. Give --gen_kwargs max_gen_toks=N, or a larger max_length in --model_args."
            )
        return room

    def _in_order(self, jobs: Iterable[Job[T]]) -> Iterator[T]:
        """Results in order, with a window of jobs in the engine; none is left there, however this ends."""
        frontend = self.llm.frontend
        begun: deque[Job[T]] = deque()
        try:
            for job in jobs:
                begun.append(job)
                while len(begun) >= WINDOW or sum(map(_num_tokens, begun)) >= WINDOW_TOKENS:
                    yield frontend.finish(begun.popleft())
            while begun:
                yield frontend.finish(begun.popleft())
        finally:
            for job in begun:
                for ticket in job.tickets:
                    frontend.abort(ticket)


def _load(path: Path | None, device: str | None, arguments: ModelArguments) -> LLM:
    assert path is not None
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    own = {"max_length", "max_gen_toks", "add_bos_token", "prefix_token_id", "adapter"}
    options = {one.name: getattr(arguments, one.name) for one in fields(arguments) if one.name not in own}
    return LLM(
        path,
        device=device,
        max_model_len=_engine_length(path, arguments.max_length),
        adapters=None if arguments.adapter is None else {_ADAPTER: arguments.adapter},
        **options,
    )


def _num_tokens(job: Job[T]) -> int:
    return sum(len(request.tokens) for ticket in job.tickets for request in ticket.requests)


def _engine_length(path: Path, max_length: int | None) -> int | None:
    """A token more than the model reads, because `hf` scores one behind the longest text; where there is one more."""
    if max_length is None:
        return None
    config = open_checkpoint(path).config
    has_more = config.rope_scaling is not None or max_length < config.max_position_embeddings
    return max_length + 1 if has_more else max_length


def _warn(count: int, total: int, what: str) -> None:
    if count:
        logger.warning("%d of %d %s: their beginning is cut off.", count, total, what)


def main(arguments: Sequence[str]) -> None:
    """The command line of lm-evaluation-harness, with the model `internlm2` among those it knows.

    arguments: as behind the command `lm_eval`. It leaves with SystemExit where it shows its help or finds mistakes.
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm_eval", *arguments]  # it reads them there
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    main(sys.argv[1:])
