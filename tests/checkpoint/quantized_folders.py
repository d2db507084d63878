"""Small quantised folders, and ways to spoil them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from internlm2.checkpoint.formats.official import ModelCheckpoint
from internlm2.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from internlm2.model.config import ModelConfig
from internlm2.model.heads import build_model

IDS = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(1))
WORD = "model.layers.0.mlp.up_proj.weight"


def tiny(**changes) -> ModelCheckpoint:
    shape = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bias": True,
        "reward_token_id": 298,
    }  # fmt: skip
    model = build_model(ModelConfig(**(shape | changes)))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return ModelCheckpoint(model)


def write(folder: Path, checkpoint: ModelCheckpoint | None = None, **options) -> Path:
    chosen = QuantizeOptions(**({"kind": "int4", "method": "rtn"} | options))
    quantize_checkpoint(checkpoint or tiny(), folder, chosen, text=IDS)
    return folder


def edit_config(folder: Path, change) -> None:
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
