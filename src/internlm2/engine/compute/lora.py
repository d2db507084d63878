"""LoRA adapters (arXiv 2106.09685): folders in PEFT format, many in memory, chosen row by row in one batch.

The factor alpha / r is folded into B when the files are read. `adapted_linear.py` computes; which rows take which
adapter is told by `Adapters.select`.
"""

import dataclasses
import itertools
import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from internlm2.checkpoint.config_json import read_json
from internlm2.checkpoint.source import Store, cast, expected_shapes
from internlm2.checkpoint.stores import SafetensorsStore, TorchBinStore
from internlm2.config import from_dict, suggest
from internlm2.engine.compute.adapted_linear import AdaptedLinear, Group, LowRank, Span, group_rows
from internlm2.errors import CheckpointError, RequestError
from internlm2.model.config import ModelConfig
from internlm2.model.heads import Model

ADAPTER_CONFIG_FILE = "adapter_config.json"
# NOTE: not `output`: the engine hands it other rows than the layers, those that need logits.
_MODULES = ("wqkv", "wo", "w1", "w2", "w3")
_LLAMA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
_MERGE = (
    "Merge the adapter into its model with PEFT (merge_and_unload, then save_pretrained) and load that folder"
)
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight")

# Keys of adapter_config.json that only matter where adapters are trained, found or placed.
_NEUTRAL = frozenset({
    "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "qalora_group_size", "ensure_weight_tying", "runtime_config",
})  # fmt: skip
_OFF: tuple[object, ...] = (None, False, "none", [], {})
# Ways to begin that leave the model's own weights alone; the others (pissa, olora, corda, ...) change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in memory. weights: module name, such as `model.layers.0.attention.wqkv` -> its factors."""

    path: Path
    weights: Mapping[str, LowRank]


@dataclass(frozen=True)
class _Options:
    """The keys of adapter_config.json that fix the mathematics, as PEFT names them."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    # As PEFT: the first pattern that is the end of the name, from a dot on.
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def load_adapter(
    path: str | Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
) -> Adapter:
    """Read a folder that PEFT's `save_pretrained` wrote.

    config: of the model that it will be used with. dtype, device: of that model's weights. Raises CheckpointError
    (ConfigError for values of a wrong type) when the folder is no plain LoRA adapter of this model.
    """
    folder, options, store, keys_by_module = _open_adapter(path, config)
    weights = {}
    for module, keys in keys_by_module.items():
        b = store.read(keys["B"]).float() * options.scale(module)
        # NOTE: a copy, never a view of the mapped file: a training run may write the same file again.
        weights[module] = LowRank(
            a=cast(store.read(keys["A"]), dtype, name=keys["A"]).to(device, copy=True),
            b=cast(b, dtype, name=keys["B"]).to(device),
        )
    return Adapter(folder, weights)


def check_adapter(path: str | Path, config: ModelConfig) -> None:
    """Raise what `load_adapter` would, from the headers of the files alone: before a large model is loaded."""
    _open_adapter(path, config)


def _open_adapter(
    path: str | Path, config: ModelConfig
) -> tuple[Path, _Options, Store, dict[str, dict[str, str]]]:
    """A folder, what its config says, its tensors, and their keys by module; all of it checked, nothing read."""
    folder = Path(path)
    options = _read_options(folder)
    store = _open_weights(folder)
    shapes = _target_shapes(config)
    keys_by_module = _keys_by_module(folder, store, shapes)
    for module, keys in keys_by_module.items():
        _check_shapes(folder, store, keys, rank=options.rank(module), shape=shapes[module])
    return folder, options, store, keys_by_module


def _read_options(folder: Path) -> _Options:
    where = folder / ADAPTER_CONFIG_FILE
    if not where.is_file():
        raise CheckpointError(
            f"{folder} has no {ADAPTER_CONFIG_FILE}, so it is not an adapter. Give a folder that PEFT's "
            "save_pretrained wrote; a merged model is loaded as a model."
        )
    data = read_json(where)
    if data.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {data.get('peft_type')!r}, but must be 'LORA'. {_MERGE}, or train a LoRA."
        )
    if data.get("init_lora_weights") not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{where}: init_lora_weights is {data['init_lora_weights']!r}, which also changed the model's own "
            "weights. Save the adapter as a plain one, with PEFT's path_initial_model_for_weight_conversion."
        )
    known = {f.name for f in dataclasses.fields(_Options)}
    for key, value in data.items():
        is_known = key in known or key in _NEUTRAL or key in ("peft_type", "init_lora_weights")
        if not is_known and value not in _OFF:
            raise CheckpointError(
                f"{where}: {key} is {value!r}, but the engine adds plain LoRA only. {_MERGE}; or remove the key, if it "
                "is new and mattered in training alone."
            )
    options = from_dict(
        _Options, {k: v for k, v in data.items() if k in known and v is not None}, where=str(where)
    )
    _check_ranks(options, where)
    return options


def _check_ranks(options: _Options, where: Path) -> None:
    for rank in (options.r, *options.rank_pattern.values()):
        if rank < 1:
            raise CheckpointError(
                f"{where}: a rank is {rank}, but must be 1 or more. Mend r or rank_pattern."
            )
    for pattern in (*options.rank_pattern, *options.alpha_pattern):
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{where}: pattern {pattern!r} is no regular expression ({error}). Mend rank_pattern or alpha_pattern."
            ) from error


def _open_weights(folder: Path) -> Store:
    for name, store in (
        ("adapter_model.safetensors", SafetensorsStore),
        ("adapter_model.bin", TorchBinStore),
    ):
        if (folder / name).is_file():
            return store(folder, {name: None})
    raise CheckpointError(
        f"{folder} has no adapter_model.safetensors or adapter_model.bin. Download the adapter's weights too."
    )


def _target_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Module name -> (out, in) of every linear that an adapter can change."""
    names = {name.removesuffix(".weight"): shape for name, shape in expected_shapes(config).items()}
    return {name: shape for name, shape in names.items() if name.rpartition(".")[2] in _MODULES}


