"""Our engine as a model to evaluate: many questions at once, and all labels of one together.

Labels are asked in one pass each over what they do not share: the pages of the prompt are computed once.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from internlm2.engine.frontend import Ticket
from internlm2.engine.llm import LLM
from internlm2.engine.sampling.params import SamplingParams
from internlm2.errors import RequestError
from internlm2.eval.model import Answer, Fitted, Prompt, Request, compare_labels, fit, num_common
from internlm2.eval.task import ChatPrompt
from internlm2.tokenizer import Tokenizer

WINDOW = (
    256  # questions in the engine at a time: several times what it runs at once, so that it never starves
)
WINDOW_TOKENS = (
    1 << 21
)  # and so many tokens of prompts, 75 MB of ids: 256 prompts of 200,000 would fill 1.8 GB
_BLOCK_BYTES = 1 << 20
_NUM_BLOCKS = 16


@dataclass(frozen=True)
class _Asked:
    """A question that the engine has. num_tokens: of its prompts. read: its answer, once all tickets are done."""

    request: Request
    num_tokens: int
    tickets: list[Ticket]
    read: Callable[[], Answer]

    @property
    def is_done(self) -> bool:
        return all(ticket.is_done for ticket in self.tickets)

    def answer(self) -> Answer:
        try:
            for ticket in self.tickets:
                ticket.raise_error()
            return self.read()
        except RequestError as error:
            return Answer(error=str(error))


class _Asking:
    """Questions in the engine, as many as fit into the window; each that is answered makes room for the next.

    New questions are asked in the engine's thread, before its next step: a run that is repeated computes the same
    batches, to the last bit, however long its caller takes over an answer.
    """

    def __init__(
        self, requests: Iterator[Request], ask: Callable[[Request, Callable[[], None]], _Asked]
    ) -> None:
        self.found: SimpleQueue[tuple[Request, Answer] | BaseException | None] = SimpleQueue()
        self._waiting: Iterator[Request] | None = requests
        self._ask = ask
        self._open: list[_Asked] = []
        self.is_left = False

    def fill(self) -> None:
        """Ask until the window is full. What comes of it lies in `found`: None is the end."""
        try:
            while self._waiting is not None and self._has_room and not self.is_left:
                request = next(self._waiting, None)
                if request is None:
                    self._waiting = None
                else:
                    self._take(request)
        except BaseException as error:
            self._waiting = None
            self.found.put(error)
            return
        if self._waiting is None and not self._open:
            self.found.put(None)

    @property
    def _has_room(self) -> bool:
        num_tokens = sum(one.num_tokens for one in self._open)
        return len(self._open) < WINDOW and num_tokens < WINDOW_TOKENS

    def _take(self, request: Request) -> None:
        try:
            self._open.append(self._ask(request, self._on_mail))
        except RequestError as error:
            self.found.put((request, Answer(error=str(error))))

    def _on_mail(self) -> None:
        done = [one for one in self._open if one.is_done]
        if not done or self.is_left:
            return
        self._open = [one for one in self._open if not one.is_done]
        try:
            for one in done:
                self.found.put((one.request, one.answer()))
        except BaseException as error:
            self._waiting = None
            self.found.put(error)
            return
        self.fill()

    @property
    def tickets(self) -> list[Ticket]:
        """What is open."""
        return [ticket for one in self._open for ticket in one.tickets]


class EngineModel:
    """An `LLM` as a `LanguageModel`.

    name: as the user calls it. settings: what else belongs to the description, such as dtype and "sha256".
    adapter: the LoRA adapter that answers.
    """

    counts_tokens = True

    def __init__(
        self,
        llm: LLM,
        *,
        name: str,
        settings: Mapping[str, str] | None = None,
        adapter: str | None = None,
    ) -> None:
        self._llm = llm
        self._adapter = adapter
        self._tokenizer = without_system(llm.tokenizer)
        self.description: Mapping[str, str] = {"name": name, **(settings or {})}

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """See `LanguageModel.answer`."""
        asking = _Asking(iter(requests), self._ask)
        frontend = self._llm.frontend
        try:
            with frontend.held():
                asking.fill()
            while (found := asking.found.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            asking.is_left = True
            frontend.settle()  # whatever is asked at this moment has been asked then
            for ticket in asking.tickets:
                frontend.abort(ticket)

    def encode(self, prompt: Prompt, label: str = "") -> list[int]:
        """See `encode_prompt`."""
        return encode_prompt(self._tokenizer, prompt, label)

    def _ask(self, request: Request, on_mail: Callable[[], None]) -> _Asked:
        num_start = 0 if self._tokenizer.bos_id is None else 1
        fitted = fit(request, self.encode, max_model_len=self._llm.max_model_len, num_start=num_start)
        ask = self._compare if request.labels else self._generate
        return ask(request, fitted, on_mail)

    def _generate(self, request: Request, fitted: Fitted, on_mail: Callable[[], None]) -> _Asked:
        params = SamplingParams(
            max_tokens=request.max_tokens, min_tokens=request.min_tokens, stop=request.stop, temperature=0.0
        )
        job = self._llm.begin_generate(list(fitted.token_ids), params, adapter=self._adapter, on_mail=on_mail)

        def read() -> Answer:
            output = job.read()[0]
            return Answer(
                output.text,
                finish_reason=output.finish_reason,
                prompt_tokens=len(output.prompt_token_ids),
                output_tokens=len(output.token_ids),
                dropped_shots=fitted.dropped_shots,
                cut_tokens=fitted.cut_tokens,
            )

        return _Asked(request, sum(map(len, fitted.token_ids)), job.tickets, read)

    def _compare(self, request: Request, fitted: Fitted, on_mail: Callable[[], None]) -> _Asked:
        texts = fitted.token_ids
        start = scored_from(texts)
        job = self._llm.begin_score(
            [ids[:start] for ids in texts],
            [ids[start:] for ids in texts],
            adapter=self._adapter,
            on_mail=on_mail,
        )

        def read() -> Answer:
            values = compare_labels(texts, [score.token_logprobs for score in job.read()])
            return Answer(
                logprobs=dict(zip(request.labels, values, strict=True)),
                prompt_tokens=sum(map(len, texts)),
                dropped_shots=fitted.dropped_shots,
                cut_tokens=fitted.cut_tokens,
            )

        return _Asked(request, sum(map(len, texts)), job.tickets, read)


def without_system(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer whose chats have no system message, as on the card, not even the one of a model's own template."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.default_system = None
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, label: str = "") -> list[int]:
    """The ids of a whole prompt: the start id first; control tokens of a chat only around its turns."""
    if isinstance(prompt, ChatPrompt):
        assert not label, "labels are compared behind plain text only"
        # NOTE: OpenCompass encodes the text between two control tokens as one, also in its examples.
        return tokenizer.apply_chat(prompt.messages, whole_turns=True)
    return tokenizer.encode(prompt.text + label, bos=True)


def scored_from(texts: Sequence[Sequence[int]]) -> int:
    """From which id on the texts of a question's labels are scored: where they part, if they are equally long.

    At least one id is scored and one stands before it; texts of different lengths are scored whole.
    """
    if len({len(ids) for ids in texts}) > 1:
        return 1
    return max(1, min(num_common(texts), len(texts[0]) - 1))


def fingerprint(path: Path) -> str:
    """A sha256 that tells models apart without reading all their bytes.

    path: folder or file. It covers the name and size of every file, and 16 blocks of 1 MiB spread evenly over each:
    all of a small file, enough of a large one to notice any training.
    """
    digest = hashlib.sha256()
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    for file in files:
        relative = file.relative_to(path) if path.is_dir() else Path(file.name)
        if any(part.startswith(".") for part in relative.parts):
            continue  # what downloads leave behind
        size = file.stat().st_size
        digest.update(f"{relative.as_posix()}\0{size}\0".encode())
        with file.open("rb") as stream:
            last = max(0, size - _BLOCK_BYTES)
            for n in range(_NUM_BLOCKS):
                place = last * n // (_NUM_BLOCKS - 1)
                stream.seek(place if size > _NUM_BLOCKS * _BLOCK_BYTES else n * _BLOCK_BYTES)
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
