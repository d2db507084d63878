"""Weight files from strangers: sharded safetensors, and .bin files read without running their pickle.

Every file is checked before a byte of it is used: names stay inside the folder, headers fit the file, and
what the index promises is there.
"""

import functools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open

from internlm2.checkpoint.config_json import read_json
from internlm2.checkpoint.source import Store, TensorInfo
from internlm2.errors import CheckpointError

_SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}


_SAFETENSORS_INTEGERS = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}


def open_store(folder: Path, *, allow_integers: bool = False) -> Store:
    """The weights of a folder: safetensors when there are any, else .bin. Raises CheckpointError when none.

    allow_integers: whole numbers too, as quantised safetensors hold them.
    """
    safetensors_store = functools.partial(SafetensorsStore, allow_integers=allow_integers)
    for name, store in (("model.safetensors", safetensors_store), ("pytorch_model.bin", TorchBinStore)):
        if (folder / f"{name}.index.json").exists():
            return store(folder, _files_of_index(folder, folder / f"{name}.index.json"))
        if (folder / name).exists():
            return store(folder, {name: None})
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{folder} has no weights: looked for model.safetensors, pytorch_model.bin and their .index.json; "
        f"found {found}. Download the weight files too."
    )


def _files_of_index(folder: Path, index: Path) -> dict[str, set[str] | None]:
    """File name -> the tensors that the index says it holds."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map. Download that file again.")
    files: dict[str, set[str] | None] = {}
    for tensor, file in weight_map.items():
        # NOTE: an index is a stranger's text; a name such as ../x must never lead out of the folder.
        if not isinstance(file, str) or Path(file).name != file or not 0 < len(file) <= 200 or file == "..":
            raise CheckpointError(
                f"{index}: tensor {tensor} points to {file!r}, which is not a plain file name in {folder}. "
                "This index is damaged or hostile; do not use it."
            )
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: {file} is missing, but the index needs it. Download that file.")
        files.setdefault(file, set()).add(tensor)  # type: ignore[union-attr]
    return files


def _check_promise(path: Path, promised: set[str] | None, found: set[str]) -> None:
    missing = (promised or set()) - found
    if missing:
        raise CheckpointError(
            f"{path}: tensor {min(missing)} is missing, but the index says that it is here. Download that file again."
        )


def _check_once(path: Path, new: Mapping[str, TensorInfo], known: Mapping[str, TensorInfo]) -> None:
    for name in new.keys() & known.keys():
        raise CheckpointError(f"{path}: tensor {name} is also in {known[name].file}. Remove stale shards.")


class SafetensorsStore:
    """One or more .safetensors files. Reading maps the file; the mapping ends with the tensor."""

    def __init__(
        self, folder: Path, files: Mapping[str, set[str] | None], *, allow_integers: bool = False
    ) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._dtypes = _SAFETENSORS_DTYPES | (_SAFETENSORS_INTEGERS if allow_integers else {})
        for file, promised in files.items():
            infos = self._scan(file)
            _check_promise(folder / file, promised, set(infos))
            _check_once(folder / file, infos, self.tensors)
            self.tensors |= infos

    def _scan(self, file: str) -> dict[str, TensorInfo]:
        path = self.folder / file
        infos: dict[str, TensorInfo] = {}
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.offset_keys():
                    view = opened.get_slice(name)
                    dtype = self._dtypes.get(view.get_dtype())
                    if dtype is None:
                        raise CheckpointError(
                            f"{path}: tensor {name} has dtype {view.get_dtype()}; only float weights are read. "
                            "Give the folder as it was before quantisation."
                        )
                    infos[name] = TensorInfo(tuple(view.get_shape()), dtype, file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged ({error}). Download that file again."
            ) from error
        return infos

    def read(self, name: str) -> torch.Tensor:
        """A view of the mapped file; private, so writing to it never reaches the file."""
        with safe_open(self.folder / self.tensors[name].file, framework="pt") as opened:
            return opened.get_tensor(name)


class TorchBinStore:
    """One or more torch .bin files, opened with `weights_only`: nothing in them is executed."""

    def __init__(self, folder: Path, files: Mapping[str, set[str] | None]) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._open_file: str | None = None
        self._open_tensors: dict[str, torch.Tensor] = {}
        for file, promised in files.items():
            found = self._tensors_of(file)
            _check_promise(folder / file, promised, set(found))
            infos = {n: TensorInfo(tuple(t.shape), t.dtype, file) for n, t in found.items()}
            _check_once(folder / file, infos, self.tensors)
            self.tensors |= infos

    def _tensors_of(self, file: str) -> dict[str, torch.Tensor]:
        if self._open_file != file:
            self._open_tensors = load_torch_file(self.folder / file)
            self._open_file = file
        return self._open_tensors

    def read(self, name: str) -> torch.Tensor:
        """One tensor; its file stays mapped until a tensor of another file is read."""
        return self._tensors_of(self.tensors[name].file)[name]


def load_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """A dict of tensors from a torch file, memory-mapped. Raises CheckpointError for anything else in it."""
    data = load_torch_object(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, but must hold a dict of tensors.")
    for name, tensor in data.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is not a tensor. Give a file that holds only weights."
            )
        if tensor.dtype not in _SAFETENSORS_DTYPES.values() or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{path}: tensor {name} is {tensor.layout} {tensor.dtype}; only dense float weights are read. "
                "Give the folder as it was before quantisation."
            )
    return data


def load_torch_object(path: Path) -> object:
    """torch.load without code execution; raises CheckpointError when the file is damaged or carries code."""
    try:
        with path.open("rb") as file:
            is_zip = zipfile.is_zipfile(file)
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors: its pickle asks to run code ({_short(error)}). "
            "It was not executed. Use a safetensors copy from a source that you trust."
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Download that file.") from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({_short(error)}). Download it again."
        ) from error


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if "GLOBAL" in line or "global" in line:
            return line[:160]
    return lines[0][:160] if lines else type(error).__name__
