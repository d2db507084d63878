"""Small vocabularies made on the spot, of other kinds than InternLM2's."""

import io
import json
from pathlib import Path

import sentencepiece

from internlm2.tokenizer import export
from internlm2.tokenizer.tokenizers_backend import byte_level_alphabet

DATA = Path(__file__).parents[1] / "data" / "tokenizer"


def byte_level_folder(folder: Path, **config: object) -> Path:
    """A byte-level BPE folder in SmolLM2's manner: three control tokens, no start token."""
    alphabet = list(byte_level_alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "1 2", "ä ½", "ä½ ł"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, *(m.replace(" ", "") for m in merges)]
    types = [3, 3, 3] + [1] * (len(tokens) - 3)
    tokens.append("<tool_call>")
    types.append(4)
    (folder / "tokenizer.json").write_text(
        export.byte_level_bpe_json(tokens, merges, types, "smollm"), encoding="utf-8"
    )
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def tiny_model(**options: object) -> bytes:
    """A sentencepiece model trained on a few lines, with other options than InternLM2's."""
    lines = ["hello world", "hello there, world 12", "你好 世界 hello", "a b c d e f g h"] * 20
    model = io.BytesIO()
    settings = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, hard_vocab_limit=False, **settings
    )
    return model.getvalue()
