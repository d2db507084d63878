"""A folder laid out as the official ones of 2024: real tokenizer, random weights, Python files that bite."""

import json
import shutil
from pathlib import Path

import torch

from internlm2.checkpoint.formats.official import ModelCheckpoint
from internlm2.checkpoint.save import save_checkpoint
from internlm2.model import ModelConfig, RopeScaling, build_model

DATA = Path(__file__).parent / "data"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKERS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}
# Every Python file that some release carried, and the hook that transformers itself would run.
CODE_FILES = [
    f"{kind}_internlm{generation}.py"
    for generation in ("", "2")
    for kind in ("configuration", "modeling", "tokenization")
] + ["tokenization_internlm2_fast.py", "custom_generate/generate.py"]


def write_official_folder(folder: Path, *, early: bool = False) -> Path:
    """A tiny chat model. early: as in the first days, when markers and files had other names."""
    config = ModelConfig(
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_scaling=RopeScaling("dynamic", 2.0),
        initializer_range=0.2,
    )
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(ModelCheckpoint(model.half()), folder)
    shutil.copy(DATA / "tokenizer" / "tokenizer.model", folder)
    generation = "internlm" if early else "internlm2"
    data = json.loads((folder / "config.json").read_text())
    data["model_type"] = generation
    data["auto_map"] = {
        "AutoConfig": f"configuration_{generation}.InternLM2Config",
        "AutoModelForCausalLM": f"modeling_{generation}.InternLM2ForCausalLM",
        "AutoModel": f"modeling_{generation}.InternLM2ForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(generation, early=early)))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": [2, 92542], "pad_token_id": 2})
    )
    _set_traps(folder)
    return folder


def _tokenizer_config(generation: str, *, early: bool) -> dict[str, object]:
    fast = None if early else f"tokenization_{generation}_fast.InternLM2TokenizerFast"
    data: dict[str, object] = {
        "auto_map": {"AutoTokenizer": [f"tokenization_{generation}.InternLM2Tokenizer", fast]},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "</s>",
        "tokenizer_class": "InternLMTokenizer" if early else "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    if early:
        old = TEMPLATE.removeprefix("{{ bos_token }}")
        for new, spelling in (("<|im_start|>", "[UNUSED_TOKEN_146]"), ("<|im_end|>", "[UNUSED_TOKEN_145]")):
            old = old.replace(new, spelling)
        return data | {"chat_template": old}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return data | {
        "added_tokens_decoder": {str(i): {"content": text, **flags} for i, text in MARKERS.items()},
        "additional_special_tokens": [text for i, text in MARKERS.items() if i > 2],
        "chat_template": TEMPLATE,
        "decode_with_prefix_space": False,
        "sp_model_kwargs": None,
    }


def _set_traps(folder: Path) -> None:
    for name in CODE_FILES:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            "import pathlib\n"
            f"pathlib.Path({str(folder / 'EXECUTED')!r}).write_text({name!r})\n"
            f"raise RuntimeError('{name} was executed')\n"
        )
