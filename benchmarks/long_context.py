"""A prompt of 200,000 tokens through a small model on the CPU: memory, time per token, right logits.

Run: python benchmarks/long_context.py (about ten minutes). Every length runs in a process of its own, so that none
finds memory that another one left. The oracle is a float64 network written here: its first layer attends with torch's
own SDPA over the whole prompt, its second with a plain softmax at sampled positions (where the first is held to the
same); its rotary angles are the model's own (tested apart, against the official code).
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from hardware import RESULTS, foreign_load, header

from internlm2.checkpoint.plan import kv_bytes_per_token, plan
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.engine.core import Engine
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.sampler import SamplingState
from internlm2.engine.schedule.pages import PagePool
from internlm2.engine.schedule.request import Sequence
from internlm2.engine.schedule.scheduler import Scheduler
from internlm2.model.config import ModelConfig, RopeScaling
from internlm2.model.heads import CausalLM
from internlm2.model.rope import rotary

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    rope_scaling=RopeScaling("dynamic", 2.0),
)
LENGTHS = (25_000, 50_000, 100_000, 200_000, 262_144)
CHECKED = 200_000
CHUNK, PAGE = 512, 16
WARM_UP = 5_000
SHORT = 1_000  # the prompt that arrives meanwhile
NUM_PARTS = 8  # of a prompt, for the time of each
SAMPLED = (0, 511, 512, 40_000, 99_999, 150_001, 199_999)


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def small_model() -> CausalLM:
    """Random weights, larger than usual so that attention matters."""
    model = CausalLM(CONFIG).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(8 if "wqkv" in name else 4)
    return model


def engine_for(model: CausalLM, num_tokens: int) -> Engine:
    """An engine with room for one such sequence and a small one."""
    num_pages = (num_tokens + 2000) // PAGE + 4
    cache = PageCache(
        CONFIG, num_pages=num_pages, page_size=PAGE, dtype=torch.float32, device=torch.device("cpu")
    )
    pool = PagePool(num_pages, page_size=PAGE)
    return Engine(Runner(model, cache), Scheduler(pool, max_num_seqs=4, chunk_tokens=CHUNK))


def sequence(number: int, tokens: list[int]) -> tuple[Sequence, SamplingState]:
    """A request for eight tokens."""
    state = SamplingState(SamplingParams(max_tokens=8), tokens, vocab_size=512, seed=0)
    return Sequence(sequence_id=number, tokens=tokens, max_total_tokens=len(tokens) + 8), state


def run(model: CausalLM, tokens: list[int]) -> tuple[dict[str, object], dict[int, torch.Tensor]]:
    """One long prompt; at its middle a second one of 1,000 tokens arrives. Figures, and hidden states at SAMPLED."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up left would hide what this run takes
    before = resident_bytes()
    engine = engine_for(model, len(tokens))
    kept: dict[int, torch.Tensor] = {}
    forward = engine.runner.forward

    def watched(batch):
        hidden = forward(batch)
        span = batch.spans[0]
        for position in SAMPLED:
            if span.first_position <= position < span.num_keys and len(batch.spans) == 1:
                kept.setdefault(position, hidden[position - span.first_position].clone())
        return hidden

    engine.runner.forward = watched
    long, state = sequence(0, tokens)
    engine.add(long, state)
    short, short_state = sequence(1, tokens[:SHORT])
    short.namespace = "apart"  # so that it has to be computed
    chunk_seconds: list[float] = []
    steps_until_begun = 0
    peak = 0
    started = time.perf_counter()
    while engine.has_work:
        if short_state is not None and long.num_computed >= len(tokens) // 2:
            engine.add(short, short_state)
            short_state = None
        begun = time.perf_counter()
        engine.step()
        chunk_seconds.append(time.perf_counter() - begun)
        if short_state is None and short.num_computed == 0 and short.num_outputs == 0:
            steps_until_begun += 1
        peak = max(peak, resident_bytes())
    whole_chunks = chunk_seconds[: len(tokens) // CHUNK]
    size = len(whole_chunks) // NUM_PARTS
    parts = [whole_chunks[size * part : size * (part + 1)] for part in range(NUM_PARTS)]
    figures = {
        "seconds": time.perf_counter() - started,
        "grown": peak - before,
        "curve": [statistics.median(part) / CHUNK * 1e6 for part in parts],
        "waited": steps_until_begun,
    }
    return figures, kept


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query (H, D) over all of k, v (S, K, D)."""
    k, v = (t.repeat_interleave(CONFIG.queries_per_group, 1) for t in (k, v))
    weights = (torch.einsum("hd,shd->hs", q, k) * CONFIG.head_dim**-0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, v)


def oracle(model: CausalLM, tokens: list[int], limit: int) -> torch.Tensor:
    """Logits (len(SAMPLED), V) in float64."""
    weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
    dim, group = CONFIG.head_dim, CONFIG.queries_per_group
    positions = torch.arange(len(tokens))
    angles = rotary(CONFIG, positions[None], torch.tensor([limit]))
    cos, sin = angles.cos[0, :, None].double(), angles.sin[0, :, None].double()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG.rms_norm_eps) * weights[name]

    def turn(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    x = weights["model.tok_embeddings.weight"][tokens]
    for layer in range(CONFIG.num_hidden_layers):
        name = f"model.layers.{layer}"
        is_last = layer == CONFIG.num_hidden_layers - 1
        qkv = norm(x, f"{name}.attention_norm.weight") @ weights[f"{name}.attention.wqkv.weight"].T
        qkv = qkv.view(len(tokens), -1, group + 2, dim)
        q, k, v = turn(qkv[:, :, :group].flatten(1, 2)), turn(qkv[:, :, -2]), qkv[:, :, -1]
        sampled = torch.tensor(SAMPLED)
        at_sampled = torch.stack([plain_attention(q[p], k[: p + 1], v[: p + 1]) for p in SAMPLED])
        if is_last:
            rows, out = sampled, at_sampled
        else:
            k, v = (t.repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
            rows = positions
            # NOTE: four dimensions, or torch makes the whole matrix of scores.
            q4, k4, v4 = q.transpose(0, 1)[None], k[None], v[None]
            out = F.scaled_dot_product_attention(q4, k4, v4, is_causal=True)[0].transpose(0, 1)
            torch.testing.assert_close(out[sampled], at_sampled)
        x = x[rows] + out.flatten(1) @ weights[f"{name}.attention.wo.weight"].T
        h = norm(x, f"{name}.ffn_norm.weight")
        gate = F.silu(h @ weights[f"{name}.feed_forward.w1.weight"].T)
        x = (
            x
            + (gate * (h @ weights[f"{name}.feed_forward.w3.weight"].T))
            @ weights[f"{name}.feed_forward.w2.weight"].T
        )
    return norm(x, "model.norm.weight") @ weights["output.weight"].T


@torch.inference_mode()
def measure(length: int) -> dict[str, object]:
    """One length, in this process."""
    model = small_model()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(512, (max(LENGTHS),), generator=generator).tolist()[:length]
    run(model, tokens[:WARM_UP])
    figures, kept = run(model, tokens)
    if length == CHECKED:
        truth = oracle(model, tokens, length + 8)
        ours = model.logits(torch.stack([kept[p] for p in SAMPLED])[:, None])[:, 0].double()
        figures["error"] = float((ours - truth).abs().max() / truth.abs().max())
    return figures


def main() -> None:
    """Measure every length, check one, and write the result file."""
    load = foreign_load()
    table, curves = [], []
    error = float("nan")
    for length in LENGTHS:
        command = [sys.executable, __file__, "--length", str(length)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout)
        error = figures.get("error", error)
        expected = plan(CONFIG, num_tokens=length, dtype="float32")
        predicted = expected.kv_bytes + expected.activation_bytes + SHORT * expected.kv_bytes_per_token
        table.append(
            f"| {length:,} | {predicted / 1e6:.1f} | {figures['grown'] / 1e6:.1f} | "
            f"{figures['grown'] / predicted:.3f} | {figures['seconds']:.1f} | {figures['waited']} |"
        )
        curves.append(f"| {length:,} | " + " | ".join(f"{value:.0f}" for value in figures["curve"]) + " |")
        print(table[-1], curves[-1], figures.get("error", ""), sep="\n", flush=True)
    text = header("Long contexts on the CPU", "python benchmarks/long_context.py", ("torch",))
    text += (
        f"2 layers, hidden 64, 2 heads of 32, float32, chunks of {CHUNK}; {kv_bytes_per_token(CONFIG, 'float32')} "
        f"bytes of keys and values a token. Foreign load before: {load:.0%}. One run each, in its own process.\n\n"
        "Predicted: `plan(...)`, keys and values of both prompts and one chunk. Grown: the process at its peak. "
        "Waited: steps until a prompt of 1,000 tokens that arrives in the middle is being computed.\n\n"
        "| tokens | predicted MB | grown MB | ratio | seconds | waited |\n|---|---|---|---|---|---|\n"
        + "\n".join(table)
        + "\n\n## Microseconds a token, by eighths of the prompt\n\n"
        f"| tokens |{' |' * NUM_PARTS}\n|---|{'---|' * NUM_PARTS}\n" + "\n".join(curves) + "\n\n"
        "The time of a token grows with what it attends to, in a straight line; the memory of a token does not.\n\n"
        f"Logits at positions {', '.join(f'{p:,}' for p in SAMPLED)} of {CHECKED:,} against float64: largest error "
        f"{error:.1e} of the largest logit.\n"
    )
    (RESULTS / "long_context.md").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--length", type=int, help="measure one length in this process, and print figures as JSON"
    )
    asked = parser.parse_args().length
    if asked is None:
        main()
    else:
        print(json.dumps(measure(asked)))
