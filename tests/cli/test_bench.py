"""`internlm2 bench`: every part gives figures, as a table and as JSON; wrong values are explained."""

import json

import pytest

from internlm2 import LLM
from internlm2.cli import main as cli
from internlm2.engine import bench
from internlm2.engine.bench import BenchOptions, Figure, Report, measure
from internlm2.errors import RequestError

SMALL = {
    "--prompt-tokens": "8", "--output-tokens": "4", "--num-prompts": "3", "--rate": "200", "--repeats": "2",
    "--prefill-tokens": "5,20", "--dtype": "float32", "--seed": "1",
}  # fmt: skip
UNITS = {"ms", "tokens/s", "requests/s", "%", "MiB"}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(bench, "foreign_load", lambda: 0.25)


def run(folder, *arguments: str) -> int:
    defaults = [word for name, value in SMALL.items() if name not in arguments for word in (name, value)]
    return cli.run(["bench", str(folder), *arguments, *defaults])


def test_the_table_shows_every_part_with_median_and_spread(chat_folder, capsys, caplog):
    assert run(chat_folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"model: {chat_folder}"
    assert "runs on: cpu, float32, 1 threads" in lines
    assert "foreign CPU load before: 25%" in lines
    assert "Other programs use 25% of the processor" in caplog.text
    head = next(i for i, line in enumerate(lines) if line.startswith("part"))
    rows = [line.split() for line in lines[head + 1 :]]
    assert {row[0] for row in rows} == set(bench.PARTS)
    for row in rows:
        median, spread = float(row[-3].replace(",", "")), row[-2].replace(",", "")
        low, high = map(float, spread.split(".."))
        assert 0 <= low <= median <= high
        assert row[-1] in UNITS


def test_json_holds_every_single_value(chat_folder, capsys):
    assert run(chat_folder, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["foreign_load"] == 0.25
    assert data["settings"]["repeats"] == 2
    figures = {(f["part"], f["what"]): f for f in data["figures"]}
    assert len(figures) == len(data["figures"])
    for figure in figures.values():
        assert figure["min"] <= figure["median"] <= figure["max"]
    assert len(figures["latency", "time to first token"]["values"]) == 2
    assert len(figures["rate", "time to first token"]["values"]) == 2 * 3
    assert figures["prefill", "prompt of 20 tokens"]["unit"] == "tokens/s"
    assert 0 < figures["latency", "share of a step outside the network"]["median"] < 100
    assert figures["memory", "weights"]["values"][0] > 0


def test_only_measures_what_was_asked_for(chat_folder, capsys):
    # Requests of parts that are left out may be longer than the model takes.
    assert run(chat_folder, "--only", "latency,memory", "--json", "--max-model-len", "19") == 0
    assert {f["part"] for f in json.loads(capsys.readouterr().out)["figures"]} == {"latency", "memory"}
    assert (
        run(chat_folder, "--only", "prefill", "--json", "--prompt-tokens", "900", "--max-model-len", "21")
        == 0
    )
    assert {f["part"] for f in json.loads(capsys.readouterr().out)["figures"]} == {"prefill"}


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("There is no part 'speed' to measure. Known: latency,", ["--only", "latency,speed"]),
        ("prompt_tokens is 0, but must be at least 1", ["--prompt-tokens", "0"]),
        ("output_tokens is 1, but must be at least 2", ["--output-tokens", "1"]),
        ("num_prompts is 0, but must be at least 1", ["--num-prompts", "0"]),
        ("repeats is 0, but must be at least 1", ["--repeats", "0"]),
        ("rate is 0, but must be a number above 0", ["--rate", "0"]),
        ("rate is nan, but must be a number above 0", ["--rate", "nan"]),
        ("prefill_tokens is (0,), but must be numbers of at least 1", ["--prefill-tokens", "0"]),
        ("prefill-tokens is 'a,2', but must be whole numbers with commas", ["--prefill-tokens", "a,2"]),
        ("The longest request has 21 tokens, but the model takes 16", ["--max-model-len", "16"]),
        ("Give --output-tokens in place of --max-tokens", ["--max-tokens", "5"]),
        ("Give --output-tokens in place of --max-tokens", ["--stop", "x"]),
        ("temperature is -1.0", ["--temperature", "-1"]),
        ("Invalid value", ["--repeats", "many"]),
    ],
)  # fmt: skip
def test_wrong_values_are_explained_with_exit_code_2(chat_folder, capsys, message, arguments):
    assert run(chat_folder, *arguments) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert captured.out == ""


def test_answers_have_the_length_that_was_asked_for_and_prompts_are_never_cached(chat_folder):
    llm = LLM(chat_folder, dtype="float32")
    options = BenchOptions(
        prompt_tokens=40,
        output_tokens=6,
        num_prompts=4,
        rate_per_second=500.0,
        prefill_tokens=(64,),
        repeats=2,
    )
    measure(llm, options, name="tiny")
    assert llm.stats.num_cached_tokens == 0
    num_requests = 2 * (1 + 4 + 4)  # latency, throughput, rate
    assert llm.stats.num_output_tokens == num_requests * 6 + 2 + 4 * 2  # and prefill, and 4 times warming up


def test_the_load_of_others_is_a_share_or_unknown(tmp_path, monkeypatch):
    monkeypatch.undo()
    load = bench.foreign_load(0.05)
    assert load is not None
    assert 0 <= load <= 1
    assert bench.foreign_load(0.0, tmp_path / "none") is None
    assert "foreign CPU load before: unknown" in Report({}, None, [Figure("a", "b", "ms", (1.0,))]).as_text()


def test_options_are_checked_without_a_command_line():
    with pytest.raises(RequestError, match="There is no part"):
        BenchOptions(only=("speed",))
