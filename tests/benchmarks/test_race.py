"""The race without its peers: what is dropped, what is counted, what is asked again, and what the result file says."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import race
from race_samples import sample
from racing import course, measure, quality
from racing.course import Cell, Heat
from racing.engines import ENGINES, EngineSpec, find
from racing.peers import NAMES, PINS, Peers
from racing.quality import START, Quality, read_quality
from racing.report import Notes
from racing.samples import Samples, Spread
from racing.workers.process import Worker, WorkerError

WORKERS = Path(race.__file__).parent / "racing" / "workers"


# -- samples ----------------------------------------------------------------------------------------------


def test_median_and_range_leave_out_dropped_samples():
    kept = [sample("internlm2 int4", n, speed) for n, speed in enumerate((30, 10, 20))]
    dropped = sample("internlm2 int4", 3, 1000, is_kept=False)
    spread = Samples([*kept, dropped]).spread("1.8b", "decode", "internlm2 int4", lambda s: s.speed)
    assert spread == Spread(pytest.approx(20), pytest.approx(10), pytest.approx(30), 3)
    assert Samples([*kept, dropped]).num_dropped() == 1


def test_ratio_pairs_samples_of_the_same_round_only():
    ours = [sample("internlm2 int4", n, speed) for n, speed in ((0, 30), (1, 60), (2, 90))]
    theirs = [sample("llama.cpp Q4_0", n, speed) for n, speed in ((2, 30), (0, 30), (5, 1))]
    ratio = Samples([*ours, *theirs]).ratio(
        "1.8b", "decode", "internlm2 int4", "llama.cpp Q4_0", lambda s: s.speed
    )
    assert ratio == Spread(pytest.approx(2), pytest.approx(1), pytest.approx(3), 2)
    assert Samples(ours).ratio("1.8b", "decode", "internlm2 int4", "x", lambda s: s.speed) is None


def test_samples_come_back_from_disk_and_a_cut_off_line_is_asked_again(tmp_path):
    path = tmp_path / "samples.jsonl"
    samples = Samples.open(path)
    samples.add(sample("internlm2 int4", 0, 10))
    samples.add(sample("internlm2 int4", 1, 20))
    path.write_text(path.read_text()[:-9])
    again = Samples.open(path)
    assert again.all == samples.all[:1]
    assert not again.is_done("1.8b", "decode", "internlm2 int4", 1)
    again.add(sample("internlm2 int4", 1, 30))
    assert [s.speed for s in Samples.open(path).all] == pytest.approx([10, 30])


def test_a_dropped_sample_leaves_its_round_open_and_an_error_closes_it():
    samples = Samples([sample("a", 0, 1, is_kept=False), sample("b", 0, 1, is_kept=False, error="broken")])
    assert not samples.is_done("1.8b", "decode", "a", 0)
    assert samples.is_done("1.8b", "decode", "b", 0)
    assert not samples.is_done("1.8b", "decode", "b", 1)
    assert not samples.is_done("7b", "decode", "b", 0)
    assert samples.num_dropped() == 1


# -- what others do -----------------------------------------------------------------------------------------


def make_proc(folder: Path, *, machine: str, processes: dict[int, tuple[int, int]]) -> None:
    """processes: number -> parent, ticks. Names hold brackets and blanks, as some do."""
    folder.mkdir(exist_ok=True)
    (folder / "stat").write_text(f"cpu  {machine}\ncpu0 0 0\n")
    for pid, (parent, ticks) in processes.items():
        (folder / str(pid)).mkdir(exist_ok=True)
        rest = f"S {parent} 1 1 0 -1 0 0 0 0 0 {ticks} 0 0 0 20 0"
        (folder / str(pid) / "stat").write_text(f"{pid} (a) b (c) {rest}\n")


def test_foreign_load_is_what_neither_this_process_nor_its_descendants_used(tmp_path):
    me = os.getpid()
    tree = {me: (1, 100), 900001: (me, 50), 900002: (900001, 10), 900003: (1, 500)}
    make_proc(tmp_path, machine="1000 0 0 5000 0 0 0 40 0 0", processes=tree)
    with measure.listening(tmp_path) as heard:
        # 200 ticks: 20 by this process, 60 by its grandchild, 30 by a stranger, 10 stolen by the host
        after = tree | {me: (1, 120), 900002: (900001, 70), 900003: (1, 530)}
        make_proc(tmp_path, machine="1110 0 0 5080 0 0 0 50 0 0", processes=after)
    assert heard.foreign == pytest.approx(30 / 200)
    assert heard.stolen == pytest.approx(10 / 200)


def test_listening_counts_a_child_that_computes_as_our_own():
    with measure.listening() as heard:
        child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        time.sleep(0.5)
        used = measure._own_ticks(Path("/proc"), os.getpid())
        child.kill()
        child.wait()
    assert used > 0
    assert 0 <= heard.foreign <= 1


# -- rounds ----------------------------------------------------------------------------------------------------

ANSWERING = """
import json, sys
sys.path.insert(0, sys.argv[2])
from wire import serve
class Engine:
    def __init__(self, settings):
        print("noise of a library")
        self.facts = {"version": settings["version"]}
    def decode(self, prompts, tokens):
        return {"seconds": 0.5, "tokens": tokens * len(prompts)}
    def prefill(self, prompt):
        raise ValueError("too long")
