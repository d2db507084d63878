"""One model on several devices: parallelism applied from outside, the network does not know of it."""

from internlm2.parallel.group import TensorGroup, free_address
from internlm2.parallel.message import receive_tensors, send_tensors
from internlm2.parallel.tensor import ShardPlan, apply, local_config, shard_plan

__all__ = [
    "ShardPlan",
    "TensorGroup",
    "apply",
    "free_address",
    "local_config",
    "receive_tensors",
    "send_tensors",
    "shard_plan",
]
