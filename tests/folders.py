"""Small folders that tests talk to."""

import json
from pathlib import Path

import torch

from internlm2.checkpoint.formats.official import ModelCheckpoint
from internlm2.checkpoint.save import save_checkpoint
from internlm2.model import ModelConfig, RopeScaling, build_model
from internlm2.model.config import Head

MARKERS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer_json() -> dict[str, object]:
    """A tokenizer.json whose ordinary tokens are the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*MARKERS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKERS)
    return json.loads(tokenizer.to_str())


def write_chat_folder(folder: Path, *, vocab_size: int = 512, head: Head = "language") -> Path:
    """A random chat model over bytes, in the official layout, that can answer at any length."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_scaling=RopeScaling("dynamic", 2.0),
        head=head,
        reward_token_id=510,
    )
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(ModelCheckpoint(model), folder)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "add_bos_token": True})
    )  # fmt: skip
    return folder


def write_adapter(folder: Path) -> Path:
    """A random LoRA adapter for `write_chat_folder`, in PEFT's layout, strong enough to change answers."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    name = "base_model.model.model.layers.{layer}.attention.wo.lora_{part}.weight"
    tensors = {
        name.format(layer=layer, part=part): torch.randn(shape, generator=generator)
        for layer in range(2)
        for part, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["wo"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
