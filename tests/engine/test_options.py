"""Options of a wrong kind, or outside their range: one sentence that names the option, its value and what is allowed."""

import math
import os

import pytest
import torch

from internlm2 import LLM
from internlm2.engine.fork_guard import ForkGuard
from internlm2.engine.options import EngineOptions
from internlm2.engine.reward import RewardScorer
from internlm2.errors import RequestError

COUNT = "at least 1 (a whole number)"
FLAG = "True or False"
GIB = "above 0 and at most 1e9, or None"
DTYPES = "one of float32, bfloat16, float16, auto (a text)"
DEVICES = "'cpu', 'cuda' or 'cuda:N'"
ADAPTERS = "a dict of names and folders, such as {'poet': 'poet-folder'}, or None"
LENGTH = "'auto', None, or a whole number from 2 on (a prompt and an answer)"
DRAFT = "'lookup', the path of a draft model, or None"
FORMATS = "one of auto, none, bfloat16, int8, int4, int4-symmetric, fp8, or None (as none)"

WRONG = [
    *(("dtype", value, DTYPES) for value in (5, None, "int3", torch.float32, ["float32"])),
    *(("device", value, DEVICES) for value in (0, None, torch.device("cpu"), "gpu", "mps", "")),
    *(("rope_mode", value, "one of stateless, reference") for value in ("dynamic", 1, None)),
    *(("max_model_len", value, LENGTH) for value in (0, 1, -5, 2.5, "8", "long", True, math.inf)),
    *(("kv_dtype", value, "None (as the model) or 'int8'") for value in (8, "int4", True, ["int8"])),
    *(("memory_gib", value, GIB) for value in ("2", 0, 0.0, -1.0, math.nan, math.inf, True, 10**400)),
    *(("host_memory_gib", value, "from 0 to 1e9") for value in (None, "2", -1, math.nan, math.inf, False)),
    *(
        (name, value, COUNT)
        for name in ("max_num_seqs", "chunk_tokens", "num_draft_tokens", "tensor_parallel")
        for value in (0, -1, 1.5, "8", True, None)
    ),
    *((name, value, FLAG) for name in ("prefix_cache", "deterministic") for value in ("yes", 1, None)),
    *(("adapters", value, ADAPTERS) for value in (["a"], "a", {"a": None}, {"a": 3}, {1: "a"}, {"": "a"})),
    *(("speculative", value, DRAFT) for value in (3, "", True, ["lookup"])),
    *(("quantization", value, FORMATS) for value in (8, "int3", True, ["int8"])),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_value_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(RequestError) as told:
        EngineOptions(**{name: value})
    assert str(told.value).startswith(f"{name} is {value!r}, but must be {allowed}")


@pytest.mark.parametrize("make", [LLM, RewardScorer])
def test_the_makers_of_models_refuse_them(make, chat_folder):
    for options in ({"dtype": 5}, {"device": "gpu"}, {"tensor_parallel": "2"}):
        [(name, value)] = options.items()
        with pytest.raises(RequestError, match=f"{name} is {value!r}, but must be"):
            make(chat_folder, **options)
    for path in (None, 5, b"folder", ["folder"]):
        with pytest.raises(
            RequestError, match=r"path is .*, but must be a folder, a GGUF file, a Hugging Face id"
        ):
            make(path)


def test_whole_numbers_of_others_become_plain_ones():
    three, eight = torch.tensor([3, 8]).numpy()
    options = EngineOptions(max_num_seqs=three, max_model_len=eight)
    assert (options.max_num_seqs, options.max_model_len) == (3, 8)
    assert type(options.max_num_seqs) is type(options.max_model_len) is int


TOGETHER = [
    (
        {"deterministic": True, "speculative": "lookup"},
        "deterministic=True does not go with speculative decoding",
    ),
    (
        {"deterministic": True, "adapters": {}},
        "deterministic=True does not go with adapters.*Merge the adapter",
    ),
    (
        {"host_memory_gib": 1, "speculative": "x"},
        "host_memory_gib does not go with a draft.*speculative='lookup'",
    ),
    ({"tensor_parallel": 2, "deterministic": True}, "tensor_parallel does not go with deterministic=True"),
    ({"tensor_parallel": 2, "adapters": {}}, "tensor_parallel does not go with adapters"),
    ({"tensor_parallel": 2, "speculative": "x"}, "tensor_parallel does not go with a draft model"),
    ({"quantization": "int8", "deterministic": True}, "quantization does not go with deterministic=True"),
    ({"quantization": "int8", "adapters": {}}, "quantization does not go with adapters"),
    ({"quantization": "int8", "tensor_parallel": 2}, "quantization does not go with tensor_parallel"),
]


@pytest.mark.parametrize(("options", "message"), TOGETHER, ids=lambda value: str(value)[:40])
def test_options_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        EngineOptions(**options)
    for name, value in options.items():
        EngineOptions(**{name: value})  # each alone is fine


def test_options_that_go_together_are_taken():
    EngineOptions(host_memory_gib=1, speculative="lookup", kv_dtype="int8", max_model_len="auto")
    EngineOptions(tensor_parallel=2, speculative="lookup")
    EngineOptions(quantization="int4", speculative="draft", memory_gib=2)
    EngineOptions(quantization=None, deterministic=True)


@pytest.mark.parametrize(
    ("given", "wanted"), [(None, "none"), ("none", "none"), ("auto", "auto"), ("int8", "int8")]
)
def test_no_quantization_has_one_word(given, wanted):
    assert EngineOptions(quantization=given).wanted_weights == wanted


def test_a_guard_lets_nobody_in_who_was_forked():
    guard = ForkGuard()
    guard.check()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            guard.check()
        except RequestError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert f"loaded by process {os.getpid()}, and this is a fork of it (process {child})" in said
    assert "spawn" in said
