"""How fast text becomes ids: ours beside the library beneath it, alternating in one run, medians.

    python benchmarks/tokenizer.py [--folder FOLDER] [--text FILE ...] [--megabytes 2] [--rounds 7]

"Single" encodes text after text, "long" all of it joined into one: both on one thread, in processor time,
which other programs on the machine disturb less. "Batch" runs over as many threads as there are cores, in
wall time. Ids are compared before anything is timed.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import sentencepiece
import tokenizers

from internlm2 import Tokenizer
from internlm2.tokenizer.sentencepiece_backend import SentencePieceBackend

ROOT = Path(__file__).parents[1]
CORPORA = ROOT.parent / "shared" / "data" / "corpora"
KINDS = {
    "English": "en/perl-doc.en.jsonl.gz",
    "Chinese": "zh/OI-wiki.jsonl.gz",
    "code": "code/linux-doc-6.1.code.jsonl.gz",
}
Texts = list[str]


def read(path: Path, num_bytes: int) -> Texts:
    """Texts of about num_bytes from a JSON-lines file with "text", or paragraphs of a plain file."""
    texts: Texts = []
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        lines = (json.loads(line)["text"] for line in file) if ".jsonl" in path.name else file
        for text in lines:
            texts.append(text)
            num_bytes -= len(text.encode())
            if num_bytes < 0:
                break
    return texts


def megabytes(texts: Texts) -> float:
    """Size in UTF-8."""
    return sum(len(text.encode()) for text in texts) / 1e6


def seconds(work: Callable[[], object], *, clock: Callable[[], float]) -> float:
    """Time of one call."""
    start = clock()
    work()
    return clock() - start


def library(
    folder: Path, tokenizer: Tokenizer
) -> tuple[str, Callable[[str], list[int]], Callable[[Texts], object]]:
    """Name, encode and batch encode of the library beneath `tokenizer`."""
    threads = os.cpu_count() or 1
    if isinstance(tokenizer.backend, SentencePieceBackend):
        raw = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return "sentencepiece", raw.encode, lambda texts: raw.encode(texts, num_threads=threads)
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return fast.encode(text, add_special_tokens=False).ids

    def encode_batch(texts: Texts) -> list[list[int]]:
        return [e.ids for e in fast.encode_batch(texts, add_special_tokens=False)]

    return "tokenizers", encode, encode_batch


def measure(folder: Path, kind: str, texts: Texts, rounds: int) -> list[str]:
    """Table rows of one kind of text."""
    tokenizer = Tokenizer.from_pretrained(folder)
    name, encode, encode_batch = library(folder, tokenizer)
    joined = "\n".join(texts)
    assert tokenizer.encode(joined) == encode(joined), f"ids of {kind} differ"
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "single": (lambda: [tokenizer.encode(t) for t in texts], lambda: [encode(t) for t in texts]),
        "long": (lambda: tokenizer.encode(joined), lambda: encode(joined)),
        "batch": (lambda: tokenizer.encode_batch(texts), lambda: encode_batch(texts)),
    }
    rows: list[str] = []
    for way, (ours, theirs) in ways.items():
        clock = time.perf_counter if way == "batch" else time.process_time
        speeds: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
        for n in range(2 * rounds):
            work = (ours, theirs, theirs, ours)[n % 4]  # neither always goes first
            speeds[work].append(megabytes(texts) / seconds(work, clock=clock))
        our_speeds, their_speeds = speeds[ours], speeds[theirs]
        a, b = statistics.median(our_speeds), statistics.median(their_speeds)
        rows.append(
            f"| {kind} | {way} | {name} {b:.2f} ({min(their_speeds):.2f}-{max(their_speeds):.2f}) "
            f"| {a:.2f} ({min(our_speeds):.2f}-{max(our_speeds):.2f}) | {a / b:.2f} |"
        )
    return rows


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "tests" / "data" / "tokenizer")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="text or JSON-lines files to use")
    parser.add_argument("--megabytes", type=float, default=2.0, help="how much of each text")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    paths = {path.name: path for path in options.text} or {k: CORPORA / file for k, file in KINDS.items()}
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"sentencepiece {version('sentencepiece')}, tokenizers {version('tokenizers')}; "
        f"{options.rounds} rounds, medians, MB/s of UTF-8\n"
    )
    print("| text | how | library (min-max) | ours (min-max) | ours / library |\n|---|---|---|---|---|")
    for kind, path in paths.items():
        for row in measure(options.folder, kind, read(path, int(1e6 * options.megabytes)), options.rounds):
            print(row, flush=True)


if __name__ == "__main__":
    main()
