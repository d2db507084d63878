"""What every result file states: machine, versions, commit, date, and who else was using the processor."""

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from internlm2.engine.bench import foreign_load

RESULTS = Path(__file__).parent / "results"


def header(title: str, command: str, packages: tuple[str, ...]) -> str:
    """The first lines of a result file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    cores = sum(line.startswith("processor") for line in lines)
    memory = Path("/proc/meminfo").read_text().split()[1]
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    load = foreign_load()
    assert load is not None, "/proc was read above"
    return (
        f"# {title}\n\n"
        f"- date: {datetime.datetime.now(tz=datetime.UTC).date()}, commit {commit or 'unknown'}\n"
        f"- hardware: {cpu}, {cores} cores, {int(memory) / 1e6:.0f} GB; foreign load {load:.0%}\n"
        f"- versions: Python {platform.python_version()}, {versions}\n"
        f"- command: `{command}`\n\n"
    )
