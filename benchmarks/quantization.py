"""What quantisation loses: methods, groups and formats, on English, Chinese and code, and where int8 loses it.

Run: python benchmarks/quantization.py. The demo model's weights come from a 4-bit file and lie on its grid, so they say
little about rounding others. Files are therefore made from the same network in another basis (internlm2.quant.basis):
it computes the same, and its weights lie on no grid. Calibration text comes with the package; the texts that are
measured on come from other sources (the project's corpora, `--corpora`). What was measured is kept in `--work`, so a
run that was cut off goes on where it stopped; remove that folder after changing the code.
"""

import argparse
import gzip
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from hardware import RESULTS, header

from internlm2.checkpoint.formats.official import ModelCheckpoint
from internlm2.checkpoint.load import load_model
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.quantization_loss import CALIBRATION_TEXT, measure_loss, read_text
from internlm2.checkpoint.quantize import QuantizeOptions, quantize_checkpoint
from internlm2.checkpoint.resolve import cache_root, resolve_model
from internlm2.checkpoint.save import save_checkpoint
from internlm2.checkpoint.source import Checkpoint
from internlm2.model.heads import CausalLM
from internlm2.quant.basis import in_another_basis

CORPORA = Path(__file__).parents[2] / "shared" / "data" / "corpora"
SOURCES = {
    "English": "en/debian-handbook.en.jsonl.gz",
    "Chinese": "zh/OI-wiki.jsonl.gz",
    "code": "code/python3.11-doc.code.jsonl.gz",
}
SEED = 0


@dataclass(frozen=True)
class Case:
    """One way to quantise. options: of a file; None: in the kernels, `quantization`. is_turned: in another basis."""

    name: str
    options: QuantizeOptions | None = None
    quantization: str | None = None
    is_turned: bool = True


def _file(kind: str, method: str, **options: object) -> Case:
    extra = "".join(f", {key} {value}" for key, value in options.items() if value is not True)
    extra += ", symmetric" if options.get("symmetric") else ""
    made = QuantizeOptions(kind=kind, method=method, **options)
    return Case(f"{kind} file, {method}{extra}", made)


CASES = (
    Case("bfloat16 in the kernels", quantization="bfloat16"),  # near ties tip here already
    Case("int8 in the kernels", quantization="int8"),
    Case("int4 in the kernels", quantization="int4"),
    Case("int4-symmetric in the kernels", quantization="int4-symmetric"),
    _file("int8", "rtn"),
    _file("int8", "gptq"),
    _file("int4", "rtn"),
    _file("int4", "awq"),
    _file("int4", "gptq"),
    _file("int4", "awq+gptq"),
    _file("int4", "rtn", group=64),
    _file("int4", "awq+gptq", group=64),
    _file("int4", "rtn", symmetric=True),
    _file("int4", "awq+gptq", symmetric=True),
    Case("demo as it is: int8 in the kernels", quantization="int8", is_turned=False),
    Case("demo as it is: int4 in the kernels", quantization="int4", is_turned=False),
    Case("demo as it is: int4-symmetric in the kernels", quantization="int4-symmetric", is_turned=False),
)


