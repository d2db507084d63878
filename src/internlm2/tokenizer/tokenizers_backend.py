"""Text to ids with a `tokenizer.json`, through the Rust library `tokenizers`.

Covers byte-level BPE (SmolLM2, Llama 3, Qwen) and BPE with byte fallback (InternLM2.5 folders, our own
export). Special spellings in user text stay text: `encode_special_tokens` does it for tokens marked
special, and added tokens in brackets that are not marked so (`<tool_call>`) are marked at load.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from internlm2.errors import TokenizerError
from internlm2.tokenizer.special import MARKER


class TokenizersBackend:
    """A `tokenizer.json` whose markers are unreachable from text."""

    def __init__(self, content: str, *, where: str) -> None:
        """content: the text of `tokenizer.json`; where: its name in messages."""
        self.content = content
        try:
            data = json.loads(content)
            added = {token["id"]: token for token in data.get("added_tokens", [])}
            # A folder may ask for cut or padded results; we never cut a prompt without a word.
            is_changed = data.get("truncation") is not None or data.get("padding") is not None
            data["truncation"] = data["padding"] = None
            for token in added.values():
                if not token["special"] and MARKER.fullmatch(token["content"]) is not None:
                    token["special"] = is_changed = True
            decoders = _decoders(data.get("decoder"), where=where)
            # Writing a large vocabulary again takes as long as reading it.
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data) if is_changed else content)
        except TokenizerError:
            raise
        except Exception as error:  # NOTE: the Rust library raises bare Exception
            raise TokenizerError(
                f"{where} is not a tokenizer.json, or is damaged ({error}). Download or copy it again."
            ) from error
        self._tokenizer.encode_special_tokens = True
        self._added: Mapping[int, str] = {i: token["content"] for i, token in added.items()}
        self._decoders = decoders
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        num_ids = 1 + max(vocabulary.values(), default=-1)
        if num_ids > 2 * len(vocabulary) + 10_000:  # a few gaps are usual, a table of gigabytes is an attack
            raise TokenizerError(
                f"{where} has {len(vocabulary)} tokens, but ids up to {num_ids - 1}. Download or copy it again."
            )
        self.tokens: list[str] = [""] * num_ids
        for token, i in vocabulary.items():
            self.tokens[i] = token
        marked = {i for i, token in added.items() if token["special"]}
        # Spare slots of InternLM2 that the file does not list as added: no merge makes them from text.
        spare = {i for i, token in enumerate(self.tokens) if token.startswith("[UNUSED_TOKEN_")}
        self.special_ids = frozenset(marked | spare)
        self.drops_leading_space = any(decoder.get("type") == "Strip" for decoder in decoders)

    @classmethod
    def from_file(cls, path: Path) -> "TokenizersBackend":
        """Read `tokenizer.json`. Raises TokenizerError when it cannot be read or is damaged."""
        try:
            content = path.read_text(encoding="utf-8")
        except OSError as error:
            raise TokenizerError(
                f"Cannot read {path}: {error.strerror}. Check the file and its rights."
            ) from error
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"{path} is not a tokenizer.json, or is damaged ({error}). Download or copy it again."
            ) from error
        return cls(content, where=str(path))

    @property
    def bos_id(self) -> int | None:
        """The id that the file itself puts before a text, or None.

        NOTE: `bos_token` in tokenizer_config.json does not tell: SmolLM2 names one and never adds it.
        """
        ids = self._tokenizer.encode("", add_special_tokens=True).ids
        return ids[0] if ids else None

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token, as the file's decoder makes them."""
        is_byte_level = any(decoder["type"] == "ByteLevel" for decoder in self._decoders)
        replacements = [
            (decoder["pattern"]["String"], decoder["content"])
            for decoder in self._decoders
            if decoder["type"] == "Replace"
        ]
        falls_back = any(decoder["type"] == "ByteFallback" for decoder in self._decoders)
        table: list[bytes] = []
        for i, token in enumerate(self.tokens):
            if i in self._added or i in self.special_ids:
                table.append(token.encode())
            elif is_byte_level:
                table.append(_byte_level_bytes(token))
            elif falls_back and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                table.append(bytes([int(token[3:5], 16)]))
            else:
                for old, new in replacements:
                    token = token.replace(old, new)  # noqa: PLW2901 - one after the other, as the file says
                table.append(token.encode())
        return table

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text` without any special token."""
        # The batch call without offsets does less work than `encode`, for the same ids.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """Ids of every text. The library runs on its own pool, sized by RAYON_NUM_THREADS."""
        if num_threads == 1:
            return [self.encode_ordinary(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


_SUPPORTED = ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip")


def _decoders(decoder: dict | None, *, where: str) -> list[dict]:
    """The flat list of decoder steps; TokenizerError for a step that we cannot do byte by byte."""
    if decoder is None:
        return []
    steps: list[dict] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    for step in steps:
        plain = step["type"] != "Replace" or "String" in step["pattern"]
        if step["type"] not in _SUPPORTED or not plain:
            raise TokenizerError(
                f"{where} has the decoder {step['type']}, which this package cannot undo byte by byte. "
                f"Supported: {', '.join(_SUPPORTED)}. Use the folder's tokenizer.model if there is one."
            )
    return steps


def byte_level_alphabet() -> dict[str, int]:
    """The 256 printable characters with which byte-level BPE spells bytes (as in GPT-2's encoder.py)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


# For str.translate: a character that spells a byte -> the character of that number; another one -> none of them.
_TO_LATIN_1 = dict.fromkeys(range(256), "\uffff") | {
    ord(character): chr(byte) for character, byte in byte_level_alphabet().items()
}


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:  # a token that is spelled as plain text, as the library treats it too
        return token.encode()
