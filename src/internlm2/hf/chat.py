"""`chat` and `stream_chat` with the signatures of the official class.

What differs from it: control tokens spelled in messages stay text, every chat stops at `</s>` and
`<|im_end|>`, half characters are never shown, an error in the worker reaches the consumer, and a consumer
that leaves stops the worker.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    BatchEncoding,
    GenerationMixin,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from internlm2.errors import RequestError

History = Sequence[tuple[str, str]]

# The published interface text of `chat()`: who the assistant is, what it aims at, and its languages.
META_INSTRUCTION = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user "
    "such as English and 中文."
)
_END_MARKERS = ("<|im_end|>", "[UNUSED_TOKEN_145]")
_QUEUE_SIZE = 20
_POLL_SECONDS = 0.1


class ChatMixin(GenerationMixin):
    """Conversations for a model that can generate."""

    def build_inputs(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: History | None = None,
        meta_instruction: str = "",
    ) -> BatchEncoding:
        """The prompt of a conversation as tensors: BOS, turns, and the opening of the answer.

        history: earlier (query, response) pairs. meta_instruction: the system turn; none where it is empty.
        """
        messages = [{"role": "system", "content": meta_instruction}] if meta_instruction else []
        for asked, answered in history or ():
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": query})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert isinstance(inputs, BatchEncoding)
        return inputs

    @torch.no_grad()
    def chat(  # noqa: PLR0917 - the official signature
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: History | None = None,
        streamer: BaseStreamer | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str = META_INSTRUCTION,
        **kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer one message. Returns (response, history + [(query, response)]); kwargs go to `generate`."""
        inputs = self.build_inputs(tokenizer, query, history, meta_instruction)
        inputs = inputs.to(self.device)  # pyrefly: ignore[missing-attribute] - of the model this is mixed into
        if do_sample:
            kwargs = {"temperature": temperature, "top_p": top_p, **kwargs}
        kwargs.setdefault("eos_token_id", stop_ids(tokenizer))
        kwargs.setdefault("pad_token_id", tokenizer.pad_token_id)
        output = self.generate(  # pyrefly: ignore[no-matching-overload,bad-argument-type]
            **inputs, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=do_sample, **kwargs
        )
        answer = output[0, inputs["input_ids"].shape[1] :].tolist()
        response = _text(tokenizer, answer)
        return response, [*(history or ()), (query, response)]

    def stream_chat(  # noqa: PLR0917 - the official signature
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: History | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        **kwargs: Any,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Answer one message piece by piece: yields (response so far, history), first with an empty response.

        Closing the iterator stops the generation. kwargs go to `chat`. Raises what `chat` raises, and
        RequestError for more than one sequence at a time.
        """
        earlier = list(history or ())
        stream = _ChatStream(tokenizer)
        user_criteria = kwargs.pop("stopping_criteria", None) or ()
        criteria = StoppingCriteriaList([*user_criteria, _WhenLeft(stream.left)])

        def work() -> None:
            try:
                self.chat(
                    tokenizer, query, earlier, stream, max_new_tokens, do_sample, temperature, top_p,
                    stopping_criteria=criteria, **kwargs,
                )  # fmt: skip
                stream.offer(None)
            except BaseException as error:
                stream.offer(error)

        yield "", [*earlier, (query, "")]
        worker = threading.Thread(target=work, name="stream_chat", daemon=True)
        worker.start()
        try:
            while (item := stream.items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item, [*earlier, (query, item)]
        finally:
            stream.left.set()
            worker.join()


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's own end and the end of a turn, in whichever spelling it has."""
    vocabulary = tokenizer.get_vocab()
    found = [tokenizer.eos_token_id, *(vocabulary.get(marker) for marker in _END_MARKERS)]
    return sorted({i for i in found if i is not None})


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


class _WhenLeft(StoppingCriteria):
    """Ends generation once the consumer has gone."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._left.is_set(), device=input_ids.device)


class _ChatStream(BaseStreamer):
    """Carries text from the generating thread to the consumer; holds back characters that are not whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._has_prompt = False
        self._ids: list[int] = []
        self._shown = ""
        self.items: queue.Queue[str | BaseException | None] = queue.Queue(maxsize=_QUEUE_SIZE)
        self.left = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then every new token."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise RequestError("stream_chat answers one sequence at a time; use generate for batches.")
        if not self._has_prompt:
            self._has_prompt = True
            return
        self._ids += value.flatten().tolist()
        text = _text(self._tokenizer, self._ids)
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """Bytes that never became a character are shown as U+FFFD now."""
        self._show(_text(self._tokenizer, self._ids))

    def _show(self, text: str) -> None:
        if text != self._shown:
            self._shown = text
            self.offer(text)

    def offer(self, item: str | BaseException | None) -> None:
        """Put an item into the queue; give up once the consumer has gone."""
        while not self.left.is_set():
            try:
                self.items.put(item, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue
