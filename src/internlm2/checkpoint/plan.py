"""What a context will cost, before anything runs: memory, FLOPs, bytes read. Exact integers from the shapes alone.

FLOPs are those of matrix products, two for each multiply-add; causal attention is counted over the keys that a
query sees. Memory is what our own network holds at its peak; the interpreter and torch come on top.
"""

import math
from dataclasses import dataclass

from internlm2.checkpoint import memory
from internlm2.checkpoint.source import expected_shapes, parse_dtype
from internlm2.errors import check
from internlm2.model.config import MAX_SIZE, ModelConfig
from internlm2.parallel.tensor import local_config, shard_plan

PAGE_TOKENS = 16
PREFILL_CHUNK_TOKENS = 512
KV_DTYPES = ("float32", "bfloat16", "float16", "int8")
# One float32 for each token and key/value head, for keys and for values.
INT8_SCALE_BYTES = 4
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """What `num_sequences` sequences of `num_tokens` tokens need.

    Bytes are those of the fullest rank, FLOPs those of all ranks together. weight_bytes, kv_bytes (all sequences) and
    activation_bytes (one prefill chunk) add up to total_bytes. The FLOPs are of one sequence: `prefill_*` of the
    whole prompt with the logits of its last position, `decode_*` of the token at position `num_tokens`, which sees
    all of them. decode_read_bytes: what that token reads when it is decoded alone: the weights without the embedding
    table, and the keys and values.
    """

    num_tokens: int
    num_sequences: int
    dtype: str
    kv_dtype: str
    chunk_tokens: int
    tensor_parallel: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    activation_bytes: int
    total_bytes: int
    prefill_linear_flops: int
    prefill_attention_flops: int
    decode_linear_flops: int
    decode_attention_flops: int
    decode_read_bytes: int


def plan(
    config: ModelConfig,
    *,
    num_tokens: int,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    num_sequences: int = 1,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    tensor_parallel: int = 1,
) -> Plan:
    """Plan a run.

    num_tokens: prompt plus answer of one sequence. dtype: of weights and activations. kv_dtype: of keys and values,
    "int8" or a float dtype; None: `dtype`. chunk_tokens: tokens in one prefill chunk, all sequences together.
    tensor_parallel: ranks that hold the model together.
    Raises RequestError, CheckpointError, ConfigError.

    >>> plan(PRESETS["7b"], num_tokens=200_000).kv_bytes
    26214400000
    """
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    check_options(num_tokens=num_tokens, dtype=dtype, kv_dtype=kv_dtype, num_sequences=num_sequences)
    _check_count("chunk_tokens", chunk_tokens)
    per_token = kv_bytes_per_token(config, kv_dtype, tensor_parallel=tensor_parallel)
    activations = activation_bytes(
        config,
        num_rows=min(chunk_tokens, num_sequences * num_tokens),
        num_kept_rows=num_sequences,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
    )
    weights = _weights(config, tensor_parallel)
    weight_bytes = weights.held * parse_dtype(dtype).itemsize
    kv_bytes = num_sequences * num_tokens * per_token
    # 2 D products for a score and 2 D for its part of the value, for each query head and key.
    flops_per_key = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return Plan(
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        dtype=dtype,
        kv_dtype=kv_dtype,
        chunk_tokens=chunk_tokens,
        tensor_parallel=tensor_parallel,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=per_token,
        kv_bytes=kv_bytes,
        activation_bytes=activations,
        total_bytes=weight_bytes + kv_bytes + activations,
        prefill_linear_flops=2 * (num_tokens * weights.layers + weights.head),
        prefill_attention_flops=flops_per_key * num_tokens * (num_tokens + 1) // 2,
        decode_linear_flops=2 * (weights.layers + weights.head),
        decode_attention_flops=flops_per_key * num_tokens,
        decode_read_bytes=weights.read * parse_dtype(dtype).itemsize + num_tokens * per_token,
    )


def check_options(*, num_tokens: int, dtype: str, kv_dtype: str | None, num_sequences: int) -> None:
    """Check what needs no model, before one is opened or downloaded. Raises RequestError, CheckpointError."""
    _check_count("context", num_tokens)
    _check_count("num_sequences", num_sequences)
    parse_dtype(dtype)
    is_known = kv_dtype is None or kv_dtype in KV_DTYPES
    check(is_known, "kv_dtype", kv_dtype, f"one of {', '.join(KV_DTYPES)}")


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str, *, tensor_parallel: int = 1) -> int:
    """Keys and values of one token in all layers of one rank, in one of KV_DTYPES; int8 with its scales."""
    local = _local(config, tensor_parallel)
    if kv_dtype == "int8":
        return memory.kv_cache_bytes(local, 1, bytes_per_value=1, scale_bytes=INT8_SCALE_BYTES)
    return memory.kv_cache_bytes(local, 1, bytes_per_value=parse_dtype(kv_dtype).itemsize)


