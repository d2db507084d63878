"""Folders of every generation load; damaged, foreign and hostile ones are refused with a remedy."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from goldens import GENERATE_GOLDENS, golden_folder
from internlm2 import load_model
from internlm2.checkpoint import memory
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.source import expected_shapes
from internlm2.errors import CheckpointError, ConfigError, MemoryBudgetError, RequestError
from internlm2.model import RewardModel, SequenceClassifier


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a good folder, for a test to spoil."""
    copy = tmp_path / "model.v1"  # a dot in the name broke other loaders (InternLM#756)
    shutil.copytree(golden_folder("gqa"), copy)
    (copy / "golden.safetensors").unlink()
    return copy


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", GENERATE_GOLDENS)
def test_parameters_carry_the_official_names(name):
    model = load_model(golden_folder(name))
    checkpoint = open_checkpoint(golden_folder(name))
    parameters = model.parameters_by_checkpoint_name()
    assert set(parameters) == set(checkpoint.tensors)
    for tensor_name, parameter in parameters.items():
        assert torch.equal(parameter, checkpoint.read(tensor_name))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "internlm", "architectures": ["InternLMForCausalLM"]},
        {"model_type": "internlm", "architectures": ["InternLM2ForCausalLM"]},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "rope_type": "dynamic", "extra": 1}},
        {"eos_token_id": [2, 92542], "pad_token_id": None, "unheard_of": {"a": 1}},
        {"num_key_value_heads": 2, "bias": False, "tie_word_embeddings": False, "head_dim": None},
    ],
)
def test_configs_of_every_generation_load(folder, changes):
    expected = load_model(golden_folder("gqa"))
    edit_config(folder, **changes)
    model = load_model(folder)
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(model(ids), expected(ids))


def test_a_string_and_a_path_both_name_a_folder(folder):
    assert load_model(str(folder)).config == load_model(folder).config


def test_the_head_follows_the_architecture():
    assert isinstance(load_model(golden_folder("reward")), RewardModel)
    assert isinstance(load_model(golden_folder("sequence-classification")), SequenceClassifier)


def test_dtypes_are_cast_tensor_by_tensor(folder):
    weights = {
        d: load_model(folder, dtype=d).output.weight for d in ("float32", "bfloat16", "float16", "auto")
    }
    assert [w.dtype for w in weights.values()] == [
        torch.float32, torch.bfloat16, torch.float16, torch.float32
    ]  # fmt: skip
    assert torch.equal(weights["bfloat16"], weights["float32"].bfloat16())


