"""Tensor parallelism for inference (Megatron-LM, arXiv 1909.08053), put on a model from outside.

Every process holds some of the key/value heads with their queries, some feed-forward rows and some rows of the
language head. Two sums a layer and one gather of the logits make every process's result the whole model's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from internlm2.errors import ConfigError
from internlm2.model.config import ModelConfig
from internlm2.model.heads import CausalLM, Model
from internlm2.model.layers import DecoderLayer
from internlm2.parallel.group import TensorGroup

Shape = tuple[int, ...]

_ROWS, _COLUMNS = 0, 1
_SPLIT_IN_LAYER = {
    "attention.wqkv.weight": _ROWS,  # whole key/value heads with their queries
    "attention.wqkv.bias": _ROWS,
    "attention.wo.weight": _COLUMNS,
    "feed_forward.w1.weight": _ROWS,
    "feed_forward.w3.weight": _ROWS,
    "feed_forward.w2.weight": _COLUMNS,
}


@dataclass(frozen=True)
class ShardPlan:
    """What each of `size` processes holds.

    dimensions: official name -> the dimension that is split; what is not named here every process holds whole.
    Where a dimension is no multiple of `size`, some processes hold one row more than others.
    """

    size: int
    dimensions: Mapping[str, int]

    def local_shape(self, name: str, shape: Shape, *, rank: int) -> Shape:
        """The shape of a rank's part of the tensor `name`, which has `shape` in the checkpoint."""
        if name not in self.dimensions:
            return shape
        dim = self.dimensions[name]
        rows = share(shape[dim], self.size, rank=rank)
        return (*shape[:dim], rows.stop - rows.start, *shape[dim + 1 :])

    def local_shapes(self, shapes: Mapping[str, Shape], *, rank: int) -> dict[str, Shape]:
        """`local_shape` of every tensor. shapes: as `checkpoint.source.expected_shapes` gives them."""
        return {name: self.local_shape(name, shape, rank=rank) for name, shape in shapes.items()}

    def take(self, name: str, tensor: torch.Tensor, *, rank: int) -> torch.Tensor:
        """A rank's part of the whole tensor `name`: a copy of the part, or `tensor` itself when it is not split.

        A copy, so that the rest of the tensor can be dropped.
        """
        if name not in self.dimensions:
            return tensor
        dim = self.dimensions[name]
        rows = share(tensor.shape[dim], self.size, rank=rank)
        part = tensor.narrow(dim, rows.start, rows.stop - rows.start)
        return part.clone(memory_format=torch.contiguous_format)


def share(length: int, size: int, *, rank: int) -> slice:
    """The rows of `length` that fall to a rank; the parts of all ranks differ by one row at most."""
    return slice(length * rank // size, length * (rank + 1) // size)


def shard_plan(config: ModelConfig, size: int) -> ShardPlan:
    """How a model is split over `size` processes.

    Raises ConfigError when its key/value heads cannot be shared out evenly.
    """
    groups = config.num_key_value_heads
    if size < 1 or groups % size:
        sizes = [str(n) for n in range(1, groups + 1) if groups % n == 0]
        raise ConfigError(
            f"The model has {groups} key/value heads, which cannot be shared out evenly over {size} processes. "
            f"Choose {_either(sizes)}."
        )
    dimensions = {
        f"model.layers.{layer}.{name}": dim
        for layer in range(config.num_hidden_layers)
        for name, dim in _SPLIT_IN_LAYER.items()
        if config.bias or not name.endswith(".bias")
    }
    if config.head == "language" and not config.tie_word_embeddings:
        dimensions["output.weight"] = _ROWS
    return ShardPlan(size, dimensions)


def local_config(config: ModelConfig, size: int) -> ModelConfig:
    """The same model with the query and key/value heads of one process: what its key/value cache is built from.

    head_dim and all other values stay those of the whole model. Raises ConfigError as `shard_plan` does.
    """
    shard_plan(config, size)
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=config.num_key_value_heads // size,
    )


def apply(model: Model, group: TensorGroup) -> None:
    """Turn `model`, on the meta device or with its weights, into this process's part of it, in place.

    Names stay. `model.config` becomes the `local_config`, so that a cache built from it has this process's heads;
    hidden states, logits, rewards and values stay whole, with equal bits in every process. For inference:
    gradients are switched off. Raises ConfigError as `shard_plan` does.
    """
    whole = model.config
    plan = shard_plan(whole, group.size)
    for name in list(model.parameters_by_checkpoint_name()):
        module_name, _, leaf = name.rpartition(".")
        part = plan.take(name, model.get_parameter(name).detach(), rank=group.rank)
        setattr(model.get_submodule(module_name), leaf, nn.Parameter(part))
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        attention, feed_forward = layer.attention, layer.feed_forward
        assert not isinstance(attention.wo, SummedLinear), "this model is split already"
        attention.num_key_value_heads //= group.size
        for linear in (attention.wqkv, feed_forward.w1, feed_forward.w3):
            linear.out_features = linear.weight.shape[0]
        attention.wo = SummedLinear(attention.wo, group)
        feed_forward.w2 = SummedLinear(feed_forward.w2, group)
    if isinstance(model, CausalLM):
        model.output = _split_head(model, group)
    model.config = model.model.config = local_config(whole, group.size)
    model.requires_grad_(False)


class SummedLinear(nn.Linear):
    """A linear of which every process has some input columns: the products are summed, then the bias is added."""

    def __init__(self, linear: nn.Linear, group: TensorGroup) -> None:
        num_out, num_in = linear.weight.shape
        super().__init__(num_in, num_out, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (nn.Linear's word)
        """input: (B, T, this process's columns) -> (B, T, C), the same in every process."""
        out = self._group.all_reduce(F.linear(input, self.weight))
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Linear):
    """A linear of which every process has some output rows: the results of all of them, joined.

    linear: this process's rows. num_rows: of all processes.
    """

    def __init__(self, linear: nn.Linear, group: TensorGroup, *, num_rows: int) -> None:
        num_out, num_in = linear.weight.shape
        super().__init__(num_in, num_out, bias=False, device="meta")
        self.weight = linear.weight
        self._group = group
        self._widths = _widths(num_rows, group.size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (nn.Linear's word)
        """input: (B, T, C) -> (B, T, V), the same in every process."""
        return self._group.all_gather(F.linear(input, self.weight), self._widths)


class TiedHead(nn.Module):
    """The language head that is the embedding: every process multiplies by its own rows, without a copy of them."""

    def __init__(self, embedding: nn.Embedding, group: TensorGroup) -> None:
        super().__init__()
        self._group = group
        self._widths = _widths(embedding.num_embeddings, group.size)
        rows = share(embedding.num_embeddings, group.size, rank=group.rank)
        # NOTE: a closure, for a module or parameter kept here would be found under a second name.
        self._weight = lambda: embedding.weight[rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, V), the same in every process."""
        return self._group.all_gather(F.linear(x, self._weight()), self._widths)


def _split_head(model: CausalLM, group: TensorGroup) -> nn.Module:
    if model.output is None:
        return TiedHead(model.model.tok_embeddings, group)
    assert isinstance(model.output, nn.Linear)
    return GatheredLinear(model.output, group, num_rows=model.config.vocab_size)


def _widths(num_rows: int, size: int) -> list[int]:
    shares = [share(num_rows, size, rank=rank) for rank in range(size)]
    return [rows.stop - rows.start for rows in shares]


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