serve(Engine)
"""
HEAT = Heat("test", "1.8b", ((Cell("decode", "decode", context=4, tokens=3, streams=2), ("a", "b")),))


class Rates:
    """A machine that never changes."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def rates(self) -> measure.Rates:
        """Round numbers."""
        return measure.Rates(40e9, 900e9, 450e9)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., race.Race]:
    """A race of two engines that answer at once, with the foreign load of each sample in turn."""
    script = tmp_path / "worker.py"
    script.write_text(ANSWERING.replace("sys.argv[2]", repr(str(WORKERS))))

    def launch(_: EngineSpec, *__: object) -> tuple[str, str, dict[str, object], dict[str, str]]:
        return sys.executable, str(script), {"version": "7"}, {}

    spec = find("1.8b", "internlm2 int4")
    monkeypatch.setattr(EngineSpec, "launch", launch)
    monkeypatch.setattr(race, "find", lambda shape, name: replace(spec, name=name, shape=shape))
    monkeypatch.setattr(race, "Probe", Rates)
    monkeypatch.setattr(race, "SETTLE_SECONDS", 0.0)

    def make(samples: Samples, loads: list[float]) -> race.Race:
        left = iter(loads)

        @contextmanager
        def heard() -> Iterator[measure.Listening]:
            yield measure.Listening(foreign=next(left))

        monkeypatch.setattr(race, "listening", heard)
        peers = Peers(tmp_path)
        return race.Race(
            peers, race.Models(tmp_path, peers), samples, Notes(tmp_path / "notes.json"), loud=0.05
        )

    return make


def test_loud_samples_are_dropped_and_taken_again(runner):
    samples = Samples()
    runner(samples, [0.0, 0.3, 0.2, 0.01]).run(HEAT, 1)
    assert [(s.engine, s.foreign, s.is_kept) for s in samples.all] == [
        ("a", 0.0, True),
        ("b", 0.3, False),
        ("b", 0.2, False),
        ("b", 0.01, True),
    ]
    assert samples.kept("1.8b", "decode", "b")[0].speed == pytest.approx(
        12
    )  # 2 streams of 3 tokens in half a second


def test_attempts_end_when_the_machine_stays_loud(runner):
    samples = Samples()
    runner(samples, [0.9] * 2 * race.TRIES).run(HEAT, 1)
    assert len(samples.all) == 2 * race.TRIES
    assert not samples.kept("1.8b", "decode", "a")


