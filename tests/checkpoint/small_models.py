"""Small checkpoints in memory, for the tests of the formats."""

import json
import shutil
from pathlib import Path

import torch

from goldens import DATA
from internlm2.checkpoint.formats.official import ModelCheckpoint
from internlm2.model.config import ModelConfig
from internlm2.model.heads import build_model

ALPHABET = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(256, 324))]
SMOLLM = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def small_config(**changes) -> ModelConfig:
    """Odd sizes: three queries a group, and feed-forward rows that no block of 32 divides."""
    shape = {
        "vocab_size": 90,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**(shape | changes))


def random_checkpoint(config: ModelConfig, *, tokenizer_folder: Path | None = None) -> ModelCheckpoint:
    model = build_model(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return ModelCheckpoint(model, tokenizer_folder=tokenizer_folder)


def assert_same_model(found, expected) -> None:
    """Equal shapes, dtypes and bits of every tensor, and the same network."""
    assert found.config == expected.config
    assert set(found.tensors) == set(expected.tensors)
    for name in expected.tensors:
        tensor, want = found.read(name), expected.read(name)
        assert tensor.dtype == want.dtype == found.tensors[name].dtype, name
        assert tuple(tensor.shape) == found.tensors[name].shape, name
        assert torch.equal(tensor, want), name


def chat_tokenizer(parent: Path) -> Path:
    """A new folder with InternLM2's tokenizer, as chat models have it."""
    folder = parent / "tokenizer-of-a-chat-model"
    folder.mkdir()
    shutil.copy(DATA / "tokenizer" / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text(
        '{"add_bos_token": true, "bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": '
        '{"92543": {"content": "<|im_start|>"}, "92542": {"content": "<|im_end|>"}}}'
    )
    return folder


def byte_level_folder(parent: Path, *, pre_tokenizer: dict = SMOLLM, gguf_pre: str | None = None) -> Path:
    """A byte-level BPE of 256 bytes, one merge and two special tokens."""
    tokens = [*ALPHABET, "ab", "<|im_end|>"]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data = {
        "version": "1.0",
        "added_tokens": [{"id": 257, "content": "<|im_end|>", **added}],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": ["a b"],
        },
    }
    folder = parent / "byte-level"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = {"eos_token": "<|im_end|>"} | ({"gguf_pre": gguf_pre} if gguf_pre else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
