"""Which files of the benchmarks are there, which are missing, and which are not what was published."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from internlm2.eval.data.published import PACK_URL, SOURCES, PublishedFile, published_files


@dataclass(frozen=True)
class FileStatus:
    """One file. state: "good", "missing", "differs" (other bytes than published) or "unchecked" (no sum is known)."""

    name: str
    state: str
    sha256: str
    published_sha256: str
    is_pack: bool


@dataclass(frozen=True)
class BenchmarkStatus:
    """The files of one benchmark, or the worked examples under the name "shots"."""

    name: str
    licence: str
    url: str
    hub: str
    note: str
    files: tuple[FileStatus, ...]

    @property
    def missing(self) -> list[str]:
        """Files that are not there."""
        return [file.name for file in self.files if file.state == "missing"]

    @property
    def is_absent(self) -> bool:
        """Whether nothing of it is there."""
        return len(self.missing) == len(self.files)

    @property
    def differing(self) -> list[str]:
        """Files with other bytes than published."""
        return [file.name for file in self.files if file.state == "differs"]


def examine(folder: Path) -> list[BenchmarkStatus]:
    """The state of every benchmark in a data folder, which may be empty or not there."""
    by_name: dict[str, list[FileStatus]] = {name: [] for name in SOURCES}
    for file in published_files():
        by_name[file.benchmark].append(_examine_file(folder, file))
    return [BenchmarkStatus(name, **asdict(SOURCES[name]), files=tuple(by_name[name])) for name in SOURCES]


def differing(sha256: Mapping[str, str]) -> list[str]:
    """Which files have other sums than published; those whose sum is not known are left out.

    sha256: by name, such as `DataFolder.sha256` after reading. For the note beside a score.
    """
    published = {file.name: file.sha256 for file in published_files() if file.sha256}
    return [name for name, found in sha256.items() if name in published and found != published[name]]


def _examine_file(folder: Path, file: PublishedFile) -> FileStatus:
    path = folder / file.name
    if not path.is_file():
        return FileStatus(file.name, "missing", "", file.sha256, file.is_pack)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    state = "unchecked" if not file.sha256 else "good" if sha256 == file.sha256 else "differs"
    return FileStatus(file.name, state, sha256, file.sha256, file.is_pack)


def as_text(folder: Path, found: Sequence[BenchmarkStatus], *, show_all: bool) -> str:
    """A page for people. show_all: every file with its sha256, not only those that need a look."""
    lines = [
        f"Data folder: {folder}",
        f"All of it (but the worked examples) is in the data pack of {PACK_URL}.",
        "",
    ]
    for benchmark in found:
        counts = [
            sum(file.state == state for file in benchmark.files) for state in ("good", "unchecked", "differs")
        ]
        words = [
            f"{n} {word}" for n, word in zip(counts, ("good", "unchecked", "different"), strict=True) if n
        ]
        words += [f"{len(benchmark.missing)} missing"] if benchmark.missing else []
        lines.append(f"{benchmark.name}: {len(benchmark.files)} files, {', '.join(words)}")
        lines.append(f"  licence {benchmark.licence}; from {benchmark.url}")
        if benchmark.hub:
            lines.append(f"  or parquet files of huggingface.co/datasets/{benchmark.hub}")
        if benchmark.note:
            lines.append(f"  {benchmark.note}")
        for file in benchmark.files:
            is_told = file.state == "differs" or (file.state == "missing" and not benchmark.is_absent)
            if show_all or is_told:
                lines.append(f"  {file.state:9} {file.name}  {file.published_sha256 or 'sha256 not known'}")
        if not show_all and benchmark.is_absent:
            first, last = benchmark.missing[0], benchmark.missing[-1]
            lines.append(f"  missing   {first}{'' if first == last else f' ... {last} (--all lists them)'}")
    if any(benchmark.differing for benchmark in found):
        lines += ["", "Files that differ are read all the same; their sha256 goes into every result."]
    return "\n".join(lines)
