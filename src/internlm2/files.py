"""Atomic files and folders: a reader sees the old content or the new, never half of it.

Everything the package writes goes through here; when writing fails, nothing is left behind.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internlm2.errors import ExportError


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the system's refusals to write `target` into an `ExportError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full. Free some space, or choose another folder"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "no permission to write there. Choose a folder that you own"
        elif isinstance(error, NotADirectoryError | FileExistsError):
            reason = f"{error.filename or target} is a file where a folder is needed. Choose another name"
        else:
            reason = f"{error.strerror or error}. Choose another name or folder"
        raise ExportError(f"Cannot write {target}: {reason}. Nothing was left half-written.") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write one file atomically (temporary file beside it, flushed to disk, renamed over it).

    Raises ExportError when the place cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_text(path: Path, content: str) -> None:
    """Write one UTF-8 text file atomically; raises ExportError when the place cannot be written."""
    write_bytes(path, content.encode())


@contextmanager
def new_folder(target: Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends well, and vanishes when not.

    Raises ExportError when `target` already holds something, when the disk has less than `need_bytes`
    free, or when the place cannot be written.
    """
    target = target.absolute()
    with writing(target):
        check_new(target)
        if target.is_dir() and target.samefile(Path.cwd()):
            raise ExportError(f"{target} is the current folder. Give the name of a new one, such as ./model.")
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target, need_bytes=need_bytes)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            if target.is_dir():
                target.rmdir()
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def new_file(target: Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary path that becomes the file `target` when the block ends well.

    Raises ExportError as `new_folder` does.
    """
    with writing(target):
        check_new(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target, need_bytes=need_bytes)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(descriptor)
        try:
            yield Path(name)
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def check_new(target: Path) -> None:
    """Refuse to write over something that is there (an empty folder is fine)."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise ExportError(f"{target} exists already. Remove it first, or choose another name.")


def check_space(target: Path, *, need_bytes: int) -> None:
    """Raise ExportError when the disk that will hold `target` has less than `need_bytes` free."""
    free_bytes = shutil.disk_usage(target.parent).free
    if need_bytes > free_bytes:
        raise ExportError(
            f"Cannot write {target}: it needs {need_bytes / 1e6:,.1f} MB and the disk has "
            f"{free_bytes / 1e6:,.1f} MB free. Free some space, or choose another folder."
        )