def _keys_by_module(
    folder: Path, store: Store, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, str]]:
    """Module name -> {"A": key in the file, "B": key in the file}."""
    found: dict[str, dict[str, str]] = {}
    for key in store.tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{folder}: tensor {key} is not lora_A or lora_B of a linear. {_MERGE}.")
        module, factor = match["module"], match["factor"]
        if module.rpartition(".")[2] in _LLAMA_MODULES:
            raise CheckpointError(
                f"{folder}: tensor {key} belongs to the Llama layout. {_MERGE} (Llama-layout folders are read as they "
                "are), or train on wqkv, wo, w1, w2 and w3 of the InternLM2 layout."
            )
        if module not in shapes:
            num_layers = sum(name.endswith(".wqkv") for name in shapes)
            raise CheckpointError(
                f"{folder}: tensor {key} changes {module}, but adapters of this model may change "
                f"{', '.join(_MODULES)} in its {num_layers} layers. {_MERGE}, or check that it "
                "was trained on this model."
            )
        keys = found.setdefault(module, {})
        if factor in keys:
            raise CheckpointError(
                f"{folder}: {keys[factor]} and {key} are two adapters in one file. Save each to a folder of its own."
            )
        keys[factor] = key
    for module, keys in found.items():
        if len(keys) < 2:
            missing = "B" if "A" in keys else "A"
            raise CheckpointError(
                f"{folder}: {module} has no lora_{missing}. Save or download the adapter again."
            )
    if not found:
        raise CheckpointError(f"{folder} holds no adapter weights. Save or download the adapter again.")
    return found


def _check_shapes(
    folder: Path, store: Store, keys: Mapping[str, str], *, rank: int, shape: tuple[int, ...]
) -> None:
    num_out, num_in = shape
    for key, expected in ((keys["A"], (rank, num_in)), (keys["B"], (num_out, rank))):
        found = store.tensors[key].shape
        if found != expected:
            raise CheckpointError(
                f"{folder}: tensor {key} has shape {list(found)}, but rank {rank} on this model asks for "
                f"{list(expected)}. The adapter belongs to another model, or adapter_config.json to another adapter."
            )


@dataclass(eq=False)
class _Loaded:
    """An adapter that requests can name. number: of no other one. users: who holds it."""

    path: Path
    number: int
    users: set[int] = field(default_factory=set)


