"""Our engine as a model to evaluate: many questions at once, and all labels of one together.

Labels are asked in one pass each over what they do not share: the pages of the prompt are computed once.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from internlm2.engine.frontend import Ticket
from internlm2.engine.llm import LLM
from internlm2.engine.sampling.params import SamplingParams
from internlm2.errors import RequestError
from internlm2.eval.model import Answer, Fitted, Prompt, Request, compare_labels, fit, num_common
from internlm2.eval.task import ChatPrompt

WINDOW = (
    256  # questions in the engine at a time: several times what it runs at once, so that it never starves
)
_BLOCK_BYTES = 1 << 20
_NUM_BLOCKS = 16


@dataclass(frozen=True)
class _Asked:
    """A question that the engine has. read: its answer, once all tickets are done."""

    request: Request
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


class _Turns:
    """The engine and whoever asks it take turns: a run that is repeated computes the same batches, to the last bit."""

    def __init__(self) -> None:
        self._mail: SimpleQueue[None] = SimpleQueue()
        self._go: SimpleQueue[None] = SimpleQueue()
        self._is_left = False

    def on_mail(self) -> None:
        """In the engine's thread, when a question is answered: others take its place before the next step."""
        if not self._is_left:
            self._mail.put(None)
            self._go.get()

    def wait(self) -> None:
        """Until the engine waits."""
        self._mail.get()

    def go_on(self) -> None:
        """Let the engine go on."""
        self._go.put(None)

    def leave(self) -> None:
        """The engine need not wait any more."""
        self._is_left = True
        self._go.put(None)


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
        # The card's chats have no system message, not even the one that a model's own template would put.
        self._tokenizer = copy.copy(llm.tokenizer)
        self._tokenizer.default_system = None
        self.description: Mapping[str, str] = {"name": name, **(settings or {})}

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """See `LanguageModel.answer`."""
        waiting = iter(requests)
        asked: list[_Asked] = []
        turns = _Turns()
        try:
            with self._llm.frontend.held():
                refused = self._fill(asked, waiting, turns)
            while True:
                yield from refused
                if not asked:
                    return
                turns.wait()
                done = [one for one in asked if one.is_done]
                asked[:] = [one for one in asked if not one.is_done]
                refused = self._fill(asked, waiting, turns)
                turns.go_on()
                for one in done:
                    yield one.request, one.answer()
        finally:
            turns.leave()
            for one in asked:
                for ticket in one.tickets:
                    self._llm.frontend.abort(ticket)

    def _fill(
        self, asked: list[_Asked], waiting: Iterator[Request], turns: "_Turns"
    ) -> list[tuple[Request, Answer]]:
        """Ask until the window is full. Returns those that cannot be asked."""
        refused: list[tuple[Request, Answer]] = []
        while len(asked) + len(refused) < WINDOW and (request := next(waiting, None)) is not None:
            try:
                asked.append(self._ask(request, turns.on_mail))
            except RequestError as error:
                refused.append((request, Answer(error=str(error))))
        return refused

    def encode(self, prompt: Prompt, label: str = "") -> list[int]:
        """The ids of a whole prompt: the start id first; control tokens of a chat only around its turns."""
        if isinstance(prompt, ChatPrompt):
            assert not label, "labels are compared behind plain text only"
            # NOTE: OpenCompass encodes the text between two control tokens as one, also in its examples.
            return self._tokenizer.apply_chat(prompt.messages, whole_turns=True)
        return self._tokenizer.encode(prompt.text + label, bos=True)

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

        return _Asked(request, job.tickets, read)

    def _compare(self, request: Request, fitted: Fitted, on_mail: Callable[[], None]) -> _Asked:
        texts = fitted.token_ids
        is_even = len({len(ids) for ids in texts}) == 1
        # At least one id is scored and one stands before it; texts of different lengths are scored whole.
        start = max(1, min(num_common(texts), len(texts[0]) - 1)) if is_even else 1
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

        return _Asked(request, job.tickets, read)


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
