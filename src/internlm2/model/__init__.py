"""The network as mathematics: shapes and weights, no files, no caches, no devices."""

from internlm2.model.config import ModelConfig, RopeScaling, preset
from internlm2.model.heads import (
    CausalLM,
    Model,
    RewardModel,
    RopeMode,
    SequenceClassifier,
    ValueModel,
    build_model,
)
from internlm2.model.transformer import Transformer

__all__ = [
    "CausalLM",
    "Model",
    "ModelConfig",
    "RewardModel",
    "RopeMode",
    "RopeScaling",
    "SequenceClassifier",
    "Transformer",
    "ValueModel",
    "build_model",
    "preset",
]
