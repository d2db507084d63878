"""What every result file states: machine, versions, commit, date, and who else was using the processor."""

import datetime
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

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
    return (
        f"# {title}\n\n"
        f"- date: {datetime.datetime.now(tz=datetime.UTC).date()}, commit {commit or 'unknown'}\n"
        f"- hardware: {cpu}, {cores} cores, {int(memory) / 1e6:.0f} GB; foreign load {foreign_load():.0%}\n"
        f"- versions: Python {platform.python_version()}, {versions}\n"
        f"- command: `{command}`\n\n"
    )


def foreign_load(seconds: float = 2.0) -> float:
    """Share of the processor that others use while this process sleeps."""

    def read() -> tuple[int, int]:
        numbers = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]

    total, idle = read()
    time.sleep(seconds)
    total_after, idle_after = read()
    return 1 - (idle_after - idle) / max(1, total_after - total)