def test_engines_take_turns_and_another_one_begins_each_round(runner):
    samples = Samples()
    runner(samples, [0.0] * 6).run(HEAT, 3)
    assert [(s.round, s.engine) for s in samples.all] == [
        (0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b"),
    ]  # fmt: skip


def test_a_broken_off_run_goes_on_where_it_stopped(runner, tmp_path):
    samples = Samples.open(tmp_path / "samples.jsonl")
    runner(samples, [0.0] * 4).run(HEAT, 2)
    (tmp_path / "samples.jsonl").write_text(
        "".join(f"{line}\n" for line in (tmp_path / "samples.jsonl").read_text().split("\n")[:3])
    )
    again = Samples.open(tmp_path / "samples.jsonl")
    runner(again, [0.0]).run(HEAT, 2)
    assert [(s.round, s.engine) for s in again.all] == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
    runner(again, []).run(HEAT, 2)  # nothing is left, so nothing is even loaded
    assert len(again.all) == 4


def test_an_engine_that_fails_does_not_stop_the_others(runner):
    cells = ((Cell("prefill 512", "prefill", context=4), ("a",)), *HEAT.cells)
    samples = Samples()
    runner(samples, [0.0] * 3).run(Heat("test", "1.8b", cells), 1)
    assert [(s.cell, s.engine, s.error) for s in samples.all] == [
        ("prefill 512", "a", "ValueError: too long"),
        ("decode", "a", ""),
        ("decode", "b", ""),
    ]


def test_a_worker_that_cannot_load_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(EngineSpec, "launch", lambda *_: (sys.executable, "/does/not/exist.py", {}, {}))
    peers = Peers(tmp_path)
    with pytest.raises(WorkerError, match="has ended with 2; see"):
        Worker(ENGINES[0], race.Models(tmp_path, peers), peers, tmp_path / "worker.log")
    assert "exist.py" in (tmp_path / "worker.log").read_text()


def test_window_counts_what_comes_after_every_stream_has_begun(monkeypatch):
    monkeypatch.syspath_prepend(str(WORKERS))
    from wire import window

    late = [(3.0, 1), (4.0, 1), (6.0, 1)]
    early = [(1.0, 1), (2.0, 1), (3.0, 1), (5.0, 2)]
    assert window([early, late]) == {"seconds": 3.0, "tokens": 4}


def test_prompts_that_may_be_kept_stay_the_same_and_others_never_repeat():
    assert course.BATCH_8.question(0) == course.BATCH_8.question(4)
    prompts = course.BATCH_8.question(0)["prompts"]
    assert [len(prompt) for prompt in prompts] == [128] * 8
    assert len({tuple(prompt) for prompt in prompts}) == 8
    assert course.PREFILL.question(0)["prompt"] != course.PREFILL.question(0)["prompt"]
    assert course.TEXT.question(0)["prompt"] != course.TEXT.question(0)["prompt"]


def test_every_heat_names_engines_that_exist_and_only_drops_the_rest():
    for heat in course.HEATS:
        assert heat.engines() == list(dict.fromkeys(find(heat.shape, name).name for name in heat.engines()))
        alone = heat.only(("internlm2",))
        assert all(find(heat.shape, name).is_ours for name in alone.engines())
        assert len(alone.cells) == len(heat.cells)
    assert len({(spec.shape, spec.name) for spec in ENGINES}) == len(ENGINES)


def test_perplexities_are_kept_one_by_one_and_only_missing_ones_are_measured(tmp_path, monkeypatch):
    class Words:
        """A tokenizer of 1,200 ids."""

        def encode(self, _: str) -> list[int]:
            return list(range(1200))

    asked: list[str] = []

    def ours(_: object, __: object, options: dict[str, object], chunks: list[list[int]]) -> float:
        assert len(chunks) == 2
        asked.append(str(options["quantization"]))
        if options["quantization"] == "int4" and asked.count("int4") == 1:
            raise WorkerError("no memory")
        return 20.0

    monkeypatch.setattr(quality.Tokenizer, "from_pretrained", lambda _: Words())
    monkeypatch.setattr(quality, "_ours", ours)
    monkeypatch.setattr(quality, "_llama", lambda *_, **__: pytest.fail("llama.cpp is not set up here"))
    peers = Peers(tmp_path)
    path = tmp_path / "quality.json"
    quality.measure_quality(race.Models(tmp_path, peers), peers, path)
    found = read_quality(path)
    assert found == Quality(
        {f"internlm2 {kind}": 20.0 for kind in ("fp32", "bf16", "int8", "int4-symmetric")}, 2 * (512 - START)
    )
    quality.measure_quality(race.Models(tmp_path, peers), peers, path)
    assert asked == ["None", "bfloat16", "int8", "int4", "int4-symmetric", "int4"]
    assert read_quality(path).perplexity["internlm2 int4"] == 20.0


def test_an_install_that_was_broken_off_or_has_other_pins_is_not_ready(tmp_path):
    peers = Peers(tmp_path)
    assert not any(peers.is_ready(name) for name in NAMES)
    folder = peers.python("ctranslate2").parent.parent
    folder.mkdir(parents=True)
    (folder / "pins.txt").write_text("ctranslate2==1.0")
    assert not peers.is_ready("ctranslate2")
    (folder / "pins.txt").write_text("\n".join(PINS["ctranslate2"]))
    assert peers.is_ready("ctranslate2")
