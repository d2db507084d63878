"""The goals of the race, each computed from the samples: reached, not reached, or not measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from internlm2.model.config import ModelConfig
from racing import course
from racing.course import Cell
from racing.engines import ENGINES, EngineSpec, find
from racing.quality import Quality
from racing.samples import ENOUGH, Sample, Samples, Spread

LARGE = "1.8b"


@dataclass(frozen=True)
class Goal:
    """found: what the wanted value is compared with; None: not measured. is_percent: how both are shown.

    enough: how many samples a verdict needs; 1 for what does not depend on the moment. limit: what the memory allows.
    """

    text: str
    wanted: float
    found: Spread | None
    is_percent: bool = False
    is_at_most: bool = False
    enough: int = ENOUGH
    limit: Spread | None = None

    @property
    def verdict(self) -> str:
        """By the median."""
        if self.found is None:
            return "not measured"
        if self.found.count < self.enough:
            return f"too few samples ({self.found.count})"
        is_reached = self.found.median <= self.wanted if self.is_at_most else self.found.median >= self.wanted
        return "reached" if is_reached else "not reached"

    def line(self) -> str:
        """One item of a checklist."""
        mark = "x" if self.verdict == "reached" else " "
        how = {"scale": 100, "unit": "%", "form": ".1f" if abs(self.wanted) < 0.2 else ".0f"}
        shown = "" if self.found is None else self.found.shown(**how if self.is_percent else {"form": ".2f"})
        wanted = f"{self.wanted:.0%}" if self.is_percent else f"{self.wanted:g}"
        bound = "at most" if self.is_at_most else "at least"
        limit = "" if self.limit is None else f" (at the full rate of the memory: {self.limit.shown('.2f')})"
        shown = f"{shown}{limit}, " if shown else ""
        return f"- [{mark}] {self.text}: {shown}wanted {bound} {wanted}: **{self.verdict}**"


@dataclass(frozen=True)
class Findings:
    """What goals are computed from. weight_bytes: read by a token, by shape and engine; load_seconds: of ours."""

    samples: Samples
    configs: Mapping[str, ModelConfig]
    weight_bytes: Mapping[tuple[str, str], int]
    load_seconds: Mapping[tuple[str, str], float]
    quality: Quality | None

    def read_bytes(self, spec: EngineSpec, cell: Cell) -> float | None:
        """Of a decoding step of one stream: weights, and keys and values in 16 bits of half the new tokens."""
        weights = self.weight_bytes.get((spec.shape, spec.name))
        if not weights or cell.kind != "decode" or cell.streams > 1:
            return None
        config = self.configs[spec.shape]
        each = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return weights + each * (cell.context + cell.tokens / 2)

    def read_share(self, spec: EngineSpec, cell: Cell) -> Spread | None:
        """Of the streaming-read rate beside each sample."""
        num_bytes = self.read_bytes(spec, cell)
        if num_bytes is None:
            return None
        return self.samples.spread(spec.shape, cell.name, spec.name, lambda s: s.speed * num_bytes / s.read)

    def memory_limit(self, spec: EngineSpec, peer: EngineSpec, cell: Cell) -> Spread | None:
        """How many times as fast as the peer an engine would be that read `spec`'s bytes at the streaming-read rate."""
        num_bytes = self.read_bytes(spec, cell)
        if num_bytes is None:
            return None
        return self.samples.spread(spec.shape, cell.name, peer.name, lambda s: s.read / num_bytes / s.speed)

    def peak_share(self, spec: EngineSpec, cell: Cell) -> Spread | None:
        """Of the instruction rate (bfloat16 for 16-bit weights, else int8) beside each sample of a prefill."""
        if cell.kind != "prefill":
            return None
        operations = operations_per_token(self.configs[spec.shape], cell.context)
        rate: Callable[[Sample], float] = lambda s: s.bfloat16 if spec.bits == 16 else s.int8  # noqa: E731
        if not all(rate(s) for s in self.samples.kept(spec.shape, cell.name, spec.name)):
            return None
        return self.samples.spread(spec.shape, cell.name, spec.name, lambda s: s.speed * operations / rate(s))

    def best(self, shape: str, cell: Cell, *, ours: bool, among: tuple[str, ...] = ()) -> EngineSpec | None:
        """The engine with the highest median speed. among: of these peers only."""
        found = {}
        for spec in ENGINES:
            if spec.shape == shape and spec.is_ours == ours and (not among or spec.peer in among):
                spread = self.samples.spread(shape, cell.name, spec.name, _speed)
                if spread is not None:
                    found[spread.median] = spec
        return found[max(found)] if found else None

    def against_best(
        self, text: str, shape: str, cell: Cell, wanted: float, *, among: tuple[str, ...] = ()
    ) -> Goal:
        """Our best against the best peer."""
        own = self.best(shape, cell, ours=True)
        peer = self.best(shape, cell, ours=False, among=among)
        if own is None or peer is None:
            return Goal(text, wanted, None)
        found = self.samples.ratio(shape, cell.name, own.name, peer.name, _speed)
        return Goal(f"{text} ({own.name} / {peer.name})", wanted, found)


