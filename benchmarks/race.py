"""The race: this project beside llama.cpp, OpenVINO GenAI, CTranslate2 and transformers, on the same weights.

  python benchmarks/race.py setup     build and install the peers, make the weights; an hour and 45 GB the first time
  python benchmarks/race.py run       measure, and write results/race.md and race.svg; about 35 minutes on 2 cores
  python benchmarks/race.py report    the files again from what was measured

Every peer lives in an environment of its own under --peers-dir (~/.cache/internlm2/race) and runs in a process of its
own. Engines that fit into memory together take turns, round by round. Around each sample the machine's streaming-read
and instruction rates are measured; samples during which others used over 5 % of the processor are dropped and taken
again. Samples are kept in samples.jsonl under --peers-dir, so a run that was broken off goes on where it stopped;
`--fresh` begins anew. `--quick` only shows that everything works: one round of short prompts and answers, without 7b;
what it writes lies under --peers-dir.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from racing.course import HEATS, PREFILL_LONG, Cell, Heat
from racing.engines import OURS, THREADS, EngineSpec, find
from racing.measure import Probe, listening
from racing.models import SHAPES, Models
from racing.peers import DEFAULT_FOLDER, NAMES, Peers
from racing.quality import measure_quality
from racing.report import Notes, write_report
from racing.samples import ENOUGH, Sample, Samples
from racing.workers.process import Worker, WorkerError

from internlm2.kernels.library import library

LOUD = 0.05
TRIES = 4  # samples of one engine in one round, the dropped ones counted
SETTLE_SECONDS = 0.25  # OpenMP's threads compute on for up to 0.2 s when their work is done


class Race:
    """Runs heats and keeps what it finds."""

    def __init__(self, peers: Peers, models: Models, samples: Samples, notes: Notes, *, loud: float) -> None:
        built = library()
        if built is None:
            sys.exit("The kernels are not built, so there is nothing to race with.")
        self._probe = Probe(built, peers.peak_library, threads=THREADS)
        self._peers, self._models, self._samples, self._notes = peers, models, samples, notes
        self._loud = loud

    def run(self, heat: Heat, num_rounds: int) -> None:
        """All rounds of a heat; engines that have nothing left to do are not loaded."""
        left = {
            name
            for number in range(num_rounds)
            for cell, names in heat.cells
            for name in names
            if not self._samples.is_done(heat.shape, cell.name, name, number)
        }
        workers: dict[str, Worker] = {}
        try:
            for name in heat.engines():
                if name in left:
                    self._load(workers, find(heat.shape, name))
            warm: set[tuple[str, str]] = set()
            for number in range(num_rounds):
                for cell, names in heat.cells:
                    for name in _turned(names, number):
                        if name in workers and not self._samples.is_done(heat.shape, cell.name, name, number):
                            self._measure(workers[name], heat.shape, cell, number, warm)
        finally:
            for worker in workers.values():
                worker.close()

    def _load(self, workers: dict[str, Worker], spec: EngineSpec) -> None:
        try:
            worker = workers[spec.name] = Worker(spec, self._models, self._peers, _log_of(spec, self._peers))
        except WorkerError as error:
            print(f"{spec.shape}: {spec.name} does not load: {error}", flush=True)
            return
        self._notes.add(spec, worker.facts, worker.load_seconds)
        print(f"{spec.shape}: {spec.name} loaded in {worker.load_seconds:.1f} s", flush=True)

    def _measure(
        self, worker: Worker, shape: str, cell: Cell, number: int, warm: set[tuple[str, str]]
    ) -> None:
        """One sample that counts, or the attempts at it. warm: engines, and cells of theirs, that ran already."""
        name = worker.spec.name
        try:
            # Before the first sample of all, and where a prompt is kept: then it is computed here.
            if (name, "") not in warm or (cell.kind == "decode" and (name, cell.name) not in warm):
                worker.ask(cell.question(number))
                warm |= {(name, ""), (name, cell.name)}
            with _busy_core(cell.is_busy):
                for _ in range(TRIES):
                    sample = self._sample(worker, shape, cell, number)
                    self._samples.add(sample)
                    if sample.is_kept:
                        break
        except WorkerError as error:
            self._samples.add(_failed(shape, cell, name, number, str(error)))
            print(f"{shape}: {cell.name}: {name}: {error}", flush=True)

    def _sample(self, worker: Worker, shape: str, cell: Cell, number: int) -> Sample:
        before = self._probe.rates()
        with listening() as heard:
            answer = worker.ask(cell.question(number))
        time.sleep(SETTLE_SECONDS)
        after = self._probe.rates()
        is_kept = heard.foreign <= self._loud
        sample = Sample(
            shape,
            cell.name,
            worker.spec.name,
            number,
            seconds=answer["seconds"],
            tokens=answer["tokens"],
            read=(before.read + after.read) / 2,
            int8=(before.int8 + after.int8) / 2,
            bfloat16=(before.bfloat16 + after.bfloat16) / 2,
            foreign=heard.foreign,
            stolen=heard.stolen,
            is_kept=is_kept,
        )
        print(
            f"{shape}: round {number}, {cell.name}: {worker.spec.name}: {sample.speed:.1f} tokens/s, read "
            f"{sample.read / 1e9:.0f} GB/s, foreign {heard.foreign:.0%}{'' if is_kept else ', dropped'}",
            flush=True,
        )
        return sample


def _turned(names: Sequence[str], number: int) -> tuple[str, ...]:
    """Another one begins each round."""
    at = number % len(names)
    return (*names[at:], *names[:at])


def _failed(shape: str, cell: Cell, name: str, number: int, error: str) -> Sample:
    return Sample(
        shape, cell.name, name, number, seconds=0.0, tokens=0, read=0.0, int8=0.0, bfloat16=0.0, foreign=0.0,
        stolen=0.0, is_kept=False, error=error,
    )  # fmt: skip


@contextmanager
def _busy_core(is_wanted: bool) -> Iterator[None]:
    """Another program that computes all the time; it is a child of this one, so it is not foreign load."""
    if not is_wanted:
        yield
        return
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        child.kill()
        child.wait()


def set_up(peers: Peers, models: Models, heats: Sequence[Heat], names: tuple[str, ...]) -> None:
    """Make all that a run needs. Our packed weights go into our own cache, as at a user's first start."""
    peers.setup(names)
    for heat in heats:
        for name in heat.engines():
            spec = find(heat.shape, name)
            models.make(heat.shape, spec.files())
            if spec.is_ours:
                print(f"{heat.shape}: packing {name}", flush=True)
                Worker(spec, models, peers, _log_of(spec, peers)).close()


