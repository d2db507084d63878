"""Attention over pages and whole decoding steps beside the memory: what `kernels.py` measures besides products."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from sampling_beside_memory import Meter, Samples
from torch import nn

from internlm2.engine.compute import attend, runner
from internlm2.engine.compute.attend import KernelAttend, PagedAttend, table_of
from internlm2.engine.compute.batch import Batch, Part, make_batch
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.kernels import PackedWeight
from internlm2.kernels.packed import allocate
from internlm2.model.attention import AttentionMeta
from internlm2.model.config import ModelConfig, preset
from internlm2.model.heads import CausalLM
from internlm2.quant.linear import PackedFeedForward, PackedLinear

CPU = torch.device("cpu")
PAGE = 16
Shape = tuple[int, int, bool]  # rows, columns, gated


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """sequences of so many keys with so many new rows each, over `num_layers` layers of the 1.8B shape."""

    name: str
    num_keys: int
    num_rows: int
    num_sequences: int
    num_layers: int


ATTENTION_CASES = (
    AttentionCase("1 decodes, 512 keys", 512, 1, 1, 24),
    AttentionCase("1 decodes, 32,768 keys", 32768, 1, 1, 1),
    AttentionCase("8 decode, 1,024 keys", 1024, 1, 8, 6),
    AttentionCase("512 rows of a prompt, 2,048 keys", 2048, 512, 1, 1),
)


def attention_rows(meter: Meter) -> Iterator[str]:
    """Lines of the attention table."""
    config = preset("1.8b")
    for kv_name, dtype, kv_dtype in (
        ("float32", torch.float32, None),
        ("bfloat16", torch.bfloat16, None),
        ("int8", torch.bfloat16, "int8"),
    ):
        for case in ATTENTION_CASES:
            yield f"| {kv_name} | {case.name} | {_attention_row(meter, config, case, dtype=dtype, kv_dtype=kv_dtype)}"


def _attention_row(
    meter: Meter, config: ModelConfig, case: AttentionCase, *, dtype: torch.dtype, kv_dtype: str | None
) -> str:
    config = dataclasses.replace(config, num_hidden_layers=case.num_layers)
    pages_each = -(-case.num_keys // PAGE)
    cache = PageCache(
        config,
        num_pages=pages_each * case.num_sequences,
        page_size=PAGE,
        dtype=dtype,
        device=CPU,
        kv_dtype=kv_dtype,
    )
    for block in (cache.keys, cache.values):  # touched, and no numbers that slow anything down
        block.random_(-3, 4)
    if kv_dtype is not None:
        cache.key_scales.fill_(0.01), cache.value_scales.fill_(0.01)
    batch = _batch(case.num_sequences, case.num_keys, case.num_rows)
    count = case.num_rows * case.num_sequences
    q = torch.randn(count, 1, config.num_attention_heads, config.head_dim).to(dtype)
    k, v = torch.randn(2, count, 1, config.num_key_value_heads, config.head_dim).to(dtype)
    assert cache.pages is not None
    ours, theirs = KernelAttend(cache.pages, table_of(batch, cache.pages)), PagedAttend(cache, batch)

    def run(function: KernelAttend | PagedAttend) -> None:
        for layer in range(case.num_layers):
            function(q, k, v, AttentionMeta(layer, config.head_dim**-0.5))

    with torch.inference_mode():
        samples = meter.measure([lambda: run(ours), lambda: run(theirs)])
    if not samples.is_enough:
        return f"{_too_loud(samples)} | | | |"
    num_bytes = cache.num_bytes  # all of it is read
    seen = sum(range(case.num_keys - case.num_rows + 1, case.num_keys + 1)) * case.num_sequences
    operations = 4 * seen * config.num_attention_heads * config.head_dim * case.num_layers
    seconds = samples.seconds()
    return (
        f"{num_bytes / seconds / 1e9:.1f} | {samples.share(num_bytes)} | "
        f"{operations / seconds / 1e9:.0f} | {samples.ratio()} |"
    )


def decoding_rows(
    meter: Meter, name: str, models: dict[str, Callable[[], CausalLM]], *, context: int, num_steps: int
) -> Iterator[str]:
    """Lines of the table of decoding steps: forward, logits and the largest of them, for one sequence."""
    for kind, make in models.items():
        model = make()
        num_pages = -(-(context + num_steps) // PAGE)
        cache = PageCache(model.config, num_pages=num_pages, page_size=PAGE, dtype=torch.bfloat16, device=CPU)
        for block in (cache.keys, cache.values):
            block.random_(-1, 2)
        fused = Runner(model, cache)
        with _module_by_module():
            modules = Runner(model, cache)

        def by_modules(run: Runner = modules) -> None:
            with _module_by_module():
                _decode(run, context, num_steps)

        samples = meter.measure([lambda run=fused: _decode(run, context, num_steps), by_modules])
        if not samples.is_enough:
            yield f"| {name} | {kind} | {_too_loud(samples)} | | | |"
            continue
        kv_bytes = cache.num_bytes * context // (num_pages * PAGE)
        num_bytes = (_weight_bytes(model) + kv_bytes) * num_steps
        yield (
            f"| {name} | {kind} | {num_steps / samples.seconds():.1f} | {num_bytes / num_steps / 1e6:.0f} | "
            f"{samples.share(num_bytes)} | {samples.ratio()} |"
        )


def _decode(run: Runner, context: int, num_steps: int) -> None:
    token = 5
    for position in range(context, context + num_steps):
        hidden = run.forward(_batch(1, position + 1, 1, token))
        token = int(run.logits(hidden)[0].argmax())


@contextmanager
def _module_by_module() -> Iterator[None]:
    """Without the attention kernel and without all layers in one call: packed linears in the plain network."""
    with (
        mock.patch.object(runner, "packed_layers", return_value=None),
        mock.patch.object(attend, "library", return_value=None),
    ):
        yield


def random_packed_model(
    config: ModelConfig,
    make: Callable[[int, int, bool], PackedWeight],
    head: Callable[[int, int, bool], PackedWeight],
) -> CausalLM:
    """Random packed weights: those of all layers have the same values, each in memory of its own."""
    with torch.device("meta"):
        model = CausalLM(config)
    size, wide = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    shapes = {"wqkv": (config.qkv_size, size, False), "wo": (size, queries, False), "w13": (wide, size, True)}
    shapes["w2"] = (size, wide, False)
    one = {name: make(*shape) for name, shape in shapes.items()}
    for layer in model.model.layers:
        own = {name: _copy(weight) for name, weight in one.items()}
        layer.attention.add_module("wqkv", PackedLinear(own["wqkv"]))
        layer.attention.add_module("wo", PackedLinear(own["wo"]))
        layer.add_module("feed_forward", PackedFeedForward(own["w13"], own["w2"]))
    model.output = PackedLinear(head(config.vocab_size, size, False), out_dtype=torch.float32)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0.0, 1.0)
    return model.eval()


def _copy(weight: PackedWeight) -> PackedWeight:
    data = allocate(len(weight.data))
    data.copy_(weight.data)
    return dataclasses.replace(weight, data=data)


def _weight_bytes(model: nn.Module) -> int:
    return sum(module.packed.num_bytes for module in model.modules() if isinstance(module, PackedLinear))


def _batch(num_sequences: int, num_keys: int, num_rows: int, token: int = 5) -> Batch:
    pages = -(-num_keys // PAGE)
    parts = [
        Part([token] * num_rows, num_keys - num_rows, range(i * pages, (i + 1) * pages), num_keys)
        for i in range(num_sequences)
    ]
    return make_batch(parts, page_size=PAGE, device=CPU)


def _too_loud(samples: Samples) -> str:
    count = len(samples.each[0])
    return f"too loud: {count} quiet samples of {count + samples.num_dropped}"