def main() -> None:
    """Measure what is not measured yet and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", type=Path, default=CORPORA)
    parser.add_argument(
        "--work", type=Path, default=cache_root() / "benchmark-quantization", help="keeps what was measured"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    figures = arguments.work / f"figures-{arguments.tokens}-{arguments.calibration_tokens}.json"
    known: dict[str, dict[str, object]] = json.loads(figures.read_text()) if figures.exists() else {}
    turned = _turned(arguments.work / "another-basis")
    for case in CASES:
        if arguments.only in case.name and case.name not in known:
            known[case.name] = _measure(case, turned, arguments)
            figures.write_text(json.dumps(known, indent=1))
            print(case.name, known[case.name], flush=True)
    (RESULTS / "quantization.md").write_text(_page(known, arguments), encoding="utf-8")


def _turned(folder: Path) -> Path:
    """The demo model in another basis, made once."""
    if not folder.exists():
        demo = resolve_model("demo")
        model = load_model(demo)
        assert isinstance(model, CausalLM)
        turned = in_another_basis(model, torch.Generator().manual_seed(SEED))
        save_checkpoint(ModelCheckpoint(turned, tokenizer_folder=demo), folder)
    return folder


def _measure(case: Case, turned: Path, arguments: argparse.Namespace) -> dict[str, object]:
    checkpoint = open_checkpoint(turned if case.is_turned else resolve_model("demo"))
    other: Checkpoint = checkpoint
    seconds = 0.0
    folder = arguments.work / "quantised"
    if case.options is not None:
        shutil.rmtree(folder, ignore_errors=True)
        text = read_text(checkpoint, CALIBRATION_TEXT, max_tokens=arguments.calibration_tokens)
        started = time.process_time()
        quantize_checkpoint(checkpoint, folder, case.options, text=text)
        seconds = time.process_time() - started
        other = open_checkpoint(folder)
    found: dict[str, object] = {"cpu_seconds": round(seconds, 1)}
    for language, source in SOURCES.items():
        excerpt = arguments.work / f"{language}.txt"
        excerpt.write_text("\n\n".join(_paragraphs(arguments.corpora / source)), encoding="utf-8")
        ids = read_text(checkpoint, excerpt, max_tokens=arguments.tokens)
        loss = measure_loss(checkpoint, other, ids, quantization=case.quantization)
        found[language] = {
            "num_tokens": loss.num_tokens,
            "perplexity": loss.perplexity[0],
            "rise": loss.perplexity_rise,
            "agreement": loss.top1_agreement,
            "kl": loss.kl_mean,
        }
        found["megabytes"] = loss.weight_bytes[1] / 1e6
    return found


def _paragraphs(path: Path, *, num_characters: int = 60_000) -> Iterator[str]:
    """Paragraphs from the middle of a corpus file: the beginning is often a licence."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    taken = 0
    for text in texts[len(texts) // 2 :]:
        yield text
        taken += len(text)
        if taken > num_characters:
            return


def _page(known: dict[str, dict[str, object]], arguments: argparse.Namespace) -> str:
    page = header("What quantisation loses", "python benchmarks/quantization.py", ("torch",))
    page += (
        "Model: SmolLM2-135M-Instruct from its Q4_1 file, in another basis (internlm2.quant.basis): the same outputs, "
        "weights on no grid;\nrows that begin with `demo as it is` keep the file's weights. Linears in groups of 32 "
        "unless said otherwise, head int8 by the kernels,\nactivations as the kernels round them, the rest float32. "
        f"Calibrated with {arguments.calibration_tokens:,} tokens that come with the package;\nmeasured on "
        f"{arguments.tokens:,} tokens each of other sources: {', '.join(SOURCES.values())}.\nEach cell: rise of the "
        "perplexity, share of positions with the same likeliest token, mean KL divergence in nats.\n\n"
    )
    first = next(iter(known.values()), None)
    if first is not None:
        values = ", ".join(f"{lang} {first[lang]['perplexity']:.2f}" for lang in SOURCES)
        page += f"Perplexity of the unquantised model: {values}.\n\n"
    page += (
        "| | "
        + " | ".join(SOURCES)
        + " | CPU seconds to quantise |\n|---|"
        + "---|" * (len(SOURCES) + 1)
        + "\n"
    )
    for case in CASES:
        if case.name in known:
            cells = [_cell(known[case.name][language]) for language in SOURCES]
            seconds = known[case.name]["cpu_seconds"] or "-"
            page += f"| {case.name} | {' | '.join(cells)} | {seconds} |\n"
    return page


def _cell(figures: object) -> str:
    assert isinstance(figures, dict)
    return f"{100 * figures['rise']:+.2f} %, {100 * figures['agreement']:.1f} %, {figures['kl']:.4f}"


if __name__ == "__main__":
    main()