def _log_of(spec: EngineSpec, peers: Peers) -> Path:
    name = f"{spec.shape} {spec.name}.log".replace(" ", "-").replace(",", "")
    return peers.root / "logs" / name


def _chosen(options: argparse.Namespace) -> list[Heat]:
    peers = {OURS, *options.peers}
    heats = [heat.only(tuple(peers)) for heat in HEATS if heat.shape in options.shapes]
    if options.cells:
        heats = [
            Heat(h.name, h.shape, tuple((c, names) for c, names in h.cells if c.name in options.cells))
            for h in heats
        ]
    if options.quick:
        heats = [
            Heat(h.name, h.shape, tuple((c.quick(), names) for c, names in h.cells if c != PREFILL_LONG))
            for h in heats
        ]
    return [heat for heat in heats if heat.cells]


def _words(allowed: Sequence[str], text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(","))
    if unknown := set(words) - set(allowed):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; there are {', '.join(allowed)}")
    return words


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("setup", "run", "report"))
    parser.add_argument("--peers-dir", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--peers", type=lambda text: _words(NAMES, text), default=NAMES)
    parser.add_argument("--shapes", type=lambda text: _words(SHAPES, text), default=SHAPES)
    parser.add_argument("--cells", type=lambda text: tuple(text.split(",")), default=())
    parser.add_argument("--rounds", type=int, default=ENOUGH)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round of short prompts and answers, without 7b",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs measured")
    parser.add_argument(
        "--loud", type=float, default=LOUD, help="foreign load above which a sample is dropped"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
        options.shapes = tuple(shape for shape in options.shapes if shape != "7b")
    return options


def main() -> None:
    """Set up, measure or report."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines end as well
    peers = Peers(options.peers_dir)
    models = Models(options.peers_dir / "models", peers)
    heats = _chosen(options)
    if options.command == "setup":
        set_up(peers, models, heats, options.peers)
        return
    name = "quick" if options.quick else "samples"
    path, notes_path = (options.peers_dir / f"{name}{end}" for end in (".jsonl", "-notes.json"))
    if options.command == "run" and (options.fresh or options.quick):
        path.unlink(missing_ok=True)
        notes_path.unlink(missing_ok=True)
    samples, notes = Samples.open(path), Notes(notes_path)
    quality = options.peers_dir / f"{name}-quality.json"
    if options.command == "run":
        race = Race(peers, models, samples, notes, loud=options.loud)
        for heat in heats:
            race.run(heat, options.rounds)
        if "demo" in options.shapes and not options.cells:
            measure_quality(models, peers, quality, is_fresh=options.fresh)
    write_report(samples, notes, quality, models, into=options.peers_dir if options.quick else None)


if __name__ == "__main__":
    main()