def operations_per_token(config: ModelConfig, context: int) -> float:
    """Of a prompt of `context` tokens, without the head: linears, and attention to what came before."""
    width = config.num_attention_heads * config.head_dim
    linears = config.hidden_size * (config.qkv_size + width + 3 * config.intermediate_size)
    return config.num_hidden_layers * (2 * linears + 4 * width * (context + 1) / 2)


def goals(found: Findings) -> list[Goal]:
    """All that can be computed on a CPU."""
    samples = found.samples
    ours = {spec.name: spec for spec in ENGINES if spec.shape == LARGE and spec.is_ours}
    listed = [
        Goal(
            f"decode, one stream at 512, {name}: share of the streaming-read rate",
            0.9,
            found.read_share(ours[f"internlm2 {name}"], course.DECODE),
            is_percent=True,
        )
        for name in ("bf16", "int8", "int4", "int4-symmetric")
    ]
    for shape, own, peer, wanted in (
        (LARGE, "int4-symmetric", "llama.cpp Q4_0", 1.8),
        (LARGE, "int8", "llama.cpp Q8_0", 1.8),
        (LARGE, "bf16", "llama.cpp bf16", 1.05),
        (LARGE, "int4-symmetric", "OpenVINO int4", 2.0),
        ("7b", "int4-symmetric", "llama.cpp Q4_0", 1.35),
    ):
        ratio = samples.ratio(shape, course.DECODE.name, f"internlm2 {own}", peer, _speed)
        one, other = find(shape, f"internlm2 {own}"), find(shape, peer)
        text = f"decode, one stream, {shape} {own} ({one.bits:g} bits): times {peer} ({other.bits:g} bits)"
        listed.append(Goal(text, wanted, ratio, limit=found.memory_limit(one, other, course.DECODE)))
    listed.append(found.against_best("8 streams: times the best peer", LARGE, course.BATCH_8, 1.5))
    lone = {s.round: s.speed for s in samples.kept(LARGE, course.SHORT.name, "internlm2 int4")}
    many = samples.kept(LARGE, course.BATCH_16.name, "internlm2 int4")
    gains = [s.speed / lone[s.round] for s in many if s.round in lone]
    gain = Spread.of(gains) if gains else None
    listed.append(Goal("16 streams, int4: times our one stream at the same context", 5.0, gain))
    for cell in (course.PREFILL, course.PREFILL_LONG):
        listed.append(found.against_best(f"{cell.name}: times the best peer", LARGE, cell, 1.3))
        shares = [(found.peak_share(spec, cell), name) for name, spec in ours.items()]
        best = max((pair for pair in shares if pair[0]), key=lambda pair: pair[0].median, default=(None, ""))
        text = f"{cell.name}: share of the instruction peak of its dtype ({best[1] or 'none'})"
        listed.append(Goal(text, 0.65, best[0], is_percent=True))
    for cell in (course.TEXT, course.TEXT_BUSY):
        text = f"demo, {cell.name}: times the best of llama.cpp's own file and transformers"
        listed.append(found.against_best(text, "demo", cell, 1.5, among=("llama.cpp", "transformers")))
    starts = [seconds for (shape, _), seconds in found.load_seconds.items() if shape == "demo"]
    start = Spread.of(starts) if starts else None
    listed.append(
        Goal("engine start on demo, packed weights cached, seconds", 2.0, start, is_at_most=True, enough=1)
    )
    return listed + _quality_goals(found.quality)


def _quality_goals(quality: Quality | None) -> list[Goal]:
    listed = []
    for own, peer in (("int4-symmetric", "Q4_0"), ("int4", "Q4_0"), ("int8", "Q8_0")):
        text = f"demo, rise of perplexity of {own} less that of llama.cpp {peer}"
        pair = (
            (None, None)
            if quality is None
            else (quality.rise(f"internlm2 {own}"), quality.rise(f"llama.cpp {peer}"))
        )
        found = None if None in pair else Spread.of([pair[0] - pair[1]])
        listed.append(Goal(text, 0.0, found, is_percent=True, is_at_most=True, enough=1))
    return listed


def _speed(sample: Sample) -> float:
    return sample.speed