def test_writing_to_a_loaded_weight_leaves_the_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    with torch.no_grad():
        model.output.weight.fill_(7.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_rotary_buffers_of_very_old_bin_files_are_ignored(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["model.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load_model(folder).config.num_hidden_layers == 2


def test_bin_files_from_before_the_zip_format_load(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(load_model(folder)(ids), load_model(golden_folder("gqa"))(ids))


class TestBadInput:
    """Each mistake has its own words."""

    def refuse(self, folder: Path, message: str, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=message):
            load_model(folder)

    def test_no_such_path(self, tmp_path):
        self.refuse(tmp_path / "nowhere", "there is no such folder or file")

    def test_a_file_that_is_no_gguf(self, folder):
        self.refuse(folder / "config.json", "is a file, but not a GGUF")

    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        self.refuse(folder, "has no config.json, so it is not a model folder")

    def test_config_is_not_json(self, folder):
        (folder / "config.json").write_text("{")
        self.refuse(folder, r"Cannot read .*config.json.*Download that file again")

    def test_config_is_a_list(self, folder):
        (folder / "config.json").write_text("[]")
        self.refuse(folder, "must hold a JSON object")

    def test_unknown_architecture(self, folder):
        edit_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
        self.refuse(folder, "model_type 'gpt2'.*is not InternLM2")

    def test_the_first_generation(self, folder):
        config = json.loads((folder / "config.json").read_text())
        del config["num_key_value_heads"]
        config |= {"model_type": "internlm", "architectures": ["InternLMForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))
        self.refuse(folder, "model_type 'internlm'.*is not InternLM2")

    def test_weights_quantised_elsewhere(self, folder):
        edit_config(folder, quantization_config={"quant_method": "awq"})
        self.refuse(folder, "already quantised by another tool")

    def test_another_activation(self, folder):
        edit_config(folder, hidden_act="gelu")
        self.refuse(folder, "hidden_act is 'gelu'", ConfigError)

    def test_a_missing_config_value(self, folder):
        edit_config(folder, hidden_size=None)
        self.refuse(folder, "config.json: hidden_size is missing", ConfigError)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "1e-5"])
    def test_a_value_that_is_no_number(self, folder, value):
        edit_config(folder, rms_norm_eps=value)
        self.refuse(folder, "rms_norm_eps is", ConfigError)

    def test_contradictory_values(self, folder):
        edit_config(folder, num_attention_heads=3, num_key_value_heads=2)
        self.refuse(folder, "not a multiple of num_key_value_heads", ConfigError)

    @pytest.mark.parametrize(
        ("scaling", "message"),
        [
            ("dynamic", "must be null or an object"),
            ({"type": "yarn", "factor": 2.0}, "type is 'yarn'"),
            ({"type": "dynamic"}, "factor is None"),
            ({"type": "dynamic", "factor": 0.5}, "factor is 0.5"),
        ],
    )
    def test_bad_rope_scaling(self, folder, scaling, message):
        edit_config(folder, rope_scaling=scaling)
        self.refuse(folder, message, ConfigError)

    def test_a_token_id_that_is_no_number(self, folder):
        edit_config(folder, eos_token_id="</s>")
        self.refuse(folder, "eos_token_id is '</s>', but must be a token id", ConfigError)

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        self.refuse(folder, "has no weights: looked for model.safetensors")

    @pytest.mark.parametrize("keep", [0, 5, 100, 5000, -7])
    def test_truncated_safetensors(self, folder, keep):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.refuse(folder, "model.safetensors is truncated or damaged")

    def test_corrupt_safetensors_header(self, folder):
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[20:40] = b"\xff" * 20
        path.write_bytes(bytes(content))
        self.refuse(folder, "model.safetensors is truncated or damaged")

    def test_integer_weights(self, folder):
        def change(tensors):
            tensors["output.weight"] = tensors["output.weight"].to(torch.int8)

        edit_tensors(folder, change)
        self.refuse(folder, "output.weight has dtype I8; only float weights are read")

    def index(self, folder: Path, weight_map: object) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    @pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7])
    def test_an_index_that_leads_out_of_the_folder(self, folder, file):
        self.index(folder, {"output.weight": file})
        self.refuse(folder, "is not a plain file name")

    def test_an_index_without_a_map(self, folder):
        self.index(folder, {})
        self.refuse(folder, "has no weight_map")

    def test_a_shard_that_is_missing(self, folder):
        self.index(folder, {"output.weight": "model-00001-of-00002.safetensors"})
        self.refuse(folder, "model-00001-of-00002.safetensors is missing, but the index needs it")

    def test_an_index_that_promises_what_is_not_there(self, folder):
        self.index(folder, {"ghost.weight": "model.safetensors"})
        self.refuse(folder, "ghost.weight is missing, but the index says that it is here")

    def test_a_tensor_in_two_shards(self, folder):
        shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
        self.index(folder, {"output.weight": "model.safetensors", "model.norm.weight": "b.safetensors"})
        self.refuse(folder, "is also in")

    def test_a_missing_tensor(self, folder):
        edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.attention.wo.weight"))
        self.refuse(folder, r"model.layers.1.attention.wo.weight is missing \(1 of 17 tensors\)")

    def test_an_extra_tensor(self, folder):
        edit_tensors(folder, lambda tensors: tensors.update(extra=torch.ones(1)))
        self.refuse(folder, "tensor extra is not part of this architecture")

    def test_a_bias_that_the_config_denies(self, folder):
        edit_tensors(folder, lambda t: t.update({"model.layers.0.attention.wo.bias": torch.ones(64)}))
        self.refuse(folder, "wo.bias is not part of this architecture")

    def test_a_tensor_of_another_shape(self, folder):
        edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(63)}))
        self.refuse(folder, r"model.norm.weight has shape \[63\], but config.json asks for \[64\]")

    def bin(self, folder: Path, content: object) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    def test_a_pickle_with_a_payload_is_not_executed(self, folder, tmp_path):
        trap = tmp_path / "executed"

        class Payload:
            def __reduce__(self):
                return (Path.touch, (trap,))

        self.bin(folder, {"output.weight": Payload()})
        self.refuse(folder, r"holds more than tensors: its pickle asks to run code.*It was not executed")
        assert not trap.exists()

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_a_raw_pickle_with_a_payload_is_not_executed(self, folder, tmp_path):
        trap = tmp_path / "executed"

        class Payload:
            def __reduce__(self):
                return (Path.touch, (trap,))

        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
        self.refuse(folder, r"pytorch_model.bin (holds more than tensors|is truncated or damaged)")
        assert not trap.exists()

    def test_a_bin_that_is_no_dict(self, folder):
        self.bin(folder, [torch.ones(1)])
        self.refuse(folder, "holds list, but must hold a dict of tensors")

    def test_a_bin_with_other_things_in_it(self, folder):
        self.bin(folder, {"epoch": 3})
        self.refuse(folder, "entry 'epoch' is not a tensor")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
    def test_a_bin_whose_tensors_are_no_floats(self, folder, dtype):
        self.bin(folder, {"output.weight": torch.ones(2).to(dtype)})
        self.refuse(folder, "only dense float weights are read")

    def test_a_sparse_bin(self, folder):
        self.bin(folder, {"output.weight": torch.ones(2, 2).to_sparse()})
        self.refuse(folder, "only dense float weights are read")

    def test_a_tensor_in_two_bins(self, folder):
        for name in ("a.bin", "b.bin"):
            torch.save({"output.weight": torch.ones(1)}, folder / name)
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"output.weight": "a.bin", "x": "b.bin"}}
        torch.save({"output.weight": torch.ones(1), "x": torch.ones(1)}, folder / "b.bin")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        self.refuse(folder, "tensor output.weight is also in a.bin")

    def test_a_weight_beyond_float16(self, folder):
        edit_tensors(folder, lambda t: t["output.weight"].view(-1)[:1].fill_(1e5))
        with pytest.raises(
            CheckpointError, match=r"output.weight holds values up to 1e\+05, beyond float16's 6.55e\+04"
        ):
            load_model(folder, dtype="float16")
        load_model(folder, dtype="bfloat16")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("rope_theta", 10**400, "rope_theta is a number of over 30 digits"),
            ("vocab_size", 10**30, "vocab_size is a number of over 30 digits"),
            ("num_hidden_layers", 10**8, "must be a whole number from 1 to 10000"),
            ("hidden_size", 10**12, "must be a whole number from 1 to"),
            ("rope_scaling", {"factor": 2.0}, "type is None"),
            ("rope_scaling", False, "must be null or an object"),
            ("rope_scaling", {"type": "dynamic", "factor": 10**400}, "must be a number"),
            ("bos_token_id", 10**9, "must be a token id from 0 to 511"),
            ("pad_token_id", -7, "must be a token id from 0 to 511"),
        ],
    )
    def test_values_that_no_model_has(self, folder, key, value, message):
        edit_config(folder, **{key: value})
        self.refuse(folder, message, ConfigError)

    def test_a_config_nested_without_end(self, folder):
        (folder / "config.json").write_text("[" * 100_000)
        self.refuse(folder, "Download that file again")

    def test_an_index_with_an_endless_name(self, folder):
        self.index(folder, {"output.weight": "x" * 300})
        self.refuse(folder, "is not a plain file name")

    def test_several_gguf_files(self, tmp_path):
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).touch()
        self.refuse(tmp_path, "has 2 GGUF files: a.gguf, b.gguf. Give the path of one")

    def test_a_truncated_bin(self, folder):
        self.bin(folder, {"output.weight": torch.ones(100)})
        path = folder / "pytorch_model.bin"
        path.write_bytes(path.read_bytes()[:500])
        self.refuse(folder, "pytorch_model.bin (is truncated or damaged|holds more than tensors)")

    def test_an_unknown_dtype(self, folder):
        with pytest.raises(CheckpointError, match="dtype is 'int3', but must be one of float32"):
            load_model(folder, dtype="int3")

    def test_a_device_that_is_not_there(self, folder, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RequestError, match="torch finds no NVIDIA GPU"):
            load_model(folder, device="cuda")

    def test_an_unknown_device(self, folder):
        with pytest.raises(RequestError, match="device is 'toaster', but must be"):
            load_model(folder, device="toaster")

    def test_a_model_too_large_is_told_before_loading(self, folder, monkeypatch):
        monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
        monkeypatch.setattr("internlm2.checkpoint.load.build_model", None)  # loading has not begun
        self.refuse(folder, r"needs 0.0 GiB, but cpu has 0.0 GiB left", MemoryBudgetError)


def test_available_memory_respects_a_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\nSwapFree: 1000 kB\n")
    assert memory.available_bytes(meminfo, tmp_path) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(meminfo, tmp_path) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert memory.available_bytes(meminfo, tmp_path) == 2_000_000
    (tmp_path / "memory.stat").write_text("inactive_file 400000\nactive_file 500000\nanon 3\n")
    assert memory.available_bytes(meminfo, tmp_path) == 2_900_000
    assert memory.available_bytes(tmp_path / "none", tmp_path) is None


def test_the_expected_tensors_of_a_reward_model_have_no_output():
    names = expected_shapes(open_checkpoint(golden_folder("reward")).config)
    assert "v_head.weight" in names
    assert "output.weight" not in names
