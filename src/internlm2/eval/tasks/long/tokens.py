"""What the lengths of needle tests are counted in: the tokens of GPT-4, as their authors did, or of a model."""

import base64
import hashlib
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from internlm2.errors import InternLM2Error
from internlm2.eval.data.folder import DataError, DataFolder
from internlm2.eval.extras import library
from internlm2.tokenizer.tokenizer import Tokenizer

GPT4 = "needle/cl100k_base.tiktoken"
MODEL = ("needle/tokenizer.model", "needle/tokenizer.json")
# how text is cut before bytes are merged: https://github.com/openai/tiktoken, tiktoken_ext/openai_public.py
_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"""
    r"""\s*[\r\n]|\s+(?!\S)|\s"""
)


class Counter(Protocol):
    """Text <-> tokens. name: what tells it from others, such as the sha256 of its file."""

    name: str

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; nothing in it is special."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; half a character becomes U+FFFD."""
        ...


class GPT4Counter:
    """The vocabulary cl100k_base, read from the data folder: tiktoken would fetch it from the net."""

    def __init__(self, data: DataFolder) -> None:
        content = data.bytes(GPT4)
        try:
            ranks = {
                base64.b64decode(piece, validate=True): int(rank)
                for piece, rank in (line.split() for line in content.splitlines() if line)
            }
            self._encoding = library("tiktoken", "Counting GPT-4's tokens").Encoding(
                "cl100k_base", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={}
            )
        except ValueError as error:
            raise data.damaged(GPT4, f"it is no vocabulary of tiktoken ({error})") from error
        if len({bytes([value]) for value in range(256)} - ranks.keys()):
            raise data.damaged(GPT4, "it lacks single bytes")
        self.name = f"cl100k_base {hashlib.sha256(content).hexdigest()}"

    def encode(self, text: str) -> list[int]:
        """See `Counter`."""
        return list(self._encoding.encode_ordinary(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Counter`."""
        return str(self._encoding.decode(list(tokens), errors="replace"))


class ModelCounter:
    """A tokenizer.model or tokenizer.json in the data folder: that of the model that is evaluated."""

    def __init__(self, data: DataFolder) -> None:
        name = next((name for name in MODEL if (data.path / name).is_file()), None)
        if name is None:
            raise DataError(
                f"The lengths of needle tests are counted in the model's tokens: put its tokenizer.model or "
                f"tokenizer.json into {data.path / 'needle'}. The card's profiles count GPT-4's tokens instead."
            )
        content = data.bytes(name)
        with tempfile.TemporaryDirectory() as folder:  # a copy: files beside it are not meant
            path = Path(folder) / Path(name).name
            path.write_bytes(content)
            try:
                self._tokenizer = Tokenizer.from_pretrained(folder)
            except InternLM2Error as error:
                raise data.damaged(name, str(error)) from error
        self.encode = self._tokenizer.encode
        self.decode = partial(self._tokenizer.decode, skip_special=False)
        self.name = f"tokenizer {hashlib.sha256(content).hexdigest()}"
