"""Two processes compute what one does. They run once (tensor_worker.py); the tests look at what they found."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensor_cases import CONFIGS, GOLDENS, MESSAGES, greedy_tokens, ids, random_model

from goldens import forwards, golden, golden_folder
from internlm2 import load_model
from internlm2.checkpoint import memory
from internlm2.checkpoint.load import load_checkpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.source import expected_shapes
from internlm2.errors import ConfigError, MemoryBudgetError, RequestError
from internlm2.model import ModelConfig, build_model, preset
from internlm2.parallel import TensorGroup, apply, free_address, local_config, shard_plan
from internlm2.parallel.tensor import share

SIZE = 2
CPU = torch.device("cpu")
WORKER = Path(__file__).with_name("tensor_worker.py")
LANGUAGE = [name for name, config in CONFIGS.items() if config.head == "language"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    addresses = [free_address() for _ in range(3)]
    environment = os.environ | {"PYTHONPATH": str(WORKER.parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(SIZE), folder, *addresses],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(SIZE)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0] * SIZE, "\n".join(said)
    assert said == [""] * SIZE  # no abort and no warning at exit
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(SIZE)]


@pytest.fixture
def alone():
    """A group of one, in this process."""
    with TensorGroup.connect(0, 1, address=free_address(), device=CPU) as group:
        yield group


def assert_same_numbers(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32 sums in another order: 1e-5 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_compute_what_one_does(ranks, name):
    model, result = random_model(CONFIGS[name]), f"{name}.result"
    with torch.no_grad():
        expected = model(ids(CONFIGS[name]))
    assert_same_numbers(ranks[0]["random"][result], expected)
    assert torch.equal(ranks[0]["random"][result], ranks[1]["random"][result])


@pytest.mark.parametrize("name", LANGUAGE)
def test_two_processes_decode_with_a_cache_of_their_own_heads_what_one_does(ranks, name):
    with torch.no_grad():
        expected = greedy_tokens(random_model(CONFIGS[name]), ids(CONFIGS[name]), num_tokens=12)
    for found in ranks:
        assert torch.equal(found["random"][f"{name}.decoded"], expected)


@pytest.mark.parametrize("name", [n for n in GOLDENS if n != "reward"])
def test_loaded_parts_compute_the_logits_of_the_official_code(ranks, name):
    model, tensors = load_model(golden_folder(name)), golden(name)
    for case in forwards(tensors):
        first, second = (rank["golden"][f"{name}.{case}.input_ids"] for rank in ranks)
        torch.testing.assert_close(first, tensors[f"{case}.logits"], atol=2e-4, rtol=0)
        with torch.no_grad():
            assert_same_numbers(first, model(tensors[f"{case}.input_ids"]))
        assert first.dtype == torch.float32
        assert torch.equal(first, second)


def test_loaded_parts_of_a_reward_model_give_the_official_scores(ranks):
    first, second = (rank["golden"]["reward.reward.input_ids"] for rank in ranks)
    torch.testing.assert_close(first, golden("reward")["reward.scores"], atol=2e-4, rtol=0)
    assert torch.equal(first, second)


def test_bfloat16_parts_agree_bit_for_bit_and_nearly_with_one_process(ranks):
    first, second = (rank["golden"]["bfloat16"] for rank in ranks)
    with torch.no_grad():
        expected = load_model(golden_folder("gqa"), dtype="bfloat16")(torch.arange(20)[None])
    assert torch.equal(first, second)
    # A bfloat16 has 8 bits; some roundings in a row.
    torch.testing.assert_close(first, expected, rtol=0, atol=0.03 * expected.abs().max().item())


@pytest.mark.parametrize("name", [*CONFIGS, *GOLDENS[:3]])
def test_each_process_holds_the_bytes_of_the_plan_and_nothing_behind_them(ranks, name):
    is_golden = name in GOLDENS and name not in CONFIGS
    config = open_checkpoint(golden_folder(name)).config if is_golden else CONFIGS[name]
    whole, plan = expected_shapes(config), shard_plan(config, SIZE)
    split = dict.fromkeys(plan.dimensions, 0)
    for rank, found in enumerate(ranks):
        held = found["golden" if is_golden else "random"][f"{name}.held"]
        shapes = plan.local_shapes(whole, rank=rank)
        assert list(held) == list(whole)
        for tensor in plan.dimensions:
            assert held[tensor] == 4 * torch.Size(shapes[tensor]).numel(), tensor
            split[tensor] += held[tensor]
    assert split == {tensor: 4 * torch.Size(whole[tensor]).numel() for tensor in plan.dimensions}


def test_each_process_has_its_own_heads_and_takes_no_gradients(ranks):
    for found in ranks:
        assert found["random"]["plain.heads"] == (3, 1)
        assert found["random"]["bias-tied-four-heads.heads"] == (2, 2)
        assert not any(found["golden"]["gqa.gradients"])


def test_messages_arrive_as_they_were_sent(ranks):
    for sent, arrived in zip(MESSAGES, ranks[1]["messages"], strict=True):
        assert [t.dtype for t in arrived] == [t.dtype for t in sent]
        assert all(torch.equal(a, s) for a, s in zip(arrived, sent, strict=True))


def test_a_process_waits_for_work_longer_than_for_a_sum(ranks):
    assert torch.equal(ranks[1]["idle"][0], torch.arange(3))


def test_nobody_leaves_before_all_want_to(ranks):
    assert ranks[0]["seconds_to_close"] > 0.5


def test_the_others_are_told_when_a_process_is_lost(ranks):
    assert ranks[0]["lost"].startswith("RequestError: Rank 0 lost another process of its group (")
    assert "Look for the message of the one that ended first" in ranks[0]["lost"]
    assert ranks[1]["lost"] == "ArithmeticError: this one fails"


@pytest.mark.parametrize(("groups", "size", "sizes"), [(8, 3, "1, 2, 4 or 8"), (1, 2, "1"), (2, 0, "1 or 2")])
def test_heads_that_cannot_be_shared_out_are_refused_with_the_sizes_that_work(groups, size, sizes):
    config = ModelConfig(num_key_value_heads=groups)
    message = rf"has {groups} key/value heads, which cannot .* over {size} processes. Choose {sizes}\.$"
    for function in (shard_plan, local_config):
        with pytest.raises(ConfigError, match=message):
            function(config, size)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_parts_of_a_published_model_make_it_up(size):
    config = preset("7b")
    whole, plan = expected_shapes(config), shard_plan(config, size)
    parts = [plan.local_shapes(whole, rank=rank) for rank in range(size)]
    for name, shape in whole.items():
        for dim, length in enumerate(shape):
            is_split = plan.dimensions.get(name) == dim
            assert sum(part[name][dim] for part in parts) == (length if is_split else size * length)
    assert len(plan.dimensions) == 5 * 32 + 1


@pytest.mark.parametrize("length", [1, 5, 92544, 92545])
def test_shares_follow_each_other_without_a_gap(length):
    shares = [share(length, 4, rank=rank) for rank in range(4)]
    assert [i for s in shares for i in range(s.start, s.stop)] == list(range(length))
    assert max(s.stop - s.start for s in shares) == -(-length // 4)


def test_the_local_config_keeps_all_but_the_heads():
    config = local_config(preset("7b"), 4)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 2, 128)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (4096, 14336, 92544)


def test_a_group_of_one_changes_nothing(alone):
    model = random_model(CONFIGS["bias"])
    with torch.no_grad():
        expected = model(ids(model.config))
        apply(model, alone)
        assert torch.equal(model(ids(model.config)), expected)


def test_only_the_share_must_fit(alone, monkeypatch):
    checkpoint = open_checkpoint(golden_folder("gqa"))
    whole_bytes = 4 * memory.count_parameters(expected_shapes(checkpoint.config)).total
    monkeypatch.setattr(memory, "available_bytes", lambda: whole_bytes - 1)
    with pytest.raises(MemoryBudgetError, match=r"needs 0\.0 GiB"):
        load_checkpoint(checkpoint, group=alone)
    monkeypatch.setattr(alone, "size", 2)
    assert load_checkpoint(checkpoint, group=alone).config.num_key_value_heads == 1


def test_a_checkpoint_that_cannot_be_shared_out_is_refused_before_it_is_read(alone, monkeypatch):
    monkeypatch.setattr(alone, "size", 2)
    with pytest.raises(ConfigError, match=r"has 1 key/value heads.* over 2 processes. Choose 1\.$"):
        load_checkpoint(open_checkpoint(golden_folder("mqa-bias")), group=alone)


def test_a_device_that_is_not_the_groups_is_refused(alone, monkeypatch):
    monkeypatch.setattr(alone, "device", torch.device("cuda", 1))
    with pytest.raises(RequestError, match="device is 'cpu', but this process's group computes on 'cuda:1'"):
        load_checkpoint(open_checkpoint(golden_folder("gqa")), group=alone)


def test_a_model_on_the_meta_device_is_split_without_memory(alone, monkeypatch):
    monkeypatch.setattr(alone, "size", 8)
    with torch.device("meta"):
        model = build_model(preset("20b"))
    apply(model, alone)
    assert model.model.layers[0].attention.wqkv.weight.shape == (1024, 6144)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("address", ["localhost", ":29500", "host:", "host:0", "host:70000", "host:-1"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match=rf"address is '{address}', but must be host:port"):
        TensorGroup.connect(0, 1, address=address, device=CPU)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2)])
def test_a_rank_beyond_the_group_is_refused(rank, size):
    with pytest.raises(ConfigError, match=rf"rank is {rank}, but must be from 0 to 1 in a group of 2"):
        TensorGroup.connect(rank, size, address="127.0.0.1:29500", device=CPU)


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_without_a_way_to_talk_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"device is '{device}', but the processes .* compute on"):
        TensorGroup.connect(0, 1, address="127.0.0.1:29500", device=torch.device(device))


def test_a_second_group_in_a_process_is_refused(alone):
    with pytest.raises(RequestError, match=r"is in a process group already\. Close that group first"):
        TensorGroup.connect(0, 1, address=free_address(), device=CPU)


def test_a_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            RequestError, match=rf"Rank 0 could not meet the 1 processes .* at {address} within"
        ):
            TensorGroup.connect(0, 1, address=address, device=CPU, timeout_seconds=1)


def test_processes_that_do_not_come_are_told():
    with pytest.raises(RequestError, match=r"could not meet the 2 processes .* within 1 s \(Timed out"):
        TensorGroup.connect(0, 2, address=free_address(), device=CPU, timeout_seconds=1)


def test_closing_twice_does_nothing():
    group = TensorGroup.connect(0, 1, address=free_address(), device=CPU)
    group.close()
    group.close()
    assert not torch.distributed.is_initialized()
