"""Reading files within one folder, and nothing outside.

A path is walked one name at a time from an open descriptor of the folder, and no step follows a symbolic link; so
neither `..` nor a link, nor one that is swapped in meanwhile, leads out. Devices, pipes and binary files are refused.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated

from internlm2.agent.function.define import tool
from internlm2.agent.tool_type import Tool, ToolDefinitionError, ToolError

MAX_FILE_BYTES = 8 << 20
MAX_ENTRIES = 500
MAX_LINES = 2000
_LINE_CHARS = 2000
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not make us wait


class FolderReader:
    """Reads text files below `root`. Raises ToolDefinitionError when that is no folder."""

    def __init__(self, root: Path) -> None:
        try:
            self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ToolDefinitionError(
                f"Cannot read the folder {root}: {error.strerror or error}. Give a folder that is there."
            ) from error

    def close(self) -> None:
        """Let go of the folder. Safe to call twice."""
        root, self._root = self._root, -1
        if root >= 0:
            os.close(root)

    def tools(self) -> list[Tool]:
        """`read_file` and `list_files`."""

        def read_file(
            path: Annotated[str, "of a text file, relative to the folder, such as notes/plan.txt"],
            first_line: Annotated[int, "where to begin; the first is 1"] = 1,
            num_lines: Annotated[int, f"how many, at most {MAX_LINES}"] = 200,
        ) -> str:
            """Read lines of a text file."""
            return self.read(path, first_line=first_line, num_lines=num_lines)

        def list_files(path: Annotated[str, "a folder; '.' is the whole one"] = ".") -> str:
            """List the files and folders in a folder."""
            return self.list(path)

        return [tool(read_file), tool(list_files)]

    def read(self, path: str, *, first_line: int = 1, num_lines: int = 200) -> str:
        """Lines of a text file, and a note of how many there are if these are not all. Raises ToolError."""
        if first_line < 1 or not 1 <= num_lines <= MAX_LINES:
            raise ToolError(f"first_line is at least 1, and num_lines from 1 to {MAX_LINES}.")
        with self._opened(path, _FILE) as descriptor:
            text = _read_text(descriptor, path)
        lines = text.splitlines()
        chosen = lines[first_line - 1 : first_line - 1 + num_lines]
        shown = "\n".join(
            line
            if len(line) <= _LINE_CHARS
            else f"{line[:_LINE_CHARS]} [{len(line) - _LINE_CHARS} more characters]"
            for line in chosen
        )
        if len(chosen) == len(lines):
            return shown or "(empty file)"
        if not chosen:
            raise ToolError(f"{path!r:.200} has {len(lines)} lines, so it has none from {first_line} on.")
        last = first_line - 1 + len(chosen)
        return f"{shown}\n[lines {first_line} to {last} of {len(lines)}]".lstrip("\n")

    def list(self, path: str = ".") -> str:
        """What a folder holds, folders with a slash, files with their size. Raises ToolError."""
        with self._opened(path, _FOLDER) as descriptor, os.scandir(descriptor) as entries:
            found = sorted(
                _described(entry) for _, entry in zip(range(MAX_ENTRIES + 1), entries, strict=False)
            )
        rest = "\n[more are not shown]" if len(found) > MAX_ENTRIES else ""
        return "\n".join(found[:MAX_ENTRIES]) + rest if found else "(empty folder)"

    @contextmanager
    def _opened(self, path: str, flags: int) -> Iterator[int]:
        """A descriptor of what lies at `path`, reached without a link."""
        names = _names(path)
        opened: list[int] = []
        descriptor = self._root
        try:
            for n, name in enumerate(names):
                is_last = n == len(names) - 1
                descriptor = os.open(name, flags if is_last else _FOLDER, dir_fd=descriptor)
                opened.append(descriptor)
            if not names:
                descriptor = os.open(".", flags, dir_fd=self._root)
                opened.append(descriptor)
            yield descriptor
        except OSError as error:
            raise ToolError(_why(error, path)) from None
        finally:
            for each in opened:
                os.close(each)


def _names(path: str) -> list[str]:
    """The names on the way. Raises ToolError for a way that leads up or begins elsewhere."""
    if "\0" in path:
        raise ToolError("A path cannot hold the character NUL.")
    if path.startswith(("/", "~")):
        raise ToolError(
            f"{path!r:.200} is not below the folder. Give a path relative to it, or list_files '.'."
        )
    names = [name for name in PurePosixPath(path).parts if name != "."]
    if ".." in names:
        raise ToolError(f"{path!r:.200} leads out of the folder. Paths cannot hold '..'.")
    return names


def _read_text(descriptor: int, path: str) -> str:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise ToolError(f"{path!r:.200} is a folder. Use list_files.")
    if not stat.S_ISREG(mode):
        raise ToolError(f"{path!r:.200} is no ordinary file.")
    content = bytearray()
    while len(content) <= MAX_FILE_BYTES and (part := os.read(descriptor, 1 << 20)):
        content += part  # the size that the system tells may be wrong by now
    if len(content) > MAX_FILE_BYTES:
        raise ToolError(
            f"{path!r:.200} is larger than {MAX_FILE_BYTES >> 20} MiB, which this tool does not read."
        )
    if b"\0" in content:
        raise ToolError(f"{path!r:.200} is a binary file. Only text can be read.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ToolError(f"{path!r:.200} is no UTF-8 text. Only text can be read.") from None


def _described(entry: "os.DirEntry[str]") -> str:
    name = entry.name.encode("utf-8", "replace").decode()
    try:
        if entry.is_symlink():
            return f"{name} (a link, not followed)"
        if entry.is_dir(follow_symlinks=False):
            return f"{name}/"
        return f"{name} ({entry.stat(follow_symlinks=False).st_size:,} bytes)"
    except OSError:
        return name


def _why(error: OSError, path: str) -> str:
    if error.errno == errno.ENOENT:
        return f"There is no {path!r:.200}. list_files shows what there is."
    if error.errno in (errno.ELOOP, errno.EMLINK):
        return f"{path!r:.200} is a symbolic link, which is not followed."
    if error.errno == errno.ENOTDIR:  # also where a link stands where a folder is opened
        return f"{path!r:.200} leads over something that is no folder, or is a link, which is not followed."
    if error.errno == errno.EACCES:
        return f"{path!r:.200} may not be read."
    return f"{path!r:.200}: {error.strerror or error}."
