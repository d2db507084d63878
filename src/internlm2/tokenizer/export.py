"""Writes tokenizers for other programs: tokenizer.json, and folders that transformers opens without our code.

The exported file gives sentencepiece's ids; docs/tokenizer.md says what is proven. One thing is not ours
to choose: transformers reads special tokens spelled in user text as control tokens, our `encode` does not.
"""

import json
from pathlib import Path

from internlm2 import files
from internlm2.tokenizer.bpe_json import byte_level_bpe_json, tokenizer_json
from internlm2.tokenizer.model_file import UNKNOWN
from internlm2.tokenizer.sentencepiece_backend import SentencePieceBackend
from internlm2.tokenizer.special import IM_END, IM_START
from internlm2.tokenizer.tokenizer import Tokenizer

__all__ = ["byte_level_bpe_json", "chat_template", "save_tokenizer", "tokenizer_json"]


def chat_template(tokenizer: Tokenizer) -> str | None:
    """A Jinja template equal to `render_chat` for messages of role and text, without tools."""
    if IM_START not in tokenizer.specials.ids or IM_END not in tokenizer.specials.ids:
        return None
    template = "" if tokenizer.bos_id is None else "{{ bos_token }}"
    if tokenizer.default_system is not None:
        turn = json.dumps(f"{IM_START}system\n{tokenizer.default_system}{IM_END}\n", ensure_ascii=False)
        template += "{% if messages[0]['role'] != 'system' %}{{ " + turn + " }}{% endif %}"
    return template + (
        "{% for message in messages %}"
        "{{ '" + IM_START + "' + message['role'] + '\\n' + message['content'] + '" + IM_END + "' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '" + IM_START + "assistant\\n' }}{% endif %}"
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, for_transformers: bool) -> None:
    """Write the tokenizer files of a model folder.

    for_transformers: leave out tokenizer.model, so that transformers has one source only.
    Raises ExportError when the folder cannot be written or the vocabulary cannot be expressed.
    """

    def name(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.id_to_token(token_id)

    backend = tokenizer.backend
    unknown = None
    if isinstance(backend, SentencePieceBackend):
        unknown = next((p.text for p in backend.model.pieces if p.kind == UNKNOWN), None)
        if not for_transformers:
            files.write_bytes(folder / "tokenizer.model", backend.content)
    content = tokenizer_json(tokenizer)
    files.write_text(folder / "tokenizer.json", content)
    roles = {
        "bos_token": name(tokenizer.bos_id),
        "eos_token": name(tokenizer.eos_id),
        "pad_token": name(tokenizer.pad_id),
        "unk_token": unknown,
    }
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "add_bos_token": tokenizer.bos_id is not None,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in json.loads(content)["added_tokens"]
        },
    }
    template = chat_template(tokenizer)
    if template is not None:
        config["chat_template"] = template
    if tokenizer.default_system is not None:
        config["default_system_prompt"] = tokenizer.default_system
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", {key: token for key, token in roles.items() if token})


def _write_json(path: Path, data: dict[str, object]) -> None:
    files.write_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")