def check_known(name: str, known: Sequence[str]) -> None:
    """Raise RequestError when there is no adapter of that name."""
    if name not in known:
        none = (
            "None is loaded: load the model with adapters={name: folder}, or call adapters.add(name, folder)."
        )
        raise RequestError(
            f"There is no adapter called {name!r}. {suggest(name, list(known)) if known else none}"
        )


class Adapters:
    """The adapters of one loaded model. Made by `attach`, when the model lies where it will run.

    >>> adapters = Adapters.attach(model)
    >>> adapters.add("poet", "poet-folder")
    >>> adapters.select([(0, 7, "poet")])  # rows 0 to 6 of the next forward passes; the others: the model alone
    """

    def __init__(self, config: ModelConfig) -> None:
        """Adapters of no model yet: use `attach`."""
        self._config = config
        self._linears: dict[str, AdaptedLinear] = {}
        self._loaded: dict[str, _Loaded] = {}
        self._numbers = itertools.count()
        self._groups: list[Group] = []
        # NOTE: `release` may run inside a garbage collection, in a thread that is in here already.
        self._lock = threading.RLock()

    @classmethod
    def attach(cls, model: Model) -> "Adapters":
        """Put an `AdaptedLinear` in the place of wqkv, wo, w1, w2 and w3; names and parameters stay.

        Raises RequestError when a linear is not a plain one.
        """
        adapters = cls(model.config)
        for name in _target_shapes(model.config):
            base = model.get_submodule(name)
            if isinstance(base, AdaptedLinear):
                raise RequestError("The model has adapters attached already. Add to those, or load it again.")
            if type(base) is not nn.Linear:
                raise RequestError(
                    f"Adapters need a plain model, but {name} is a {type(base).__name__}. Load it unquantised, on one "
                    "device."
                )
            adapters._linears[name] = AdaptedLinear(base, adapters._groups)
        for name, linear in adapters._linears.items():
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_module(child, linear)
        return adapters

    @property
    def names(self) -> tuple[str, ...]:
        """What is loaded, in the order in which it was added."""
        return tuple(self._loaded)

    def add(self, name: str, path: str | Path) -> None:
        """Load the adapter in `path` and call it `name`. Raises RequestError for a name that is taken."""
        if name in self._loaded:
            raise RequestError(
                f"An adapter called {name!r} is loaded already, from {self._loaded[name].path}. Remove it first, or "
                "choose another name."
            )
        weight = next(iter(self._linears.values())).weight
        adapter = load_adapter(path, self._config, dtype=weight.dtype, device=weight.device)
        for module, factors in adapter.weights.items():
            self._linears[module].factors[name] = factors
        self._loaded[name] = _Loaded(adapter.path, next(self._numbers))

    def remove(self, name: str) -> None:
        """Forget an adapter and free its memory; a selection of it is cleared. From any thread.

        Raises RequestError when it is unknown, and when somebody holds it.
        """
        with self._lock:
            check_known(name, self.names)
            num_users = len(self._loaded[name].users)
            if num_users > 0:
                raise RequestError(
                    f"The adapter {name!r} cannot be removed while requests use it ({num_users} open). Wait for them, "
                    "or abort them."
                )
            if any(group.name == name for group in self._groups):
                self._groups.clear()  # then no forward is on its way: its requests would hold the adapter
            for linear in self._linears.values():
                linear.factors.pop(name, None)
            del self._loaded[name]

    def hold(self, name: str, user: int) -> int:
        """Keep an adapter from being removed until `release`. user: a number of the caller's own.

        Returns a number that no adapter of that name had before. Raises RequestError when it is unknown.
        """
        with self._lock:
            check_known(name, self.names)
            self._loaded[name].users.add(user)
            return self._loaded[name].number

    def release(self, name: str, user: int) -> None:
        """End a `hold`. May be called twice."""
        with self._lock:
            if name in self._loaded:
                self._loaded[name].users.discard(user)

    def select(self, spans: Sequence[Span]) -> None:
        """Say which rows of the next forward passes take which adapter; holds until the next call.

        spans: (start, end, name), rows [start, end) of the flattened input, in any order, disjoint; rows in none
        take the model alone, and () clears. Raises RequestError for an unknown name, and keeps the old selection.
        """
        groups = group_rows(spans, next(iter(self._linears.values())).weight.device)
        with self._lock:
            for group in groups:
                check_known(group.name, self.names)
            self._groups[:] = groups
