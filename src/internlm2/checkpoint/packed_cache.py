"""Packed weights on disk, so that a model is rounded and packed once and not at every start.

One file for each model and format. Its name is a hash of everything that decides its content: path, size and times of
the model's files, the formats, and the code that rounds and packs. So what has changed is simply not found. A file is
written beside its place and renamed, and every tensor's checksum is compared when it is read; a bad file is removed.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from internlm2.checkpoint.arena import FIELDS
from internlm2.kernels import PackedWeight, packed
from internlm2.quant import weight as weight_code

MAX_CACHE_BYTES = 32_000_000_000  # of all files; the least recently used go first
MIN_WEIGHT_BYTES = 8_000_000  # less is packed quicker than it is looked up
MAX_READERS = 4  # threads; two take a file from the memory of the system about as fast as it comes
_FREE_SHARE = 0.5  # of the free disk space, at most, for a new file
_ALIGNMENT = 4096
_MAGIC = b"ilm2pkw2"
_SUFFIX = ".packed"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheEntry:
    """A file of the cache. used_seconds: when it was last read, in seconds since 1970."""

    path: Path
    num_bytes: int
    used_seconds: float


class PackedCache:
    """The files below `root`. Nothing here raises: a cache that cannot be used is a cache that is empty."""

    def __init__(self, root: Path, *, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self.root = root
        self._max_bytes = max_bytes

    def entries(self) -> list[CacheEntry]:
        """What is there, the least recently used first."""
        found = []
        for path in self.root.glob(f"*{_SUFFIX}"):
            try:
                stat = path.stat()
            except OSError:  # removed meanwhile
                continue
            found.append(CacheEntry(path, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda entry: entry.used_seconds)

    def clear(self) -> int:
        """Remove all files; the bytes that were freed."""
        freed = 0
        for entry in self.entries():
            if _remove(entry.path):
                freed += entry.num_bytes
        return freed

    def open(self, key: str) -> "CachedWeights | None":
        """The weights under `key`, or None. Threads begin to read them at once."""
        path = self.root / f"{key}{_SUFFIX}"
        try:
            opened = CachedWeights(path, num_threads=min(MAX_READERS, torch.get_num_threads()))
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("Packed weights in %s are damaged (%s); they are packed again.", path, error)
            _remove(path)
            return None
        return opened

    def writer(self, key: str, *, expected_bytes: int) -> "CacheWriter | None":
        """Where to put weights; None when they are too many or the disk is too full."""
        if not MIN_WEIGHT_BYTES <= expected_bytes <= self._max_bytes:
            return None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if expected_bytes > shutil.disk_usage(self.root).free * _FREE_SHARE:
                return None
            return CacheWriter(self, self.root / f"{key}{_SUFFIX}")
        except OSError as error:
            _log.debug("No cache of packed weights: %s", error)
            return None

    def make_room(self) -> None:
        """Remove the least recently used files until the rest fits, and what a killed process left behind."""
        entries = self.entries()
        total = sum(entry.num_bytes for entry in entries)
        for entry in entries[:-1]:
            if total <= self._max_bytes:
                break
            if _remove(entry.path):
                total -= entry.num_bytes
        for path in self.root.glob(".*.part"):
            try:
                if time.time() - path.stat().st_mtime > 24 * 3600:
                    _remove(path)
            except OSError:
                continue


class CacheWriter:
    """Weights on their way into the cache; nothing is there before `commit`."""

    def __init__(self, cache: PackedCache, target: Path) -> None:
        self._cache = cache
        self._target = target
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=target.parent)
        self._path: Path | None = Path(name)
        self._file: BinaryIO = os.fdopen(descriptor, "wb")
        self._header: dict[str, dict[str, object]] = {}

    def add(self, name: str, weight: PackedWeight | torch.Tensor) -> None:
        """Write one weight, packed or as it is; when the disk refuses, the whole file is given up."""
        if self._path is None:
            return
        try:
            if isinstance(weight, torch.Tensor):
                self._header[name] = self._put(weight)
                return
            values: dict[str, object] = {}
            for field in FIELDS:
                value = getattr(weight, field)
                values[field] = self._put(value) if isinstance(value, torch.Tensor) else value
            self._header[name] = values
        except OSError as error:
            _log.debug("No cache of packed weights: %s", error)
            self.drop()

    def _put(self, tensor: torch.Tensor) -> dict[str, object]:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        start = self._file.tell()
        data = tensor.contiguous().view(torch.uint8).flatten().numpy().data
        self._file.write(data)
        return {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "start": start,
            "crc32": zlib.crc32(data),
        }

    def commit(self) -> None:
        """Make the file visible, whole."""
        if self._path is None:
            return
        try:
            header = json.dumps(self._header).encode()
            self._file.write(header)
            self._file.write(
                zlib.crc32(header).to_bytes(8, "little") + len(header).to_bytes(8, "little") + _MAGIC
            )
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._path.replace(self._target)
            self._path = None
            self._cache.make_room()
        except OSError as error:
            _log.debug("No cache of packed weights: %s", error)
            self.drop()

    def drop(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        if self._path is not None:
            _remove(self._path)
            self._path = None


class CachedWeights:
    """A file of the cache: its header is read at once, its weights by threads, all into one piece of memory.

    Raises ValueError or OSError when it is not whole.
    """

    def __init__(self, path: Path, *, num_threads: int = MAX_READERS) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            self._header, num_bytes = self._read_header()
            tensors = [value for entry in self._header.values() for value in _tensors_of(entry)]
            self._memory = packed.allocate(num_bytes)
            self._readers = ThreadPoolExecutor(num_threads, thread_name_prefix="packed-weights")
            self._parts = {info["start"]: self._readers.submit(self._take, info) for info in tensors}
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[Mapping[str, Mapping[str, Any]], int]:
        """The header, and the bytes before it."""
        end = self._file.seek(0, os.SEEK_END) - 24
        self._file.seek(max(0, end))
        footer = self._file.read()
        length = int.from_bytes(footer[8:16], "little")
        if end < 0 or footer[16:] != _MAGIC or length > end:
            raise ValueError("it is cut off")
        self._file.seek(end - length)
        text = self._file.read(length)
        if zlib.crc32(text) != int.from_bytes(footer[:8], "little"):
            raise ValueError("its header does not match its checksum")
        return json.loads(text), end - length

    def read(self, name: str) -> PackedWeight:
        """One weight. Raises ValueError when it is not there or its bytes are not those that were written."""
        values = dict(self._entry(name))
        if set(values) != set(FIELDS):
            raise ValueError(f"{name} has other fields than PackedWeight")
        for key, value in values.items():
            if isinstance(value, Mapping):
                values[key] = self._parts[value["start"]].result()
        return PackedWeight(**values)

    def read_tensor(self, name: str) -> torch.Tensor:
        """One tensor that is kept as it is. Raises ValueError as `read` does."""
        return self._parts[self._entry(name)["start"]].result()

    def _entry(self, name: str) -> Mapping[str, Any]:
        if name not in self._header:
            raise ValueError(f"{name} is not there")
        return self._header[name]

    def _take(self, info: Mapping[str, Any]) -> torch.Tensor:
        dtype, shape, start = getattr(torch, info["dtype"]), info["shape"], info["start"]
        memory = self._memory[start : start + torch.Size(shape).numel() * dtype.itemsize]
        view, done = memory.numpy().data, 0
        while done < len(view):  # NOTE: a call reads at most 2 GiB
            count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if count == 0:
                break
            done += count
        if done != len(view) or zlib.crc32(view) != info["crc32"]:
            raise ValueError("a tensor does not match its checksum")
        return memory.view(dtype).view(shape)

    def close(self) -> None:
        """Let go of the file; what is not read yet stays unread."""
        self._readers.shutdown(cancel_futures=True)
        self._file.close()

    def forget(self) -> None:
        """Remove a file that turned out to be damaged."""
        self.close()
        _remove(self.path)


def _tensors_of(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the header says of the tensors of a weight, or of one tensor alone."""
    if "start" in entry:
        yield entry
    else:
        yield from (value for value in entry.values() if isinstance(value, Mapping))


def cache_key(paths: list[Path], *, what: str) -> str:
    """The name for what `what` makes of the files `paths`: other files, formats or code give another name."""
    digest = hashlib.sha256(f"{_MAGIC!r}|{what}|{torch.__version__}".encode())
    for path in sorted(paths):
        stat = path.stat()
        times = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        digest.update(f"|{path.resolve()}|{times}".encode())
    # Whoever changes how weights are rounded or laid out makes new files without having to think of it.
    for source in (weight_code.__file__, packed.__file__, Path(packed.__file__).parent / "cpu" / "layout.h"):
        digest.update(hashlib.sha256(Path(source).read_bytes()).digest())
    return digest.hexdigest()[:32]


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
