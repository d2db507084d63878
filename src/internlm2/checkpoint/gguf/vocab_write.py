"""Tokenizer files -> the tokenizer metadata of a GGUF file, so that llama.cpp gives the same ids.

Which id ends generation is the rule that goes wrong most often: llama.cpp stops at eos and at eot. A folder
that names `<|im_end|>` is a chat model: eos and eot are `<|im_end|>`. Any other: eos is the document's end
(2), and eot is still `<|im_end|>` where the vocabulary has it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from gguf import GGUFWriter, TokenType

from internlm2.checkpoint.config_json import read_json
from internlm2.checkpoint.gguf.names import DEFAULT_SYSTEM_KEY
from internlm2.checkpoint.gguf.vocab import NUL_NAME
from internlm2.errors import ExportError
from internlm2.model.config import ModelConfig
from internlm2.tokenizer import Tokenizer
from internlm2.tokenizer.export import byte_level_bpe_json, chat_template
from internlm2.tokenizer.model_file import UNUSED
from internlm2.tokenizer.sentencepiece_backend import SentencePieceBackend

_IM_END = "<|im_end|>"
_PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2", "default")


def add_tokenizer(writer: GGUFWriter, folder: Path, config: ModelConfig) -> None:
    """Add the tokenizer of `folder`. Raises ExportError when it is not the model's or has no GGUF form."""
    tokenizer = Tokenizer.from_pretrained(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ExportError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, but the model has "
            f"{config.vocab_size} rows: "
            "they do not belong together. Put the model's own tokenizer files there, or remove them."
        )
    if isinstance(tokenizer.backend, SentencePieceBackend):
        _add_sentencepiece(writer, tokenizer, tokenizer.backend, config.vocab_size)
    else:
        _add_byte_level(writer, tokenizer, folder, config.vocab_size)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    im_end = tokenizer.special_tokens.get(_IM_END)
    is_chat = im_end is not None and is_chat_folder(folder)
    eos = im_end if is_chat else tokenizer.eos_id
    if eos is not None:
        writer.add_eos_token_id(eos)
    if im_end is not None:
        writer.add_eot_token_id(im_end)
    template = folder_template(folder) or (chat_template(tokenizer) if is_chat else None)
    if template is not None:
        writer.add_chat_template(template)
    if tokenizer.default_system is not None:
        writer.add_string(DEFAULT_SYSTEM_KEY, tokenizer.default_system)


def is_chat_folder(folder: Path) -> bool:
    """Whether tokenizer_config.json, tokenizer.json or a chat template names `<|im_end|>`."""
    for name in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
        if (folder / name).is_file() and _IM_END in (folder / name).read_text(encoding="utf-8"):
            return True
    return False


def folder_template(folder: Path) -> str | None:
    """The chat template of a folder, from chat_template.jinja or tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _add_sentencepiece(
    writer: GGUFWriter, tokenizer: Tokenizer, backend: SentencePieceBackend, num_rows: int
) -> None:
    names = tokenizer.specials.names
    tokens: list[str] = []
    types: list[int] = []
    for i, piece in enumerate(backend.model.pieces):
        name = names.get(i, piece.text)
        tokens.append(NUL_NAME if name == "\0" else name)
        if name.startswith("[UNUSED_TOKEN_"):
            types.append(UNUSED)  # never matched in text
        else:
            # Types are numbered alike. A marker is control, so that text which spells it stays text.
            types.append(TokenType.CONTROL if i in names and name != piece.text else piece.kind)
    scores = [piece.score for piece in backend.model.pieces]
    _pad(tokens, types, num_rows)
    scores += [0.0] * (num_rows - len(scores))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(backend.model.add_dummy_prefix)
    unknown = next((i for i, kind in enumerate(types) if kind == TokenType.UNKNOWN), None)
    if unknown is not None:
        writer.add_unk_token_id(unknown)


def _add_byte_level(writer: GGUFWriter, tokenizer: Tokenizer, folder: Path, num_rows: int) -> None:
    data = read_json(folder / "tokenizer.json")
    model, added = data.get("model"), data.get("added_tokens")
    if not isinstance(model, Mapping) or not isinstance(added, list) or "ByteLevel" not in json.dumps(data):
        raise ExportError(
            f"{folder / 'tokenizer.json'} is no byte-level BPE, and without tokenizer.model GGUF cannot "
            "hold it. Copy "
            "the model's tokenizer.model into the folder."
        )
    tokens = list(tokenizer.backend.tokens)
    types = [int(TokenType.NORMAL if token else TokenType.UNUSED) for token in tokens]
    for token in added:
        types[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    tokens = [token or f"[PAD{i}]" for i, token in enumerate(tokens)]
    _pad(tokens, types, num_rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_name(data, folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    )
    writer.add_add_space_prefix(False)


def _pre_name(data: Mapping[str, object], folder: Path) -> str:
    """llama.cpp's name for the pre-tokenizer: as the folder says, or the known one that is written alike."""
    if (folder / "tokenizer_config.json").is_file():
        said = read_json(folder / "tokenizer_config.json").get("gguf_pre")
        if isinstance(said, str):
            return said
    for name in _PRE_TOKENIZERS:
        if json.loads(byte_level_bpe_json([], [], [], name))["pre_tokenizer"] == data.get("pre_tokenizer"):
            return name
    raise ExportError(
        f"{folder / 'tokenizer.json'}: llama.cpp's name for this pre-tokenizer is not known. Add it as "
        '"gguf_pre" to '
        f"tokenizer_config.json (known by structure: {', '.join(_PRE_TOKENIZERS)})."
    )


def _pad(tokens: list[str], types: list[int], num_rows: int) -> None:
    """Name the rows of the embedding that no token has."""
    for i in range(len(tokens), num_rows):
        tokens.append(f"[PAD{i}]")
        types.append(int(TokenType.UNUSED))
