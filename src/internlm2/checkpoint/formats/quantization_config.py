"""`quantization_config` of a config.json: what a folder says about its quantised weights, or why it is not read.

Only compressed-tensors with whole numbers is read (https://github.com/neuralmagic/compressed-tensors). What a weight's
bits, groups and zeros are is told from its tensors; a scheme here only has to agree, so that no pattern of names from
a stranger's file is ever run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from internlm2.errors import CheckpointError

KEY = "quantization_config"
PACKED, PLAIN = "pack-quantized", "int-quantized"
_OTHERS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "fp8",
    "hqq": "HQQ",
    "quanto": "quanto",
    "torchao": "torchao",
    "eetq": "EETQ",
    "mxfp4": "MXFP4",
}
_ADVICE = (
    "Give the original folder and quantise it with `internlm2 model quantize`, or give a GGUF file, or a "
    "compressed-tensors folder with int4 or int8 weights."
)


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of one group of modules are stored. group: columns that share a scale; 0: all of a row."""

    bits: int
    group: int
    has_zeros: bool
    is_packed: bool

    def __str__(self) -> str:
        group = f"groups of {self.group}" if self.group else "one scale a row"
        return f"int{self.bits}, {group}, {'with' if self.has_zeros else 'without'} zeros"


def is_quantized(data: Mapping[str, object]) -> bool:
    """Whether a config.json says that its weights are quantised."""
    return data.get(KEY) is not None


def parse_quantization(data: object, *, where: str) -> list[WeightScheme]:
    """The schemes that `quantization_config` names. Raises CheckpointError for what is not read, saying why."""
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where}: {KEY} is {data!r:.80}, but must be an object. {_ADVICE}")
    method = str(data.get("quant_method") or "")
    if method != "compressed-tensors":
        if data.get("load_in_4bit") or data.get("load_in_8bit"):
            method = "bitsandbytes"
        name = _OTHERS.get(method, method[:40] or "a tool that it does not name")
        raise CheckpointError(
            f"{where}: these weights are already quantised by another tool ({name}). {_ADVICE}"
        )
    for key, what in (
        ("transform_config", "transforms of the weights"),
        ("kv_cache_scheme", "fixed scales for keys and values"),
        ("sparsity_config", "sparse weights"),
    ):
        value = data.get(key)
        is_dense = isinstance(value, Mapping) and value.get("format") == "dense"
        if value and not is_dense:
            raise CheckpointError(f"{where}: {KEY} asks for {what} ({key}), which are not read. {_ADVICE}")
    groups = data.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: {KEY} has no config_groups. Download config.json again.")
    return [
        _scheme(group, data.get("format"), where=f"{where}: {KEY}, {str(name)[:40]}")
        for name, group in groups.items()
    ]


def _scheme(data: object, default_format: object, *, where: str) -> WeightScheme:
    weights = data.get("weights") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(weights, Mapping):
        raise CheckpointError(f"{where} does not say how weights are stored. {_ADVICE}")
    stored = data.get("format") or default_format
    if stored not in (PACKED, PLAIN):
        raise CheckpointError(
            f"{where}: format is {stored!r:.60}, but must be {PACKED} or {PLAIN}. {_ADVICE}"
        )
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    if kind != "int" or bits not in (4, 8) or (stored == PLAIN and bits != 8):
        raise CheckpointError(
            f"{where}: weights are {kind!r:.20} with {bits!r:.20} bits; int with 4 or 8 is read. {_ADVICE}"
        )
    if str(weights.get("actorder")) in ("group", "dynamic", "True"):
        raise CheckpointError(
            f"{where}: columns are reordered (actorder='group'), which is not read. {_ADVICE}"
        )
    _check_activations(data, where)
    group = weights.get("group_size")
    if strategy in ("channel", "tensor") or (strategy is None and group in (None, -1)):
        group = 0
    elif (
        strategy not in (None, "group") or isinstance(group, bool) or not isinstance(group, int) or group < 1
    ):
        raise CheckpointError(
            f"{where}: strategy is {strategy!r:.20} with group_size {group!r:.20}, but must be 'group' with a size, "
            f"'channel' or 'tensor'. {_ADVICE}"
        )
    return WeightScheme(int(bits), group, weights.get("symmetric") is False, stored == PACKED)


def _check_activations(data: Mapping[str, object], where: str) -> None:
    inputs = data.get("input_activations")
    is_fine = inputs is None or (isinstance(inputs, Mapping) and inputs.get("dynamic") is True)
    if not is_fine or data.get("output_activations") is not None:
        raise CheckpointError(
            f"{where}: activations are rounded with fixed scales, which is not read. {_ADVICE}"
        )


def quantization_to_json(scheme: WeightScheme, *, targets: list[str], ignore: list[str]) -> dict[str, object]:
    """`quantization_config` for one scheme. targets, ignore: names of modules, or `re:` and a pattern."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": not scheme.has_zeros,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group or None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    return {
        "config_groups": {
            "group_0": {
                "targets": targets,
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": PACKED,
            }
        },
        "format": PACKED,
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
