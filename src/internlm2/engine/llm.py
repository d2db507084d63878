"""Text in, text out: a model and its tokenizer together, for prompts, conversations and streams.

BOS is added to text prompts, as the official tokenizer does; chats end at `</s>` and `<|im_end|>` always.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path

from internlm2.checkpoint.load import load_checkpoint, require_head
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.resolve import resolve_model
from internlm2.engine.generate import Completion, FinishReason, generate, stream
from internlm2.engine.sampling import SamplingParams
from internlm2.errors import CheckpointError, RequestError
from internlm2.model.heads import CausalLM, RopeMode
from internlm2.tokenizer import Tokenizer
from internlm2.tokenizer.stream import StopStrings

Message = Mapping[str, object]


@dataclass(frozen=True)
class Output:
    """One finished request.

    text: the answer, without special tokens. token_ids: its ids. prompt_token_ids: what the model was given.
    finish_reason: "stop" (stop token or string) or "length".
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it appears.

    text: may be empty while a character or a stop string is undecided. token_ids: the new ids behind it, at most
    one; none for a stop token. finish_reason: None while it goes on.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class LLM:
    """A language model that answers.

    path: local folder, GGUF file, Hugging Face id, or "demo". dtype: "float32", "bfloat16", "float16" or "auto"
    (as the files). max_model_len: longest prompt plus answer, in tokens; None: the trained length, and no limit
    with dynamic scaling, which stretches to any.

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
        max_model_len: int | None = None,
    ) -> None:
        checkpoint = open_checkpoint(resolve_model(path))
        if checkpoint.tokenizer_folder is None:
            raise CheckpointError(
                f"{checkpoint.path} has weights but no tokenizer. Convert it with a tokenizer beside it: "
                "`internlm2 model convert`, then copy tokenizer.model into the new folder."
            )
        self.tokenizer = Tokenizer.from_pretrained(checkpoint.tokenizer_folder)
        check_vocabulary(self.tokenizer, checkpoint.config.vocab_size, where=str(checkpoint.path))
        model = load_checkpoint(checkpoint, dtype=dtype, device=device, rope_mode=rope_mode)
        self.model = require_head(model, CausalLM, use="generating text")
        if max_model_len is not None and max_model_len < 2:
            raise RequestError(
                f"max_model_len is {max_model_len}, but must hold a prompt and an answer: 2 or more."
            )
        self.max_model_len = _longest(self.model) if max_model_len is None else max_model_len

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | None = None
    ) -> list[Output]:
        """Complete prompts; results in prompt order. A str gets BOS; a list of ids is taken as it is.

        Raises RequestError for empty prompts and for those that leave no room for an answer.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts is one text, but must be a list. Write [prompt].")
        params = params or SamplingParams()
        encoded = [self.encode(prompt) for prompt in prompts]
        if params.stop:  # stop strings are found in text, so these prompts are followed one by one
            return [self._collect(ids, params) for ids in encoded]
        completions = generate(
            self.model,
            encoded,
            [self._fit(params, len(ids)) for ids in encoded],
            stop_ids=self.tokenizer.stop_ids,
            vocab_size=self.tokenizer.vocab_size,
        )
        return [self._output(ids, done) for ids, done in zip(encoded, completions, strict=True)]

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Message] | None = None,
    ) -> Output:
        """Answer a conversation of {"role", "content"} messages. Raises ChatError for malformed ones."""
        return self._collect(self.tokenizer.apply_chat(messages, tools=tools), params or SamplingParams())

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Message] | None = None,
    ) -> Iterator[Piece]:
        """As `chat`, piece by piece; never half a character, never the start of a stop string."""
        return self.stream(self.tokenizer.apply_chat(messages, tools=tools), params or SamplingParams())

    def stream(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[Piece]:
        """Complete one prompt, piece by piece; the last piece alone carries a finish_reason."""
        ids = self.encode(prompt)
        params = self._fit(params, len(ids))
        decoder = self.tokenizer.stream(skip_special=True)
        stops = StopStrings(params.stop)
        steps = stream(
            self.model,
            [ids],
            params,
            stop_ids=self.tokenizer.stop_ids,
            vocab_size=self.tokenizer.vocab_size,
        )
        for step in steps:
            is_stop_token = step.finish_reason == "stop"
            token_ids = () if is_stop_token else (step.token_id,)
            text = "" if is_stop_token else stops.push(decoder.push(token_ids))
            if step.finish_reason is not None:
                text += stops.push(decoder.finish())
            if stops.matched is not None:
                yield Piece(text, token_ids, "stop")
                return
            if step.finish_reason is not None:
                text += stops.finish()
            yield Piece(text, token_ids, step.finish_reason)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt: text gets BOS, ids stay."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        return [index(token) for token in prompt]  # numbers of numpy or torch become plain ones

    def _collect(self, ids: list[int], params: SamplingParams) -> Output:
        pieces = list(self.stream(ids, params))
        reason = pieces[-1].finish_reason
        assert reason is not None
        token_ids = [token for piece in pieces for token in piece.token_ids]
        return Output("".join(piece.text for piece in pieces), token_ids, ids, reason)

    def _output(self, ids: list[int], done: Completion) -> Output:
        text = self.tokenizer.decode(done.token_ids, skip_special=True)
        return Output(text, done.token_ids, ids, done.finish_reason)

    def _fit(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        if self.max_model_len is None:
            return params
        room = self.max_model_len - num_prompt_tokens
        if room < 1:
            raise RequestError(
                f"The prompt has {num_prompt_tokens} tokens, but this model takes {self.max_model_len} with the "
                "answer. Shorten the prompt, or raise max_model_len if the model has dynamic rope scaling."
            )
        fewer = min(params.max_tokens, room)
        return replace(params, max_tokens=fewer, min_tokens=min(params.min_tokens, fewer))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, *, where: str) -> None:
    """Raise CheckpointError when the tokenizer can make ids that the embedding does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, but the embedding has {vocab_size} rows. "
            "The tokenizer files belong to another model; copy the right ones."
        )


def _longest(model: CausalLM) -> int | None:
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        return None
    factor = 1.0 if scaling is None else scaling.factor
    return int(model.config.max_position_embeddings * factor)
