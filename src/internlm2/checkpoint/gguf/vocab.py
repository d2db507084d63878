"""The tokenizer inside a GGUF file -> tokenizer files like those of a model folder.

`gpt2` vocabularies become a tokenizer.json. `llama` ones become a sentencepiece model; for InternLM2 what
llama.cpp's converter changed is put back: names and types of the spare slots, and the NUL piece.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from internlm2.checkpoint.gguf.meta import Metadata, bos_id, document_end_id
from internlm2.checkpoint.gguf.names import DEFAULT_SYSTEM_KEY
from internlm2.checkpoint.save import write_json
from internlm2.errors import CheckpointError, TokenizerError
from internlm2.log import logger
from internlm2.tokenizer.export import byte_level_bpe_json
from internlm2.tokenizer.model_file import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece

FIRST_SPARE = "[UNUSED_TOKEN_0]"
# NUL cannot stand in a text of C. llama.cpp's converter writes a dragon, which then takes the id of NUL; we
# write a name that no merge of pieces makes.
NUL_NAME = "[NUL]"
_NUL_NAMES = ("", "\N{DRAGON}", NUL_NAME)
_ENDS = ("<|im_end|>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>")


def write_tokenizer(meta: Metadata, folder: Path) -> bool:
    """Write the tokenizer files of a GGUF file into `folder`; False when it holds none that we can use."""
    kind = meta.text("tokenizer.ggml.model")
    tokens = meta.texts("tokenizer.ggml.tokens")
    if kind in (None, "none", "no_vocab") or not tokens:
        return False
    types = [int(value) for value in meta.numbers("tokenizer.ggml.token_type")] or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{meta.where}: {len(tokens)} tokens, but {len(types)} token types. Convert the model again."
        )
    _check_ids(meta, len(tokens))
    try:
        if kind == "gpt2":
            _write_byte_level(meta, tokens, types, folder)
        elif kind == "llama":
            _write_sentencepiece(meta, tokens, types, folder)
        else:
            raise TokenizerError(f"Tokenizers of kind {kind!r} are not supported; only gpt2 and llama are.")
    except TokenizerError as error:
        logger.warning("%s: the weights can be used, but not the tokenizer. %s", meta.where, error)
        return False
    own = document_end_id(meta)
    ends = {i for i, token in enumerate(tokens) if token in _ENDS and types[i] == CONTROL} - {own}
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [i for i in (own, *sorted(ends)) if i is not None]},
    )
    return True


def _check_ids(meta: Metadata, num_tokens: int) -> None:
    for role in ("bos", "eos", "unknown", "padding"):
        token_id = meta.integer(f"tokenizer.ggml.{role}_token_id")
        if token_id is not None and not 0 <= token_id < num_tokens:
            raise CheckpointError(
                f"{meta.where}: the {role} token has id {token_id}, but there are {num_tokens} tokens. "
                "Convert the model again."
            )


def _write_byte_level(meta: Metadata, tokens: Sequence[str], types: Sequence[int], folder: Path) -> None:
    pre = meta.text("tokenizer.ggml.pre") or "default"
    content = byte_level_bpe_json(tokens, meta.texts("tokenizer.ggml.merges"), types, pre)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    config = _tokenizer_config(meta, tokens) | {"tokenizer_class": "PreTrainedTokenizerFast", "gguf_pre": pre}
    write_json(folder / "tokenizer_config.json", config)


def _tokenizer_config(meta: Metadata, tokens: Sequence[str]) -> dict[str, object]:
    def name(token_id: int | None) -> str | None:
        return None if token_id is None else tokens[token_id]

    start = bos_id(meta)
    config: dict[str, object] = {
        "add_bos_token": start is not None,
        "add_eos_token": False,
        "bos_token": name(start),
        "eos_token": name(document_end_id(meta)),
        "pad_token": name(meta.integer("tokenizer.ggml.padding_token_id")),
        "unk_token": name(meta.integer("tokenizer.ggml.unknown_token_id")),
        "clean_up_tokenization_spaces": False,
    }
    default_system = meta.text(DEFAULT_SYSTEM_KEY)
    if default_system is not None:
        config["default_system_prompt"] = default_system
    template = meta.text("tokenizer.chat_template")
    return config if template is None else config | {"chat_template": template}


@dataclass(frozen=True)
class _Vocabulary:
    pieces: tuple[Piece, ...]
    markers: Mapping[int, str]  # id -> name, of spare slots that have a use


def _write_sentencepiece(meta: Metadata, tokens: Sequence[str], types: Sequence[int], folder: Path) -> None:
    scores = meta.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{meta.where}: {len(tokens)} tokens, but {len(scores)} scores. Convert the model again."
        )
    unknown = meta.integer("tokenizer.ggml.unknown_token_id") or 0
    vocabulary = _restore(tokens, scores, types, unknown)
    content = b"".join(_message(1, _piece(piece)) for piece in vocabulary.pieces)
    content += _message(2, _trainer(meta, vocabulary.pieces, unknown)) + _message(3, _normalizer(meta))
    (folder / "tokenizer.model").write_bytes(content)
    config = _tokenizer_config(meta, [piece.text for piece in vocabulary.pieces])
    config["added_tokens_decoder"] = {
        str(i): {"content": name, "special": True} for i, name in vocabulary.markers.items()
    }
    write_json(folder / "tokenizer_config.json", config)


def _restore(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], unknown: int
) -> _Vocabulary:
    """The pieces as sentencepiece had them. Types are numbered alike in GGUF and in sentencepiece."""
    # NOTE: llama.cpp's converter marks <unk> as control when tokenizer_config.json lists it.
    kinds = [UNKNOWN if i == unknown else kind for i, kind in enumerate(types)]
    names, values = list(tokens), list(scores)
    markers: dict[int, str] = {}
    if FIRST_SPARE in names:
        first = names.index(FIRST_SPARE)
        for i in range(first, len(names)):
            spare = f"[UNUSED_TOKEN_{i - first}]"
            if names[i] != spare:
                markers[i] = names[i]
            names[i], values[i], kinds[i] = spare, 0.0, USER_DEFINED
        # The converter calls user-defined pieces normal; their score of 0 gives them away, merges have less.
        for i in range(first - 1, -1, -1):
            if values[i] != 0.0 or kinds[i] not in (NORMAL, USER_DEFINED):
                break
            kinds[i] = USER_DEFINED
    for i, (name, following) in enumerate(pairwise(names)):
        if name in _NUL_NAMES and following == "\x01":
            names[i] = "\0"
    pieces = map(Piece, names, values, kinds)
    return _Vocabulary(tuple(pieces), markers)


# The messages and field numbers of sentencepiece_model.proto.


def _piece(piece: Piece) -> bytes:
    score = _varint(2 << 3 | 5) + struct.pack("<f", piece.score)
    return _message(1, piece.text.encode()) + score + _number(3, piece.kind)


def _trainer(meta: Metadata, pieces: Sequence[Piece], unknown: int) -> bytes:
    has_bytes = any(piece.kind == BYTE for piece in pieces)
    trainer = _number(3, BPE) + _number(4, len(pieces)) + _number(35, has_bytes)
    special = (unknown, meta.integer("tokenizer.ggml.bos_token_id"), document_end_id(meta), None)
    for field, token_id in enumerate(special, start=40):
        if token_id is None:
            trainer += _number(field, 2**64 - 1)  # -1: there is none
        else:
            # Fields 45 to 48 name the pieces whose ids fields 40 to 43 give.
            trainer += _number(field, token_id) + _message(field + 5, pieces[token_id].text.encode())
    return trainer


def _normalizer(meta: Metadata) -> bytes:
    add_dummy_prefix = meta.flag("tokenizer.ggml.add_space_prefix", True)
    remove_extra_whitespaces = meta.flag("tokenizer.ggml.remove_extra_whitespaces", False)
    flags = _number(3, add_dummy_prefix) + _number(4, remove_extra_whitespaces) + _number(5, True)
    return _message(1, b"identity") + flags


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))
