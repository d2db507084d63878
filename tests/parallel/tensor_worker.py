"""One process of test_tensor.py: runs every case and leaves what it found in a file.

Arguments: rank, number of processes, folder for the result, and an address for each group in turn.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the cores are shared; before torch is imported

import sys
import time
from pathlib import Path

import torch
from tensor_cases import CONFIGS, GOLDENS, MESSAGES, greedy_tokens, ids, random_model

from goldens import golden, golden_folder
from internlm2.checkpoint.load import load_checkpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.errors import RequestError
from internlm2.model import CausalLM, Model
from internlm2.parallel import TensorGroup, apply, receive_tensors, send_tensors

CPU = torch.device("cpu")


def held(model: Model) -> dict[str, int]:
    """Bytes in memory behind every parameter."""
    named = model.parameters_by_checkpoint_name().items()
    return {name: parameter.untyped_storage().nbytes() for name, parameter in named}


def run_random_models(group: TensorGroup) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, config in CONFIGS.items():
        model = random_model(config)
        apply(model, group)
        found[f"{name}.result"] = model(ids(config))
        found[f"{name}.held"] = held(model)
        found[f"{name}.heads"] = (model.config.num_attention_heads, model.config.num_key_value_heads)
        if isinstance(model, CausalLM):
            found[f"{name}.decoded"] = greedy_tokens(model, ids(config), num_tokens=12)
    return found


def run_goldens(group: TensorGroup) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in GOLDENS:
        model = load_checkpoint(open_checkpoint(golden_folder(name)), group=group)
        found[f"{name}.held"] = held(model)
        found[f"{name}.gradients"] = [p.requires_grad for p in model.parameters()]
        tensors = golden(name)
        for key, value in tensors.items():
            if not key.endswith(".input_ids") or not key.startswith(("forward.", "reward.")):
                continue
            mask = tensors.get(key.replace("input_ids", "attention_mask"))
            found[f"{name}.{key}"] = model(value, attention_mask=mask)
    half = load_checkpoint(open_checkpoint(golden_folder("gqa")), group=group, dtype="bfloat16")
    found["bfloat16"] = half(torch.arange(20)[None])
    return found


def run_messages(group: TensorGroup) -> list[list[torch.Tensor]]:
    if group.rank > 0:
        return [[tensor.clone() for tensor in receive_tensors(group)] for _ in MESSAGES]
    for message in MESSAGES:
        send_tensors(group, message)
    return MESSAGES


def wait_idle(group: TensorGroup) -> list[torch.Tensor]:
    """A message that comes later than any sum may."""
    if group.rank > 0:
        return receive_tensors(group)
    time.sleep(3.5)
    send_tensors(group, [torch.arange(3)])
    return [torch.arange(3)]


def lose_a_process(rank: int, size: int, address: str) -> str:
    """What the others are told when one process fails in the middle."""
    try:
        with TensorGroup.connect(rank, size, address=address, device=CPU) as group:
            if rank == size - 1:
                raise ArithmeticError("this one fails")
            group.all_reduce(torch.ones(3))
    except (ArithmeticError, RequestError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(rank: int, size: int, folder: Path, addresses: list[str]) -> None:
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    with TensorGroup.connect(rank, size, address=addresses[0], device=CPU) as group, torch.no_grad():
        found["random"] = run_random_models(group)
        found["golden"] = run_goldens(group)
        found["messages"] = run_messages(group)
    with TensorGroup.connect(rank, size, address=addresses[1], device=CPU, timeout_seconds=3) as group:
        found["idle"] = wait_idle(group)
        if rank > 0:
            time.sleep(0.7)
        about_to_close = time.monotonic()
    found["seconds_to_close"] = time.monotonic() - about_to_close
    found["lost"] = lose_a_process(rank, size, addresses[2])
    torch.save(found, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
