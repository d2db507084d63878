"""Fill a data folder from what people have: the OpenCompass data pack, its code, or parquet files of Hugging Face."""

import os
from dataclasses import dataclass
from pathlib import Path

from internlm2 import files
from internlm2.eval.data.configs import shots_of_configs
from internlm2.eval.data.folder import DataError
from internlm2.eval.data.parquet import read_parquets
from internlm2.eval.data.published import published_files


@dataclass(frozen=True)
class Imported:
    """What an import did: names relative to the data folder. skipped: was there already and stayed."""

    added: tuple[str, ...]
    skipped: tuple[str, ...]


def import_folder(source: Path, target: Path, *, copy: bool = False) -> Imported:
    """Put everything that `source` holds for the benchmarks into the data folder `target`.

    source: an OpenCompass `data/` folder (or the one that holds it), an OpenCompass checkout or installed package (for
    the worked examples), or a folder with parquet files, in any depth. Files of the pack are linked, or copied where
    `copy` says so or links are refused; others are written. Nothing that is there is touched.

    Raises DataError when the source is missing or holds nothing of use, ExportError when the target cannot be written.
    """
    if not source.is_dir():
        raise DataError(f"There is no folder {source} to import from.")
    added: list[str] = []
    skipped: list[str] = []
    found = _pack_files(source)
    for name, path in found.items():
        done = _place(path, target / name, copy=copy)
        (added if done else skipped).append(name)
    for contents in (shots_of_configs, read_parquets):
        for name, content in contents(source):
            if name in found or (target / name).exists() or name in added:
                skipped.append(name)
                continue
            files.write_bytes(target / name, content)
            added.append(name)
    if not added and not skipped:
        raise DataError(
            f"{source} holds no benchmark data. Give an OpenCompass `data/` folder (with mmlu/, AGIEval/, ...), an "
            "OpenCompass checkout, or a folder with parquet files of the datasets that `internlm2 eval data` names."
        )
    return Imported(tuple(added), tuple(dict.fromkeys(skipped)))


def _pack_files(source: Path) -> dict[str, Path]:
    """The files of the layout below `source` or `source/data`."""
    found = {}
    for file in published_files():
        for root in (source, source / "data"):
            if (root / file.name).is_file():
                found.setdefault(file.name, root / file.name)
    return found


def _place(path: Path, target: Path, *, copy: bool) -> bool:
    """Link or copy one file; False where something is there already."""
    if target.exists():
        return False
    if not copy:
        try:
            with files.writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(Path(os.path.abspath(path)))  # noqa: PTH100 - a link through links stays as written
        except OSError:
            pass  # a file system without links: copy
        else:
            return True
    files.write_bytes(target, path.read_bytes())
    return True
