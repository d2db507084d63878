"""The models and messages of test_tensor.py, made alike in the test and in its processes."""

import torch

from internlm2.model import CausalLM, Model, ModelConfig, RopeScaling, build_model
from internlm2.model.attention import AttentionMeta, sdpa

# Odd sizes: feed-forward rows and vocabularies that two does not divide, heads wider than C / H.
_ODD = ModelConfig(
    vocab_size=91,
    hidden_size=40,
    intermediate_size=37,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)


def _odd(**changes) -> ModelConfig:
    return ModelConfig(**({field: getattr(_ODD, field) for field in _ODD.__dataclass_fields__} | changes))


CONFIGS = {
    "plain": _odd(),
    "bias": _odd(bias=True),
    "tied": _odd(tie_word_embeddings=True),
    "bias-tied-four-heads": _odd(
        bias=True, tie_word_embeddings=True, num_attention_heads=4, num_key_value_heads=4
    ),
    "even-vocabulary-four-heads": _odd(vocab_size=90, num_attention_heads=8, num_key_value_heads=4),
    "dynamic-rope": _odd(rope_scaling=RopeScaling("dynamic", 2.0), max_position_embeddings=16),
    "reward": _odd(head="reward", reward_token_id=90),
    "value": _odd(head="value", bias=True),
    "classification": _odd(head="classification", num_labels=3),
}
GOLDENS = ["gqa", "mha", "six-groups", "dynamic-ntk-factor3", "reward"]


def random_model(config: ModelConfig) -> Model:
    """Every parameter drawn, norms and biases too, so that none can be left out unnoticed."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def ids(config: ModelConfig) -> torch.Tensor:
    return torch.randint(3, config.vocab_size, (3, 23), generator=torch.Generator().manual_seed(5))


class SmallCache:
    """Keys and values of one batch, in a block made from the config that a model says it has."""

    def __init__(self, config: ModelConfig, *, batch: int, num_slots: int) -> None:
        shape = (config.num_hidden_layers, batch, num_slots, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.num_done = 0

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta
    ) -> torch.Tensor:
        end = self.num_done + k.shape[1]
        keys, values = self.keys[meta.layer, :, :end], self.values[meta.layer, :, :end]  # (B, S, K, D)
        assert keys[:, self.num_done :].shape == k.shape
        keys[:, self.num_done :], values[:, self.num_done :] = k, v
        return sdpa(q, keys, values, scale=meta.scale, is_causal=self.num_done == 0 and end > 1)


def greedy_tokens(model: CausalLM, prompt: torch.Tensor, *, num_tokens: int) -> torch.Tensor:
    """prompt: (B, T) -> the most likely continuations (B, num_tokens), decoded with a cache."""
    batch, length = prompt.shape
    cache = SmallCache(model.config, batch=batch, num_slots=length + num_tokens)
    limits = torch.full((batch,), length + num_tokens)
    chosen, new = [], prompt
    for _ in range(num_tokens):
        positions = torch.arange(cache.num_done, cache.num_done + new.shape[1]).expand_as(new)
        logits = model(new, position_ids=positions, length_limits=limits, attend=cache, logits_to_keep=1)
        cache.num_done += new.shape[1]
        new = logits.argmax(-1)  # (B, 1)
        chosen.append(new)
    return torch.cat(chosen, dim=1)


MESSAGES = [
    [torch.arange(5), torch.tensor([[0.5, -1.0, torch.inf]])],
    [],
    [torch.empty(0, dtype=torch.int64), torch.empty(2, 0), torch.arange(3, dtype=torch.int32)],
    [torch.arange(6000).view(60, 100).t(), torch.arange(7).float(), torch.tensor([-(2**63), 2**63 - 1])],
    [torch.arange(2048 - 1 - 4)],  # fills the first broadcast to its last word
    [torch.arange(2048 - 1 - 4 + 1)],
    [torch.arange(n) for n in range(300)],
]
