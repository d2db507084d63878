"""How the engine holds a model's weights: as they are, or packed for the C++ kernels; and loading them so.

Left to itself ("auto") it packs where the same weights compute faster packed: bfloat16 on a CPU whose kernels have
vector instructions. The choice is said in the log, because the last bits of the results depend on it.
"""

import logging
from dataclasses import dataclass

import torch

from internlm2.checkpoint.formats.compressed_tensors import QuantizedCheckpoint
from internlm2.checkpoint.load import file_dtype, load_checkpoint, parse_device
from internlm2.checkpoint.load_gpu import load_gpu_checkpoint
from internlm2.checkpoint.load_packed import default_cache, load_packed_checkpoint
from internlm2.checkpoint.source import Checkpoint, dtype_name, parse_dtype
from internlm2.errors import RequestError
from internlm2.kernels.library import library
from internlm2.model.heads import Model, RopeMode
from internlm2.quant.gpu import GpuLinear, parse_gpu_kind
from internlm2.quant.linear import PackedLinear
from internlm2.quant.weight import FORMATS

AUTO, NONE = "auto", "none"
OWN = "own"  # as quantised files hold them
PACKED_DTYPES = (torch.bfloat16, torch.float32)  # in which the kernels compute
# Of the instructions that kernels may use, those with which packed bfloat16 beats torch. Without vectors, torch's own
# products are many times faster.
FAST_LEVELS = ("avx2", "avx512")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightChoice:
    """How weights are held. dtype: of what is computed. packed_as: "bfloat16", "int8", "int4", or "own" for the whole
    numbers of quantised files; on a GPU "int8", "int4" or "fp8"; None: plain tensors. why: a few words for people.
    """

    dtype: str
    packed_as: str | None
    why: str

    @property
    def label(self) -> str:
        """For tables and settings: "plain", or the kind of the packed weights."""
        return self.packed_as or "plain"

    @property
    def held(self) -> str:
        """For people: how, in which dtype, and why."""
        kind = "plain" if self.packed_as is None else f"packed as {self.packed_as}"
        if self.packed_as == OWN:
            kind = "packed as the files have them"
        return f"{kind}, computing in {self.dtype} ({self.why})"

    def __str__(self) -> str:
        return f"Weights are {self.held}."


def choose_weights(
    *,
    wanted: str,
    dtype: str,
    device: str,
    is_quantized: bool = False,
    needs_plain: str | None = None,
) -> WeightChoice:
    """How to hold weights that are to compute in `dtype` on `device`.

    wanted: "auto", a format of `quant.weight.FORMATS`, on a GPU one of `quant.gpu.GPU_KINDS`, or "none" for plain
    ones. is_quantized: the files hold whole numbers. needs_plain: which option needs the linears as they are.
    Raises RequestError when `wanted` cannot be.
    """
    is_on_cpu = parse_device(device).type == "cpu"
    if wanted == AUTO:
        return _choose(dtype, device if not is_on_cpu else None, is_quantized, needs_plain)
    if wanted == NONE:
        return WeightChoice(dtype, None, "as asked for")
    if not is_on_cpu:
        kind = parse_gpu_kind(wanted, dtype=parse_dtype(dtype), device=parse_device(device))
        return WeightChoice(dtype, kind, "as asked for")
    if wanted not in FORMATS:
        raise RequestError(
            f"quantization={wanted!r} is for GPUs, but device is {device!r}. Use quantization='int8' or 'int4'."
        )
    return WeightChoice(dtype, wanted, "as asked for")


def _choose(dtype: str, gpu: str | None, is_quantized: bool, needs_plain: str | None) -> WeightChoice:
    """What "auto" means. gpu: the device, None: the CPU."""
    packed_as = None
    if gpu is not None:
        why = f"packing is for the CPU, the device is {gpu}"
    elif needs_plain is not None:
        why = f"{needs_plain} needs them so"
    elif is_quantized and parse_dtype(dtype) in PACKED_DTYPES:
        packed_as, why = OWN, "the files are quantised"
    elif dtype != "bfloat16":
        why = "only bfloat16 is packed unasked"
    elif (built := library()) is None:
        why = "the C++ kernels are not available"
    elif built.level_name not in FAST_LEVELS:
        why = f"the C++ kernels have only {built.level_name} instructions here"
    else:
        packed_as, why = "bfloat16", f"the same weights, for the C++ kernels with {built.level_name}"
    return WeightChoice(dtype, packed_as, why)


def choose_for(
    checkpoint: Checkpoint, *, wanted: str, dtype: str, device: str, needs_plain: str | None = None
) -> WeightChoice:
    """As `choose_weights` for a checkpoint; dtype "auto" is that of its files."""
    return choose_weights(
        wanted=wanted,
        dtype=dtype_name(file_dtype(checkpoint)) if dtype == AUTO else dtype,
        device=device,
        is_quantized=isinstance(checkpoint, QuantizedCheckpoint),
        needs_plain=needs_plain,
    )


def weight_bytes(model: Model) -> int:
    """Memory of all weights of a loaded model, shared ones once."""
    plain = {weight.data_ptr(): weight.nbytes for weight in model.parameters()}
    packed = (
        module.packed.num_bytes for module in model.modules() if isinstance(module, PackedLinear | GpuLinear)
    )
    return sum(plain.values()) + sum(packed)


def load_for_inference(
    checkpoint: Checkpoint, choice: WeightChoice, *, device: str, rope_mode: RopeMode = "stateless"
) -> Model:
    """The model with its weights as chosen. Raises as `load_checkpoint` and `load_packed_checkpoint`."""
    _log.info("%s", choice)
    if choice.packed_as is None:
        return load_checkpoint(checkpoint, dtype=choice.dtype, device=device, rope_mode=rope_mode)
    if parse_device(device).type != "cpu":
        return load_gpu_checkpoint(
            checkpoint,
            dtype=choice.dtype,
            device=device,
            quantization=choice.packed_as,
            rope_mode=rope_mode,
        )
    return load_packed_checkpoint(
        checkpoint,
        dtype=choice.dtype,
        quantization=None if choice.packed_as == OWN else choice.packed_as,
        rope_mode=rope_mode,
        cache=default_cache(),
    )
