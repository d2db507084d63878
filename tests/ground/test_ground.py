"""The ground floor: strict configuration, progress that stays quiet, names that load lazily."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from internlm2 import log
from internlm2.config import from_dict, load_toml, save_toml, suggest
from internlm2.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    name: str = "x"


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    inner: Inner = dataclasses.field(default_factory=Inner)
    limit: int | None = None
    names: tuple[str, ...] = ()


def test_a_saved_configuration_is_read_back(tmp_path):
    config = Outer(steps=3, inner=Inner(rate=1.0, name="中文"), names=("a", "b"))
    save_toml(config, tmp_path / "a.toml")
    assert load_toml(Outer, tmp_path / "a.toml") == config


def test_overrides_win(tmp_path):
    (tmp_path / "a.toml").write_text("steps = 3\n[inner]\nrate = 2\n")
    assert load_toml(Outer, tmp_path / "a.toml", overrides={"steps": 5}) == Outer(
        steps=5, inner=Inner(rate=2.0)
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"step": 3}, r"unknown key 'step'. Did you mean 'steps'\?"),
        ({"steps": 1, "inner": {"rat": 1}}, r"where \[inner\]: unknown key 'rat'"),
        ({"steps": "3"}, "'steps' is '3', but must be a whole number"),
        ({"steps": True}, "'steps' is True, but must be a whole number"),
        ({"steps": 1, "inner": {"rate": "fast"}}, "'rate' is 'fast', but must be a number"),
        ({"steps": 1, "inner": {"name": 3}}, "'name' is 3, but must be a text"),
        ({}, "key 'steps' is missing"),
    ],
)
def test_what_does_not_fit_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, data, where="where")


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"Cannot read the configuration .*a.toml"):
        load_toml(Outer, tmp_path / "a.toml")
    with pytest.raises(ConfigError, match="Cannot read the configuration"):
        load_toml(Outer, tmp_path)


def test_suggestions_name_the_nearest_or_all():
    assert suggest("stpes", ["steps", "rate"]) == "Did you mean 'steps'?"
    assert suggest("zzz", ["b", "a"]) == "Known: a, b."


def test_short_work_says_nothing_and_long_work_a_line_each_tenth(caplog, monkeypatch):
    monkeypatch.setattr(log.logger, "propagate", True)
    with caplog.at_level(logging.INFO, logger="internlm2"):
        with log.progress("Quick", total=10) as bar:
            for _ in range(10):
                bar.advance(1)
        assert caplog.records == []
        slow = log.LineProgress("Slow", 100, "MB", started_seconds=-1e6)
        for _ in range(100):
            slow.advance(1)
    assert len(caplog.records) == 10
    assert caplog.records[4].getMessage().startswith("Slow: 50%")


def test_a_bar_for_a_terminal_counts_and_goes(capsys):
    bar = log.BarProgress("Work", 2, "MB")
    bar.advance(1)
    bar.advance(1)
    bar.stop()
    assert "Traceback" not in capsys.readouterr().err


def test_logging_goes_to_stderr(capsys):
    log.configure(verbosity=-1)
    log.logger.info("quiet")
    log.configure()
    log.logger.info("said")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "said\n")


def test_the_sources_read_no_environment_outside_their_place():
    root = Path(log.__file__).parent
    readers = {
        p.relative_to(root).parts[0]
        for p in root.rglob("*.py")
        if "os.environ" in p.read_text(encoding="utf-8")
    }
    # checkpoint and kernels: where the user's cache lies; sandbox: makes one of its own for the code it runs; engine:
    # hands it to the other processes of a split model; serve and eval: what Ray reads before it is imported.
    assert readers <= {"cli", "checkpoint", "kernels", "sandbox", "engine", "serve", "eval"}
