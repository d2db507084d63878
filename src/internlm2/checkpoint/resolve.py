"""A model argument -> a local path: a folder or file, a Hugging Face id, or `demo`.

Downloads are resumable and kept by huggingface_hub; Python files of a repository are never fetched.
"""

import os
from collections.abc import Callable
from pathlib import Path

from internlm2.checkpoint.demo import prepare_demo
from internlm2.errors import CheckpointError, DownloadError

DEMO = "demo"
_TEXT_FILES = ["*.json", "*.model", "*.jinja", "LICENSE*", "*.txt"]

Snapshot = Callable[..., str]


def cache_root() -> Path:
    """Where the package keeps what it made itself: the user's cache folder / internlm2."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "internlm2"


def resolve_model(argument: str | Path) -> Path:
    """The local path of a model; downloads it first when it is an id or `demo`.

    argument: a folder, a GGUF file, `demo`, or `organisation/name` with an optional `@revision`.
    Raises CheckpointError when it is neither a path nor an id, DownloadError when it cannot be fetched.
    """
    text = str(argument)
    if text == DEMO:  # a folder of that name is ./demo
        return prepare_demo(cache_root())
    try:
        path = Path(argument).expanduser()
        if text and path.exists():
            return path
    except (OSError, RuntimeError, ValueError):  # too long, NUL, the home of nobody: no such file in any case
        pass
    if _looks_like_id(text):
        return download(text)
    raise CheckpointError(
        f"No model at {text!r}: there is no such folder or file, and it is not a Hugging Face id such as "
        "internlm/internlm2-chat-7b. Check the spelling, or try `demo`."
    )


def _looks_like_id(text: str) -> bool:
    organisation, slash, name = text.partition("/")
    parts = (organisation, name)
    return bool(slash) and "/" not in name and all(p and p[0] not in ".~" and "\\" not in p for p in parts)


def download(model_id: str, *, fetch: Snapshot | None = None, local_folder: Path | None = None) -> Path:
    """Fetch a repository from Hugging Face, continuing an earlier try; without network, use what is cached.

    model_id: `organisation/name[@revision]`. fetch: huggingface_hub.snapshot_download, or a stand-in in tests.
    local_folder: put the files there instead of the shared cache. Raises DownloadError.
    """
    if fetch is None:
        from huggingface_hub import snapshot_download  # takes half a second to import

        fetch = snapshot_download
    name, _, revision = model_id.partition("@")

    def get(weights: str) -> Path:
        patterns = [*_TEXT_FILES, weights]
        return Path(fetch(name, revision=revision or None, local_dir=local_folder, allow_patterns=patterns))

    try:
        folder = get("*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = get("*.bin")
    except Exception as error:
        # huggingface_hub raises its own, httpx's and the system's errors; each means: it did not arrive.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DownloadError(
            f"Could not download {model_id}: {type(error).__name__}: {reason}. Check the name and the network, "
            "then run the same command again: what has arrived is kept and the rest is fetched."
        ) from error
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise DownloadError(f"{model_id} holds no weights (.safetensors or .bin). Check the name.")
    return folder
