"""What llama.cpp calls things: tensor names, number formats, metadata keys. Source: gguf-py and llama.cpp's
src/models/internlm2.cpp and conversion/internlm.py.

Two architectures hold our network. `internlm2` is what llama.cpp's own converter writes for InternLM2; it has
no biases, no tied output and no head width of its own, so models with one of these are written as `llama`.
"""

from gguf import GGMLQuantizationType as Quant

from internlm2.checkpoint.formats.names import NameTable
from internlm2.model.config import ModelConfig

ARCHITECTURES = ("internlm2", "llama")

GGUF_NAMES = NameTable(
    outer={
        "model.tok_embeddings.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "output.weight": "output.weight",
    },
    layer_prefix="blk.{}.",
    inner={
        "attention_norm": ("attn_norm",),
        "attention.wqkv": ("attn_q", "attn_k", "attn_v"),
        "attention.wo": ("attn_output",),
        "ffn_norm": ("ffn_norm",),
        "feed_forward.w1": ("ffn_gate",),
        "feed_forward.w3": ("ffn_up",),
        "feed_forward.w2": ("ffn_down",),
    },
)

FLOATS = (Quant.F32, Quant.F16, Quant.BF16)
# Everything that gguf can turn back into floats and that people publish models in.
QUANTISED = (
    Quant.Q8_0,
    Quant.Q4_0,
    Quant.Q4_1,
    Quant.Q5_0,
    Quant.Q5_1,
    Quant.Q2_K,
    Quant.Q3_K,
    Quant.Q4_K,
    Quant.Q5_K,
    Quant.Q6_K,
    Quant.IQ4_NL,
    Quant.IQ4_XS,
)

# NOTE: llama.cpp knows no dynamic scaling and stops at a rope.scaling.type that it does not know, so the
# factor has a key of its own. llama.cpp ignores it: exact up to the trained length, unscaled beyond.
DYNAMIC_FACTOR_KEY = "internlm2.rope.dynamic_ntk_factor"
DEFAULT_SYSTEM_KEY = "internlm2.chat.default_system_prompt"


def choose_architecture(config: ModelConfig) -> str:
    """ "internlm2", or "llama" for what llama.cpp's internlm2 cannot hold."""
    own_width = config.head_dim * config.num_attention_heads != config.hidden_size
    return "llama" if config.bias or config.tie_word_embeddings or own_width else "internlm2"
