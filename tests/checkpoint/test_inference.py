"""How weights are held when nobody says: packed where it pays, plain where something needs them so, and said aloud."""

import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from small_models import random_checkpoint, small_config

from folders import write_chat_folder
from internlm2.checkpoint import inference, memory
from internlm2.checkpoint.inference import choose_for, choose_weights, load_for_inference, weight_bytes
from internlm2.checkpoint.load import load_model
from internlm2.checkpoint.load_gpu import load_gpu_checkpoint
from internlm2.checkpoint.load_packed import load_packed_checkpoint
from internlm2.checkpoint.memory import count_parameters
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.source import expected_shapes
from internlm2.errors import RequestError
from internlm2.kernels.packed import unpack
from internlm2.quant.linear import PackedLinear


@pytest.fixture
def level(request, monkeypatch):
    """The instructions that the kernels claim to have."""
    built = None if request.param is None else SimpleNamespace(level_name=request.param)
    monkeypatch.setattr(inference, "library", lambda: built)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_folder(tmp_path_factory.mktemp("weights") / "model")


AVX = pytest.mark.parametrize("level", ["avx512"], indirect=True)


@pytest.mark.parametrize(
    ("level", "packed", "why"),
    [
        ("avx512", "bfloat16", "the same weights, for the C++ kernels with avx512"),
        ("avx2", "bfloat16", "the same weights, for the C++ kernels with avx2"),
        ("scalar", None, "the C++ kernels have only scalar instructions here"),
        (None, None, "the C++ kernels are not available"),
    ],
    indirect=["level"],
)
def test_bfloat16_is_packed_where_the_kernels_have_vectors(level, packed, why):
    choice = choose_weights(wanted="auto", dtype="bfloat16", device="cpu")
    assert (choice.packed_as, choice.why) == (packed, why)
    own = choose_weights(wanted="auto", dtype="bfloat16", device="cpu", is_quantized=True)
    assert own.packed_as == "own"  # whatever the instructions: nothing else keeps them small


@AVX
@pytest.mark.parametrize(
    ("asked", "packed", "why"),
    [
        ({"dtype": "float32"}, None, "only bfloat16 is packed unasked"),
        ({"dtype": "float16"}, None, "only bfloat16 is packed unasked"),
        ({"dtype": "float16", "is_quantized": True}, None, "only bfloat16 is packed unasked"),
        ({"dtype": "float32", "is_quantized": True}, "own", "the files are quantised"),
        ({"needs_plain": "an adapter"}, None, "an adapter needs them so"),
        ({"needs_plain": "an adapter", "is_quantized": True}, None, "an adapter needs them so"),
        ({"wanted": "none"}, None, "as asked for"),
        ({"wanted": "none", "is_quantized": True}, None, "as asked for"),
        ({"wanted": "int4"}, "int4", "as asked for"),
        ({"wanted": "int8", "dtype": "float32", "is_quantized": True}, "int8", "as asked for"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("level")
def test_what_is_asked_for_is_done_and_the_rest_follows_from_the_other_options(asked, packed, why):
    choice = choose_weights(**{"wanted": "auto", "dtype": "bfloat16", "device": "cpu"} | asked)
    assert (choice.packed_as, choice.why) == (packed, why)
    assert choice.label == (packed or "plain")


@AVX
@pytest.mark.usefixtures("level")
def test_on_a_gpu_nothing_is_packed_unasked_and_what_it_has_not_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choice = choose_weights(wanted="auto", dtype="bfloat16", device="cuda:1")
    assert choice.packed_as is None
    assert str(choice) == (
        "Weights are plain, computing in bfloat16 (packing is for the CPU, the device is cuda:1)."
    )
    assert choose_weights(wanted="int8", dtype="bfloat16", device="cuda").packed_as == "int8"
    with pytest.raises(
        RequestError, match=r"'bfloat16', but on a GPU must be one of int8, int4, fp8, or left"
    ):
        choose_weights(wanted="bfloat16", dtype="bfloat16", device="cuda")
    with pytest.raises(RequestError, match=r"quantization='fp8' is for GPUs, but device is 'cpu'"):
        choose_weights(wanted="fp8", dtype="bfloat16", device="cpu")


@AVX
@pytest.mark.usefixtures("level")
def test_the_choice_is_said_once_and_packing_changes_no_weight(folder, caplog):
    checkpoint = open_checkpoint(folder)
    with caplog.at_level(logging.INFO, logger="internlm2"):
        choice = choose_for(checkpoint, wanted="auto", dtype="bfloat16", device="cpu")
        packed = load_for_inference(checkpoint, choice, device="cpu")
    said = [record.getMessage() for record in caplog.records if "Weights are" in record.getMessage()]
    assert said == [
        "Weights are packed as bfloat16, computing in bfloat16 "
        "(the same weights, for the C++ kernels with avx512)."
    ]
    plain = load_model(folder, dtype="bfloat16")
    for layer, other in zip(packed.model.layers, plain.model.layers, strict=True):
        assert isinstance(layer.attention.wo, PackedLinear)
        assert torch.equal(unpack(layer.attention.wqkv.packed), other.attention.wqkv.weight.float())
        assert torch.equal(unpack(layer.feed_forward.w2.packed), other.feed_forward.w2.weight.float())


@AVX
@pytest.mark.usefixtures("level")
def test_dtype_auto_is_that_of_the_files(folder):
    checkpoint = open_checkpoint(folder)
    assert choose_for(checkpoint, wanted="auto", dtype="auto", device="cpu").dtype == "float32"


def test_all_weights_are_counted_packed_or_not(folder):
    checkpoint = open_checkpoint(folder)
    total = count_parameters(expected_shapes(checkpoint.config)).total
    assert weight_bytes(load_model(folder, dtype="bfloat16")) == 2 * total
    packed = load_packed_checkpoint(checkpoint, dtype="bfloat16", quantization="bfloat16")
    assert 2 * total <= weight_bytes(packed) < 2.2 * total  # rows and columns are padded to 32


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(("place", "kind"), [
    *(("cpu", kind) for kind in ("bfloat16", "int8", "int4")), *(("gpu", kind) for kind in ("int8", "int4", "fp8")),
])  # fmt: skip
def test_what_a_model_will_take_is_known_before_it_is_loaded(place, kind, is_tied, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "check_fits", lambda needed, **_: asked.append(needed))
    config = small_config(
        vocab_size=4096, hidden_size=192, intermediate_size=256, head_dim=32, tie_word_embeddings=is_tied
    )
    checkpoint = random_checkpoint(config)
    if place == "gpu":
        model = load_gpu_checkpoint(checkpoint, dtype="bfloat16", device="cpu", quantization=kind)
    else:
        model = load_packed_checkpoint(checkpoint, dtype="bfloat16", quantization=kind)
    assert asked == [pytest.approx(weight_bytes(model), rel=0.03)]


class Watched:
    """A checkpoint that knows how many of the matrices that it has given are still held by somebody."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self._given: list[weakref.ref] = []
        self.most = 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._inner.read(name).to(torch.float16)  # another dtype: a copy is made of each
        if tensor.dim() > 1:
            self._given.append(weakref.ref(tensor))
        self.most = max(self.most, sum(ref() is not None for ref in self._given))
        return tensor


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_packing_holds_no_second_copy_of_the_model(folder, kind):
    checkpoint = Watched(open_checkpoint(folder))
    model = load_packed_checkpoint(checkpoint, dtype="bfloat16", quantization=kind)
    assert len(model.model.layers) > 1
    assert checkpoint.most <= 2  # w1 and w3, which become one weight
