"""API keys. A file holds a name and the SHA-256 of a key on each line, never the key itself.

A key has 256 random bits, so a plain hash cannot be turned back by guessing.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from internlm2 import files
from internlm2.errors import ConfigError

PREFIX = "sk-internlm2-"
_LINE = re.compile(r"([\w.-]{1,64})\s+sha256:([0-9a-f]{64})")


def digest(key: str) -> bytes:
    """What is kept of a key. Any text is taken, lone surrogates too."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def owner(keys: Mapping[str, bytes], given: bytes) -> str | None:
    """Whose key this is, as its bytes came. All keys are compared, each in constant time."""
    found, given_digest = None, hashlib.sha256(given).digest()
    for name, known in keys.items():
        if hmac.compare_digest(known, given_digest):
            found = name
    return found


def read_keys(path: Path) -> dict[str, bytes]:
    """The hashes of a file by name. Raises ConfigError for a file that is missing, empty or not of this form."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Cannot read the keys in {path}: {error}. Make one with `internlm2 key NAME --keys {path}`."
        ) from error
    keys: dict[str, bytes] = {}
    for n, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(
                f"{path}, line {n}: not `NAME sha256:64 hexadecimal digits`. "
                "Keys themselves are not kept here; `internlm2 key` writes such a line."
            )
        if match[1] in keys:
            raise ConfigError(
                f"{path}, line {n}: {match[1]!r} has a key already. Give each a name of its own."
            )
        keys[match[1]] = bytes.fromhex(match[2])
    if not keys:
        raise ConfigError(f"{path} holds no key. Make one with `internlm2 key NAME --keys {path}`.")
    return keys


def add_key(path: Path, name: str) -> str:
    """Make a key, append its hash to the file, and return the key: it is nowhere else. Raises ConfigError."""
    key = PREFIX + secrets.token_urlsafe(32)
    line = f"{name} sha256:{digest(key).hex()}"
    if _LINE.fullmatch(line) is None:
        raise ConfigError(f"The name {name!r} must be 1 to 64 letters, digits, '_', '-' or '.'.")
    known = read_keys(path) if path.exists() else {}
    if name in known:
        raise ConfigError(
            f"{path} has a key of {name!r} already. Take that line out first, or use another name."
        )
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    files.write_text(path, before + ("" if before.endswith("\n") or not before else "\n") + line + "\n")
    path.chmod(0o600)
    return key
