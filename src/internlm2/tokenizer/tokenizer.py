"""The tokenizer that everything else uses: text to ids, ids to text, conversations to ids.

Two kinds of files stand behind it, sentencepiece and tokenizer.json. Where a folder holds both, the
sentencepiece model is taken: it is what InternLM2 was trained with, and some tokenizer.json files that
were converted from it are wrong.
"""

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from internlm2.errors import ChatError, TokenizerError
from internlm2.tokenizer import special
from internlm2.tokenizer.chat.format import ChatTokens, Segment, render
from internlm2.tokenizer.chat.message import Message, Tool
from internlm2.tokenizer.chat.parse import AssistantParser, AssistantTurn
from internlm2.tokenizer.chat.spelled import spell, spelled_markers
from internlm2.tokenizer.sentencepiece_backend import SentencePieceBackend
from internlm2.tokenizer.special import SpecialTokens
from internlm2.tokenizer.stream import StreamDecoder, unknown_id
from internlm2.tokenizer.tokenizers_backend import TokenizersBackend


class Backend(Protocol):
    """A vocabulary: sentencepiece or tokenizer.json."""

    @property
    def tokens(self) -> Sequence[str]:
        """The name of every id, as the file spells it. Slots that nothing uses are empty."""
        ...

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The UTF-8 bytes that every id stands for."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no ordinary text produces: control pieces and markers."""
        ...

    @property
    def drops_leading_space(self) -> bool:
        """Whether encoding puts a space before the text, which decoding takes away again."""
        ...

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, none of them special."""
        ...

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """`encode_ordinary` of every text, in order."""
        ...


class Tokenizer:
    """Text <-> ids of one vocabulary. Make it with `Tokenizer.from_pretrained(folder)`."""

    def __init__(
        self, backend: Backend, specials: SpecialTokens, *, default_system: str | None = None
    ) -> None:
        self.backend = backend
        self.specials = specials
        self.default_system = default_system

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Read the tokenizer of a model folder.

        Raises TokenizerError when the folder has no tokenizer files, or damaged ones.
        """
        folder = Path(path)
        config = special.read_config(folder)
        model_path, json_path = folder / "tokenizer.model", folder / "tokenizer.json"
        if model_path.exists():
            pieces = SentencePieceBackend.from_file(model_path)
            found = special.find(
                pieces.tokens,
                pieces.special_ids,
                config,
                bos_id=None if config.add_bos_token is False else pieces.bos_id,
                eos_id=pieces.eos_id,
                pad_id=pieces.pad_id,
            )
            return cls(pieces, found, default_system=config.default_system)
        if json_path.exists():
            backend = TokenizersBackend.from_file(json_path)
            bos_id = backend.bos_id if config.add_bos_token is not False else None
            if bos_id is None and config.add_bos_token and config.bos_token in backend.tokens:
                bos_id = backend.tokens.index(config.bos_token)
            found = special.find(backend.tokens, backend.special_ids, config, bos_id=bos_id)
            return cls(backend, found, default_system=config.default_system)
        what = "is no folder" if not folder.is_dir() else "holds neither"
        raise TokenizerError(
            f"No tokenizer: {folder} {what}. Looked for tokenizer.model (sentencepiece) and tokenizer.json. "
            "Copy one of them from the model's page into the folder."
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids. The model's embedding may have more rows (padding), never fewer."""
        return len(self.token_bytes)

    @property
    def bos_id(self) -> int | None:
        """The id that starts every sequence, or None for vocabularies that start without one."""
        return self.specials.bos_id

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document."""
        return self.specials.eos_id

    @property
    def pad_id(self) -> int | None:
        """The id that fills up a batch; the end-of-document id where the files name none."""
        return self.specials.pad_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: end of document and `<|im_end|>`."""
        return self.specials.stop_ids

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Every special token by the name that decoding writes."""
        return {name: i for i, name in self.specials.names.items()}

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes behind every id, special ones by name; `decode` joins these."""
        table = list(self.backend.token_bytes)
        table.extend(b"" for _ in range(1 + max(self.specials.names, default=-1) - len(table)))
        for i, name in self.specials.names.items():
            table[i] = name.encode()
        return table

    def encode(self, text: str, bos: bool = False, allow_special: bool = False) -> list[int]:
        """Ids of `text`.

        bos: put the start id first, where the vocabulary has one.
        allow_special: read `<|im_start|>`, `[UNUSED_TOKEN_146]`, `</s>` and so on as control ids.
        Without it they are plain text, so that a user cannot write a turn of somebody else.
        Raises TokenizerError for what is not text.
        """
        ids = self._encode_with_special(text) if allow_special else self._encode_ordinary(text)
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        return ids

    def encode_batch(
        self,
        texts: Sequence[str],
        bos: bool = False,
        allow_special: bool = False,
        *,
        num_threads: int | None = None,
    ) -> list[list[int]]:
        """`encode` of every text, in order. num_threads: None takes as many as there are cores."""
        if isinstance(texts, str):
            raise TokenizerError("encode_batch takes a list of texts, but was given one text. Use encode.")
        if num_threads is not None and num_threads < 1:
            raise TokenizerError(f"num_threads must be 1 or more, but is {num_threads}.")
        if allow_special:
            results = [self._encode_with_special(text) for text in texts]
        else:
            results = self._encode_batch(texts, num_threads or os.cpu_count() or 1)
        if bos and self.bos_id is not None:
            for ids in results:
                ids.insert(0, self.bos_id)
        return results

    def _encode_ordinary(self, text: str) -> list[int]:
        if not isinstance(text, str):
            check_type(text)
        try:
            return self.backend.encode_ordinary(text)
        except Exception:  # whatever a library raises for a lone surrogate; asking before costs time
            check_unicode(text)
            raise

    def _encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        for text in texts:
            check_type(text)
        try:
            return self.backend.encode_batch(texts, num_threads)
        except Exception:
            for text in texts:
                check_unicode(text)
            raise

    def _encode_with_special(self, text: str) -> list[int]:
        check_type(text)
        pattern = self.specials.pattern
        if pattern is None:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for n, part in enumerate(pattern.split(text)):
            if n % 2:  # split() puts what matched at the odd places
                ids.append(self.specials.ids[part])
            elif part:
                ids.extend(self._encode_ordinary(part))
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; U+FFFD where bytes do not form a character.

        skip_special: leave out control ids instead of writing their names.
        Raises TokenizerError for an id outside the vocabulary.
        """
        decoder = self.stream(skip_special=skip_special)
        return decoder.push(ids) + decoder.finish()

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive one by one; see `StreamDecoder`."""
        return StreamDecoder(
            self.token_bytes,
            names=self.specials.names,
            skip_special=skip_special,
            drop_leading_space=self.backend.drops_leading_space,
        )

    def id_to_token(self, token_id: int) -> str:
        """The name of an id: as decoding writes it for special ids, as the vocabulary file has it otherwise.

        Raises TokenizerError for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(unknown_id(token_id, self.vocab_size))
        name = self.specials.names.get(token_id)
        if name is None and token_id < len(self.backend.tokens):
            name = self.backend.tokens[token_id]
        return name or ""  # added tokens may lie beyond a gap

    def token_to_id(self, token: str) -> int:
        """The id of a vocabulary entry, special ones in every accepted spelling. Raises TokenizerError."""
        found = self.specials.ids.get(token, self._ids_by_token.get(token))
        if found is None:
            raise TokenizerError(
                f"The vocabulary has no token {token!r}. Use encode() to turn text into ids."
            )
        return found

    @cached_property
    def _ids_by_token(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.backend.tokens)}

    def apply_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        *,
        continue_final: bool = False,
        whole_turns: bool = False,
    ) -> list[int]:
        """Ids of a conversation, with the start id, ready for the model to answer.

        messages: OpenAI-style dicts with role, content and perhaps name, tool_calls, tool_call_id.
        tools: OpenAI-style tools, bare function dicts, or {"type": "code_interpreter"}.
        continue_final: leave the last message, of the assistant, open for the model to continue.
        whole_turns: encode the assistant's header and words as one text, as reward models are given them.
        Raises ChatError for what is not a conversation.
        """
        segments = self._render(
            messages, tools, add_generation_prompt, continue_final, whole_turns=whole_turns
        )
        return self._chat_tokens(segments).ids

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        *,
        continue_final: bool = False,
    ) -> str:
        """The same prompt as text, for people to read. Its ids are those of `apply_chat`, not of `encode`."""
        segments = self._render(messages, tools, add_generation_prompt, continue_final)
        bos = "" if self.bos_id is None else self.id_to_token(self.bos_id)
        return bos + "".join(segment.text for segment in segments)

    def apply_chat_with_mask(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None
    ) -> ChatTokens:
        """Ids of a whole conversation and which of them to learn: what the assistant says and its end.

        A message of the assistant with "loss": False is not learned. Raises ChatError.
        """
        return self._chat_tokens(self._render(messages, tools, False, False))

    def parse_assistant(self, ids: Iterable[int]) -> AssistantTurn:
        """What the model's ids say: text, calls of plugins, code to run."""
        parser = AssistantParser(self)
        parser.push(ids)
        parser.finish()
        return parser.turn

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
        continue_final: bool,
        *,
        whole_turns: bool = False,
    ) -> list[Segment]:
        segments = render(
            messages,
            tools,
            default_system=self.default_system,
            add_generation_prompt=add_generation_prompt,
            continue_final=continue_final,
            whole_turns=whole_turns,
        )
        segments = spell(segments, spelled_markers(self.specials.ids))
        missing = {s.text for s in segments if s.is_special and s.text not in self.specials.ids}
        if missing:
            raise ChatError(
                f"This vocabulary has no {', '.join(sorted(missing))}, which chat needs. "
                "Use a chat model's folder, or give a plain prompt to encode()."
            )
        return segments

    def _chat_tokens(self, segments: Sequence[Segment]) -> ChatTokens:
        ids = [] if self.bos_id is None else [self.bos_id]
        mask = [False] * len(ids)
        for segment in segments:
            if segment.is_special:
                ids.append(self.specials.ids[segment.text])
            else:
                ids.extend(self._encode_ordinary(segment.text))
            mask.extend([segment.has_loss] * (len(ids) - len(mask)))
        return ChatTokens(ids, mask)


def check_type(text: object) -> None:
    """Raise TokenizerError when `text` is no str."""
    if not isinstance(text, str):
        raise TokenizerError(
            f"Text to encode must be a str, but this is {type(text).__name__}: {text!r:.80}."
        )


def check_unicode(text: str) -> None:
    """Raise TokenizerError when `text` cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"Character {error.start} of the text is the lone surrogate {text[error.start]!a}, which no "
            "UTF-8 text can hold. Read the text with the right encoding, or clean it with "
            "text.encode('utf-8', 'replace').decode()."
        ) from error
