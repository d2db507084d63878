"""What the race's result file says: shares, ratios, goals, tables and the picture."""

import json
from dataclasses import replace

import pytest
from race_samples import findings, one_goal, sample
from racing import course, report
from racing.engines import ENGINES, find
from racing.goals import Goal, operations_per_token
from racing.picture import draw, panels
from racing.quality import START, Quality, chunks_of
from racing.report import Notes
from racing.samples import Sample, Samples, Spread

from internlm2.model.config import preset


def test_share_of_the_read_rate_counts_weights_and_keys_and_values():
    # 1.8B: 24 layers, 8 key/value heads of 128, two bytes each: 98,304 bytes a token
    found = findings([sample("internlm2 int4", 0, 20)], weight_bytes={("1.8b", "internlm2 int4"): 10**9})
    share = found.read_share(find("1.8b", "internlm2 int4"), course.DECODE)
    assert share.median == pytest.approx(20 * (10**9 + 98_304 * (512 + 33 / 2)) / 40e9)
    goal = one_goal(found, "decode, one stream at 512, int4:")
    assert (replace(goal, enough=1).verdict, goal.found) == ("not reached", share)
    assert goal.verdict == "too few samples (1)"
    assert one_goal(found, "decode, one stream at 512, int8").verdict == "not measured"


def test_operations_of_a_prompt_are_linears_and_half_of_attention():
    config = preset("1.8b")
    linears = 2048 * (2048 + 2 * 1024) + 2048 * 2048 + 3 * 2048 * 8192
    attention = 4 * 2048 * (512 + 1) / 2
    assert operations_per_token(config, 512) == pytest.approx(24 * (2 * linears + attention))


def test_sixteen_bits_are_held_against_the_rate_of_bfloat16():
    cells = {"cell": "prefill 512", "seconds": 4.0, "tokens": 512}
    made = [sample(f"internlm2 {kind}", 0, 1, **cells) for kind in ("bf16", "int8")]
    found = findings(made)
    shares = [found.peak_share(find("1.8b", s.engine), course.PREFILL).median for s in made]
    assert shares[0] == pytest.approx(2 * shares[1])
    assert shares[1] == pytest.approx(128 * operations_per_token(preset("1.8b"), 512) / 900e9)
    unknown = findings([replace(made[0], int8=0.0, bfloat16=0.0)])  # no compiler, no rate
    assert unknown.peak_share(find("1.8b", "internlm2 bf16"), course.PREFILL) is None


def test_goals_against_peers_take_the_best_peer():
    def batch(engine: str, speeds: tuple[float, ...]) -> list[Sample]:
        return [sample(engine, n, speed, cell="8 streams") for n, speed in enumerate(speeds)]

    made = batch("internlm2 int4", (150, 150, 150)) + batch("internlm2 int8", (10, 10, 400))
    made += batch("llama.cpp Q4_0", (40, 50, 40)) + batch("OpenVINO int4", (110, 90, 100))
    goal = one_goal(findings(made), "8 streams")
    assert "(internlm2 int4 / OpenVINO int4)" in goal.text
    assert goal.found == Spread(pytest.approx(1.5), pytest.approx(150 / 110), pytest.approx(150 / 90), 3)
    goal = replace(goal, enough=3)
    assert goal.verdict == "reached"


def test_demo_goal_looks_at_llama_cpp_and_transformers_only():
    made = [
        sample(engine, 0, speed, shape="demo", cell="text")
        for engine, speed in (
            ("internlm2 int4", 90),
            ("llama.cpp own", 30),
            ("transformers bf16", 20),
            ("OpenVINO int4", 80),
        )
    ]
    goal = one_goal(findings(made), "demo, text:")
    assert goal.found.median == pytest.approx(3)
    assert "llama.cpp own" in goal.text


def test_many_streams_are_compared_with_one_at_the_same_context():
    made = [sample("internlm2 int4", n, 20, cell="decode, context 128") for n in range(2)]
    made += [sample("internlm2 int4", n, speed, cell="16 streams") for n, speed in enumerate((80, 100, 999))]
    goal = one_goal(findings(made), "16 streams")
    assert goal.found == Spread(pytest.approx(4.5), pytest.approx(4), pytest.approx(5), 2)
    assert replace(goal, enough=2).verdict == "not reached"


def test_quality_is_held_against_the_same_weights_unrounded():
    measured = Quality(
        {
            "internlm2 fp32": 20.0, "internlm2 int4": 20.2, "internlm2 int4-symmetric": 20.6, "internlm2 int8": 20.1,
            "llama.cpp f32": 10.0, "llama.cpp Q4_0": 10.2, "llama.cpp Q8_0": 10.01,
        },
        1000,
    )  # fmt: skip
    found = findings([], quality=measured)
    assert measured.rise("internlm2 int4") == pytest.approx(0.01)
    assert measured.rise("llama.cpp own") is None
    assert one_goal(found, "demo, rise of perplexity of int4 ").verdict == "reached"
    assert one_goal(found, "demo, rise of perplexity of int4-symmetric").verdict == "not reached"
    assert one_goal(found, "demo, rise of perplexity of int8").verdict == "not reached"
    assert one_goal(findings([]), "demo, rise of perplexity of int8").verdict == "not measured"


