"""A folder in the layout of OpenCompass' `data/`, read strictly: what is missing or damaged is named, never skipped."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from internlm2.errors import InternLM2Error


class DataError(InternLM2Error):
    """A benchmark file that is missing or damaged; the text says which, where it belongs and how to get it."""


class DataFolder:
    """Reads benchmark files and remembers their sha256, which belongs to every score.

    path: the folder that holds `mmlu/`, `AGIEval/` and so on; is_own: files of the user's own instead. Files are read
    anew at every call.
    """

    def __init__(self, path: str | Path, *, is_own: bool = False) -> None:
        self.path = Path(path)
        self._is_own = is_own
        self.sha256: dict[str, str] = {}

    def bytes(self, name: str) -> bytes:
        """The content of a file, named relative to the folder. Raises DataError when it is not there."""
        try:
            content = (self.path / name).read_bytes()
        except FileNotFoundError:
            if self._is_own:
                raise DataError(f"There is no file {self.path / name}. Check its name.") from None
            raise DataError(
                f"{name} is not in {self._where}. "
                f"`internlm2 eval data --data {self.path}` says what is missing and where to get it."
            ) from None
        except OSError as error:
            raise DataError(f"Cannot read {self.path / name}: {error.strerror or error}.") from error
        self.sha256[name] = hashlib.sha256(content).hexdigest()
        return content

    @cached_property
    def _where(self) -> str:
        return f"the data folder {self.path}" if self.path.is_dir() else f"{self.path}, which is no folder"

    def text(self, name: str) -> str:
        """A UTF-8 file, line ends as they are. Raises DataError also for other encodings."""
        try:
            return self.bytes(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.damaged(name, f"it is not UTF-8 ({error.reason} at byte {error.start})") from error

    def json(self, name: str) -> object:
        """A JSON file."""
        return self._parse(name, self.text(name), line=None)

    def rows(self, name: str, fields: Sequence[str]) -> list[dict[str, object]]:
        """The objects of a JSON-lines file, each with all `fields`."""
        lines = self.text(name).split("\n")
        rows = [self._parse(name, line, line=n) for n, line in enumerate(lines, 1) if line.strip()]
        return [self.checked(name, row, fields, f"line {n}") for n, row in enumerate(rows, 1)]

    def table(self, name: str, num_columns: int | None) -> list[list[str]]:
        """The rows of a CSV file, with exactly `num_columns` fields if given; "None" and "NA" stay text."""
        try:
            rows = list(csv.reader(io.StringIO(self.text(name), newline="")))
        except csv.Error as error:
            raise self.damaged(name, f"it is no CSV ({error})") from error
        for n, row in enumerate(rows, 1):
            if num_columns is not None and len(row) != num_columns:
                raise self.damaged(name, f"row {n} has {len(row)} fields instead of {num_columns}")
        return rows

    def checked(self, name: str, row: object, fields: Sequence[str], where: str) -> dict[str, object]:
        """The row itself, where it is an object with all fields."""
        if not isinstance(row, dict):
            raise self.damaged(name, f"{where} is no JSON object")
        missing = [key for key in fields if key not in row]
        if missing:
            raise self.damaged(name, f"{where} has no field {missing[0]!r}")
        return row

    def damaged(self, name: str, what: str) -> DataError:
        """The error for a file whose content is not what it should be."""
        if self._is_own:
            return DataError(f"{self.path / name} cannot be read: {what}. Mend it, or leave it out.")
        return DataError(f"{self.path / name} is damaged: {what}. Get it again (see `internlm2 eval data`).")

    def _parse(self, name: str, text: str, *, line: int | None) -> object:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            place = "" if line is None else f"line {line}: "
            raise self.damaged(name, f"{place}{error}") from error
