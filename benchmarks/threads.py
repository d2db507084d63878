"""Do waiting threads spin or sleep? Decoding speed of the demo model, alone and beside one busy program.

Run: python benchmarks/threads.py. Alternating runs, medians of five.
"""

import json
import os
import statistics
import subprocess
import sys

from hardware import RESULTS, header

ROUNDS = 5
COMMAND = [
    sys.executable, "-m", "internlm2", "generate", "demo", "Tell me a story.", "--chat", "--json", "--temperature", "0",
    "--max-tokens", "40", "--dtype", "bfloat16",
]  # fmt: skip


def tokens_per_second(policy: str) -> float:
    """One run in a process of its own. policy: "active" (OpenMP's own way) or "passive" (ours)."""
    environment = os.environ | {"OMP_WAIT_POLICY": policy}
    if policy == "active":
        environment["GOMP_SPINCOUNT"] = "300000"  # libgomp's default; "active" alone would spin far longer
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["tokens_per_second"]


def main() -> None:
    """Measure both surroundings and write the result file."""
    rows = []
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            pairs = [(tokens_per_second("active"), tokens_per_second("passive")) for _ in range(ROUNDS)]
        finally:
            if other is not None:
                other.kill()
        spin, sleep = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        place = "beside one busy program" if busy else "alone"
        rows.append(f"| {place} | {spin:.1f} | {sleep:.1f} | **{ratio:.2f}** |")
        print(rows[-1], flush=True)
    text = header("Spinning and sleeping threads", "python benchmarks/threads.py", ("torch",))
    text += (
        "Single-stream decoding of the demo model, bfloat16, as many threads as cores, tokens/s.\n\n"
        "| machine | threads spin (default of OpenMP) | threads sleep (`OMP_WAIT_POLICY=passive`, ours) | ratio |\n"
        "|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    (RESULTS / "threads.md").write_text(text)


if __name__ == "__main__":
    main()
