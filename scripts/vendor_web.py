"""Put the libraries of the web page into `serve/web/vendor`: `python scripts/vendor_web.py`. Needs npm, once, here.

Files are copied as they were published, with two exceptions that NOTICE.md states. To update: change a version, run
this, run `pytest tests/web`, look at the page.
"""

import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).parents[1] / "src" / "internlm2" / "serve" / "web" / "vendor"
LANGUAGES = (
    "bash", "c", "cpp", "css", "diff", "go", "java", "javascript", "json", "latex", "markdown", "python", "rust",
    "sql", "typescript", "xml", "yaml",
)  # fmt: skip


@dataclass(frozen=True)
class Library:
    """A package, and which of its files we ship under which name."""

    package: str
    version: str
    folder: str
    licence: str
    files: dict[str, str]


LIBRARIES = (
    Library(
        "markdown-it", "15.0.3", "markdown-it", "MIT",
        {"LICENSE": "LICENSE", "dist/browser/markdown-it.esm.min.mjs": "markdown-it.js"},
    ),
    Library(
        "@highlightjs/cdn-assets", "11.12.0", "highlight", "BSD-3-Clause",
        {"LICENSE": "LICENSE", "es/core.min.js": "core.js"}
        | {f"es/languages/{name}.min.js": f"languages/{name}.js" for name in LANGUAGES},
    ),
    Library(
        "katex", "0.19.1", "katex", "MIT",
        {"LICENSE": "LICENSE", "dist/katex.min.js": "katex.js", "dist/katex.min.css": "katex.css"},
    ),
)  # fmt: skip
HEAD = """# What others wrote

The web page brings these libraries along, so that it works without other hosts and without a build. They come from the
npm registry, by `scripts/vendor_web.py`. Changed: `.mjs` files are named `.js`, and `katex.css` names its woff2 fonts
alone. Licences lie beside the files.

| file | package | version | licence | sha256 |
|---|---|---|---|---|
"""


def main() -> None:
    """Fetch, copy, list."""
    shutil.rmtree(VENDOR, ignore_errors=True)
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for library in LIBRARIES:
            target = VENDOR / f"{library.folder}-{library.version}"
            _copy(library, _fetch(library, Path(scratch)), target)
            for path in sorted(target.rglob("*")):
                if path.is_file():
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    name = path.relative_to(VENDOR).as_posix()
                    rows.append(
                        f"| {name} | {library.package} | {library.version} | {library.licence} | {digest} |"
                    )
    (VENDOR / "NOTICE.md").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


def _fetch(library: Library, scratch: Path) -> Path:
    """The unpacked package."""
    place = scratch / library.folder
    place.mkdir()
    name = f"{library.package}@{library.version}"
    packed = subprocess.run(
        ["npm", "pack", "--silent", name], cwd=place, check=True, capture_output=True, text=True
    )
    with tarfile.open(place / packed.stdout.split()[-1]) as archive:
        archive.extractall(place, filter="data")
    return place / "package"


def _copy(library: Library, source: Path, target: Path) -> None:
    for old, new in library.files.items():
        (target / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / old, target / new)
    style = target / "katex.css"
    if style.is_file():
        (target / "fonts").mkdir()
        for font in (source / "dist" / "fonts").glob("*.woff2"):
            shutil.copyfile(font, target / "fonts" / font.name)
        text = style.read_text(encoding="utf-8")
        other = re.compile(r',url\([^)]+\.(?:woff|ttf)\) format\("[a-z]+"\)')
        style.write_text(other.sub("", text), encoding="utf-8")


if __name__ == "__main__":
    main()
