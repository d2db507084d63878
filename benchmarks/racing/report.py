"""The result file: goals as a checklist, a table for every cell, quality, settings, and every single sample."""

import json
from pathlib import Path

from hardware import RESULTS, header

from racing.course import HEATS, Cell
from racing.engines import ENGINES, EngineSpec, find
from racing.goals import Findings, goals
from racing.models import SHAPES, Models
from racing.peers import LLAMA_SDIST, PINS
from racing.picture import draw
from racing.quality import Quality, read_quality
from racing.samples import Samples

NAME = "race"


class Notes:
    """What engines said when they were loaded, beside the samples: {shape/engine: facts and seconds}."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all: dict[str, dict[str, object]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, spec: EngineSpec, facts: dict[str, str], load_seconds: float) -> None:
        """Keep them; the fastest start counts, since the first one may have packed weights."""
        key = f"{spec.shape}/{spec.name}"
        before = self.all.get(key, {}).get("load_seconds", load_seconds)
        assert isinstance(before, float)
        self.all[key] = {"facts": facts, "load_seconds": min(before, load_seconds)}
        self._path.write_text(json.dumps(self.all, indent=1), encoding="utf-8")


def gather(samples: Samples, notes: Notes, quality: Quality | None, models: Models) -> Findings:
    """Samples and what is needed to read them."""
    shapes = [s for s in SHAPES if any(sample.shape == s for sample in samples.all)]
    configs = {shape: models.config(shape) for shape in shapes}
    weight_bytes, load_seconds = {}, {}
    for spec in ENGINES:
        note = notes.all.get(f"{spec.shape}/{spec.name}")
        if note is None or spec.shape not in shapes:
            continue
        key = (spec.shape, spec.name)
        if spec.is_ours:
            weight_bytes[key] = int(note["facts"]["weight_bytes"])
            load_seconds[key] = float(note["load_seconds"])
        elif models.path(spec.shape, spec.form).exists():
            weight_bytes[key] = models.weight_bytes(spec.shape, spec.form)
    return Findings(samples, configs, weight_bytes, load_seconds, quality)


def write_report(
    samples: Samples, notes: Notes, quality_path: Path, models: Models, *, into: Path | None
) -> None:
    """Write race.md and race.svg. into: a folder; None: where results lie."""
    quality = read_quality(quality_path)
    found = gather(samples, notes, quality, models)
    folder = into or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    text = header("The race", "python benchmarks/race.py run", ("torch",)) + body(found, notes)
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
    draw(samples, folder / f"{NAME}.svg")
    print(f"{folder / NAME}.md and .svg are written.")


def body(found: Findings, notes: Notes) -> str:
    """Everything below the header."""
    samples = found.samples
    text = (
        "Speed of internlm2 beside other engines on the same weights. Figures are medians of the samples that count, "
        "with their range; engines of a table took turns. Just before and after each sample the machine's "
        "streaming-read rate (256 MiB) and the rate of its int8 and bfloat16 instructions (operands in registers) "
        f"were measured. {samples.num_dropped()} samples with foreign load were dropped and taken again; those that "
        f"count had at most {samples.most_foreign():.0%}. "
        "`1.8b` and `7b` are random weights in the published shapes, `demo` is SmolLM2-135M-Instruct.\n\n"
        "![the race](race.svg)\n\n## Goals\n\n"
    )
    text += "".join(goal.line() + "\n" for goal in goals(found))
    text += (
        "\nNo engine decodes one stream faster than the memory gives it the weights: the ratio in brackets is what one "
        "would reach that read our bytes at the full streaming-read rate, so where it lies below the wanted one, no "
        "program could reach that here. What limits several streams and prompts (instructions, not memory), and what "
        "was tried without gain, is in docs/kernels.md and docs/roadmap.md.\n"
    )
    for heat in HEATS:
        for cell, names in heat.cells:
            text += table(found, heat.shape, cell, names, heat=heat.name)
    return text + _quality_table(found.quality) + _settings(found, notes) + _single_samples(samples)


def table(found: Findings, shape: str, cell: Cell, names: tuple[str, ...], *, heat: str) -> str:
    """One cell; empty without samples."""
    lines = []
    first = names[0]
    for name in names:
        spec, kept = find(shape, name), found.samples.kept(shape, cell.name, name)
        errors = [
            s.error for s in found.samples.all if (s.shape, s.cell, s.engine) == (shape, cell.name, name)
        ]
        if not kept:
            reason = next((error for error in errors if error), "")
            if errors:
                lines.append(f"| {name} | {spec.bits:g} | {reason[:200] or 'no quiet sample'} | | | | 0 |\n")
            continue
        speed = found.samples.spread(shape, cell.name, name, lambda s: s.speed)
        ratio = found.samples.ratio(shape, cell.name, first, name, lambda s: s.speed)
        read, peak = found.read_share(spec, cell), found.peak_share(spec, cell)
        lines.append(
            f"| {name} | {spec.bits:g} | {speed.shown('.1f') if speed else ''} | "
            f"{read.shown('.0f', scale=100, unit='%') if read else ''} | "
            f"{peak.shown('.0f', scale=100, unit='%') if peak else ''} | "
            f"{ratio.shown('.2f') if ratio and name != first else ''} | {len(kept)} |\n"
        )
    if not lines:
        return ""
    title = f"\n## {shape}, {cell.name} ({heat})\n\n" if heat != shape else f"\n## {shape}, {cell.name}\n\n"
    columns = (
        "engine", "bits a weight", "tokens/s", "of the streaming-read rate", "of the instruction rate",
        f"times as fast: {first}", "samples",
    )  # fmt: skip
    return f"{title}| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n" + "".join(lines)


def _quality_table(quality: Quality | None) -> str:
    if quality is None:
        return ""
    text = (
        f"\n## Quality: perplexity of the demo model\n\n{quality.num_tokens} tokens of `quant/text/evaluation.txt`, "
        "in chunks of 512 of which the second half counts, as llama-perplexity does. llama.cpp's `own` is the file "
        "that the demo model comes from (Q4_1); Q8_0 and Q4_0 are made from the same weights in float32. The rise is "
        "against the same program with those.\n\n| engine | perplexity | rise |\n|---|---|---|\n"
    )
    for name, value in quality.perplexity.items():
        rise = quality.rise(name)
        text += f"| {name} | {value:.3f} | {'' if rise is None else f'{rise:+.2%}'} |\n"
    return text


def _settings(found: Findings, notes: Notes) -> str:
    text = "\n## Versions and settings\n\n"
    text += f"llama.cpp: the sources in {LLAMA_SDIST}, built here with `-DGGML_NATIVE=ON`. "
    text += "; ".join(f"{peer}: {', '.join(pins)}" for peer, pins in PINS.items())
    text += ".\n\n| shape | engine | settings | weights read by a token, MB | says |\n|---|---|---|---|---|\n"
    for spec in ENGINES:
        note = notes.all.get(f"{spec.shape}/{spec.name}")
        if note is None:
            continue
        num_bytes = found.weight_bytes.get((spec.shape, spec.name))
        facts = {k: v for k, v in note["facts"].items() if k not in ("weight_bytes", "settings")}
        said = ", ".join(f"{key} {value}" for key, value in facts.items())
        size = f"{num_bytes / 1e6:.0f}" if num_bytes else ""
        text += f"| {spec.shape} | {spec.name} | {spec.described()} | {size} | {said} |\n"
    return text


def _single_samples(samples: Samples) -> str:
    text = (
        "\n## Every sample\n\n<details><summary>Rates of the machine in GB/s and int8 GOP/s; foreign load; what the "
        "host took away</summary>\n\n| shape | cell | engine | round | tokens/s | read | int8 | foreign | stolen | |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for s in samples.all:
        if s.error:
            text += f"| {s.shape} | {s.cell} | {s.engine} | {s.round} | | | | | | {s.error[:200]} |\n"
            continue
        text += (
            f"| {s.shape} | {s.cell} | {s.engine} | {s.round} | {s.speed:.1f} | {s.read / 1e9:.1f} | "
            f"{s.int8 / 1e9:.0f} | {s.foreign:.1%} | {s.stolen:.1%} | {'' if s.is_kept else 'dropped'} |\n"
        )
    return text + "\n</details>\n"
