"""How long should waiting threads spin? Decoding speed of the demo model, alone and beside one busy program.

Run: python benchmarks/threads.py. Alternating runs, medians of five.
"""

import json
import os
import statistics
import subprocess
import sys

from hardware import RESULTS, header

ROUNDS = 5
SPIN_COUNTS = (300_000, 3_000, 0)
COMMAND = [
    sys.executable, "-m", "internlm2", "generate", "demo", "Tell me a story.", "--chat", "--json", "--temperature", "0",
    "--max-tokens", "40", "--dtype", "bfloat16",
]  # fmt: skip


def tokens_per_second(spin_count: int) -> float:
    """One run in a process of its own. spin_count: how long a waiting thread spins before it sleeps."""
    environment = os.environ | {"GOMP_SPINCOUNT": str(spin_count)}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["tokens_per_second"]


def main() -> None:
    """Measure both surroundings and write the result file."""
    rows = []
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            rounds = [[tokens_per_second(count) for count in SPIN_COUNTS] for _ in range(ROUNDS)]
        finally:
            if other is not None:
                other.kill()
        speeds = [statistics.median(column) for column in zip(*rounds, strict=True)]
        place = "beside one busy program" if busy else "alone"
        cells = " | ".join(f"{speed:.1f} ({speed / speeds[0]:.2f})" for speed in speeds)
        rows.append(f"| {place} | {cells} |")
        print(rows[-1], flush=True)
    text = header("Spinning and sleeping threads", "python benchmarks/threads.py", ("torch",))
    text += (
        "Single-stream decoding of the demo model, bfloat16, as many threads as cores: tokens/s, and in brackets the\n"
        "ratio to the first column. The command line sets 3000. Longer spins (20000) were as fast alone and slower\n"
        "than the default beside a busy program; beside three busy programs the default fell to 1 token/s.\n\n"
        "| machine | `GOMP_SPINCOUNT=300000` (libgomp's default) | 3000 (ours) | 0 (threads sleep at once) |\n"
        "|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    (RESULTS / "threads.md").write_text(text)


if __name__ == "__main__":
    main()