def activation_bytes(
    config: ModelConfig, *, num_rows: int, num_kept_rows: int, dtype: str, tensor_parallel: int = 1
) -> int:
    """Peak working memory of one forward pass of `num_rows` tokens (T), with logits of `num_kept_rows` (R) of them.

    T (4 C e + 8 D + max((5 H + 2 K + 2) D e, 3 F e, 8 C)) + R V (e + 4), with e bytes a value and H, K, F of one
    rank: the embeddings, a layer's input, its residual and normalised states; float32 angles; then the largest of
    attention (fused and split queries, keys and values, and their rotation), feed-forward (gate, up, product) and
    the float32 of a norm; logits in `dtype` and in float32. What attention copies of the cache is not in it.
    """
    size, local = parse_dtype(dtype).itemsize, _local(config, tensor_parallel)
    rows_of_heads = 5 * local.num_attention_heads + 2 * local.num_key_value_heads + 2
    attention = rows_of_heads * config.head_dim * size
    feed_forward = 3 * -(-config.intermediate_size // tensor_parallel) * size
    norm = 2 * FLOAT32_BYTES * config.hidden_size
    held = 4 * config.hidden_size * size + 2 * FLOAT32_BYTES * config.head_dim
    num_outputs = {"language": config.vocab_size, "classification": config.num_labels}.get(config.head, 1)
    logits = num_kept_rows * num_outputs * (size + FLOAT32_BYTES)
    return num_rows * (held + max(attention, feed_forward, norm)) + logits


def longest_context(
    config: ModelConfig,
    *,
    memory_bytes: int,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    num_sequences: int = 1,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    tensor_parallel: int = 1,
) -> int:
    """The most tokens that each sequence can have when keys, values and one chunk's activations share `memory_bytes`.

    memory_bytes: of one rank, what is left beside the weights; may be negative. The other arguments as in `plan`.
    Returns whole pages of 16 tokens, 0 when not one fits; see `context_limit` for what the model itself allows.
    Raises RequestError, CheckpointError, ConfigError.
    """
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    check_options(num_tokens=1, dtype=dtype, kv_dtype=kv_dtype, num_sequences=num_sequences)
    _check_count("chunk_tokens", chunk_tokens)
    page_bytes = (
        num_sequences * PAGE_TOKENS * kv_bytes_per_token(config, kv_dtype, tensor_parallel=tensor_parallel)
    )

    def fits(num_pages: int) -> bool:
        activations = activation_bytes(
            config,
            num_rows=min(chunk_tokens, num_sequences * num_pages * PAGE_TOKENS),
            num_kept_rows=num_sequences,
            dtype=dtype,
            tensor_parallel=tensor_parallel,
        )
        return num_pages * page_bytes + activations <= memory_bytes

    most, too_many = 0, max(0, memory_bytes) // page_bytes + 1
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return most * PAGE_TOKENS


def context_limit(config: ModelConfig) -> int | None:
    """The longest context that the model is made for, in tokens; None with dynamic scaling, which has no limit."""
    scaling = config.rope_scaling
    if scaling is None:
        return config.max_position_embeddings
    return None if scaling.kind == "dynamic" else int(config.max_position_embeddings * scaling.factor)


@dataclass(frozen=True)
class _Weights:
    """Numbers of values. held: by one rank. read: by one rank for one token.

    layers, head: of the whole model's matrices in the layers, which every token goes through, and in the head,
    which only kept rows go through.
    """

    held: int
    read: int
    layers: int
    head: int


def _weights(config: ModelConfig, tensor_parallel: int) -> _Weights:
    shapes = expected_shapes(config)
    # The last rank holds the odd rows where a size is no multiple of the ranks.
    parts = shard_plan(config, tensor_parallel).local_shapes(shapes, rank=tensor_parallel - 1)
    held = memory.count_parameters(parts)
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    layers = sum(size for name, size in matrices.items() if name.startswith("model.layers."))
    if config.head == "language" and config.tie_word_embeddings:  # the table is the head
        head = held.embedding
        read_rows = -(-config.vocab_size // tensor_parallel)
    else:
        head = sum(size for name, size in matrices.items() if not name.startswith("model."))
        read_rows = 0
    read = held.total - held.embedding + read_rows * config.hidden_size
    return _Weights(held.total, read, layers, head)


def _local(config: ModelConfig, tensor_parallel: int) -> ModelConfig:
    _check_count("tensor_parallel", tensor_parallel)
    return local_config(config, tensor_parallel)


def _check_count(name: str, value: int) -> None:
    is_good = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE
    check(is_good, name, value, f"a whole number from 1 to {MAX_SIZE}")
