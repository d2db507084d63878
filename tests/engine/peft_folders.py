"""Adapter folders, written by PEFT itself."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import internlm2.hf  # noqa: F401 - registers the classes

LAYER_MODULES = ["wqkv", "wo", "w1", "w2", "w3"]


def hf_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def peft_adapter(base, folder, *, seed=0, **options):
    """Save an adapter with random A and B; return the model that peft makes of it."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": LAYER_MODULES} | options
    model = get_peft_model(hf_model(base), LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.save_pretrained(folder)
    return model