def test_start_must_stay_below_its_limit():
    found = findings([], load_seconds={("demo", "internlm2 int4"): 1.0, ("1.8b", "internlm2 int4"): 9.0})
    goal = one_goal(found, "engine start")
    assert (goal.verdict, goal.found.high) == ("reached", 1.0)


def test_memory_bounds_what_can_be_reached():
    # at 40 GB/s, 1 GB for each token and 98,304 bytes for each key and value of 512 + 16.5: 38 tokens/s at most
    made = [sample("internlm2 int4-symmetric", 0, 30), sample("llama.cpp Q4_0", 0, 20)]
    found = findings(made, weight_bytes={("1.8b", "internlm2 int4-symmetric"): 10**9})
    goal = one_goal(found, "decode, one stream, 1.8b int4-symmetric (4.5 bits): times llama.cpp")
    assert goal.limit.median == pytest.approx(40e9 / (10**9 + 98_304 * (512 + 33 / 2)) / 20)
    assert "1.50 [1.50..1.50] (at the full rate of the memory: 1.90 [1.90..1.90]), wanted" in goal.line()


def test_checklist_lines_say_what_was_found_and_wanted():
    reached = Goal("speed", 1.5, Spread(2.0, 1.0, 3.0, 5))
    assert reached.line() == "- [x] speed: 2.00 [1.00..3.00], wanted at least 1.5: **reached**"
    short = Goal("share", 0.9, Spread(0.85, 0.8, 0.9, 5), is_percent=True)
    assert short.line() == "- [ ] share: 85% [80%..90%], wanted at least 90%: **not reached**"
    assert Goal("x", 1.0, None).line() == "- [ ] x: wanted at least 1: **not measured**"


# -- the files -----------------------------------------------------------------------------------------------


def test_result_file_has_goals_tables_and_every_sample(tmp_path):
    made = [
        sample(name, n, speed + n)
        for name, speed in (("internlm2 int4", 20), ("internlm2 int4-symmetric", 20), ("llama.cpp Q4_0", 10))
        for n in range(5)
    ]
    made += [sample("llama.cpp Q4_0", 4, 1, foreign=0.5, is_kept=False)]
    made += [sample("OpenVINO int4", 0, 1, is_kept=False, error="no memory")]
    text = report.body(findings(made), Notes(tmp_path / "notes.json"))
    assert (
        "- [x] decode, one stream, 1.8b int4-symmetric (4.5 bits): times llama.cpp Q4_0 (4.5 bits): 1.83 [1.71..2.00], "
        "wanted" in text
    )
    assert "## 1.8b, decode (4 bits)" in text
    assert "| internlm2 int4 | 4.75 | 22.0 [20.0..24.0] |" in text
    assert "| llama.cpp Q4_0 | 4.5 | 12.0 [10.0..14.0] |  |  | 1.83 [1.71..2.00] | 5 |" in text
    assert "| OpenVINO int4 | 4.125 | no memory |" in text
    assert (
        "1 samples with foreign load were dropped and taken again; those that count had at most 0%." in text
    )
    assert text.count("| 1.8b | decode | llama.cpp Q4_0 |") == 6
    assert "prefill 512 (4 bits)" not in text


def test_notes_keep_the_fastest_start(tmp_path):
    notes = Notes(tmp_path / "notes.json")
    for seconds in (9.0, 1.5, 3.0):
        notes.add(ENGINES[0], {"version": "7"}, seconds)
    again = json.loads((tmp_path / "notes.json").read_text())
    assert again == {"1.8b/internlm2 int4": {"facts": {"version": "7"}, "load_seconds": 1.5}}


def test_picture_has_a_bar_for_every_engine_and_ours_in_colour(tmp_path):
    speeds = {"internlm2 int4": 20, "llama.cpp Q4_0": 10, "OpenVINO int4": 15}
    made = [sample(name, 0, speed) for name, speed in speeds.items()]
    alone = [sample(f"internlm2 {kind}", 0, 5, cell="8 streams") for kind in ("int4", "int4-symmetric")]
    samples = Samples([*made, *alone])
    (panel,) = panels(samples)  # a cell without a peer shows nothing
    assert panel[0] == "1.8b: decode"
    assert [bar[:2] for bar in panel[1]] == [
        ("llama.cpp Q4_0", False),
        ("OpenVINO int4", False),
        ("internlm2 int4", True),
    ]
    draw(samples, tmp_path / "race.svg")
    drawn = (tmp_path / "race.svg").read_text()
    assert (drawn.count("fill: #1f6f5c"), drawn.count("fill: #b9b3a6")) == (1, 2)
    draw(Samples(), tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_chunks_are_whole_and_the_second_half_is_scored():
    assert [len(chunk) for chunk in chunks_of(list(range(1500)))] == [512, 512]
    assert START == 257
