"""Peak memory while loading: the weights plus how much? On a random InternLM2-7B in bfloat16 (15.5 GB on disk).

Run: python benchmarks/load_memory.py [--preset 7b] [--folder DIR]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from hardware import RESULTS, header

from internlm2.checkpoint.memory import GIB
from internlm2.checkpoint.save import save_checkpoint
from internlm2.checkpoint.source import TensorInfo, expected_shapes
from internlm2.model import preset

CHILD = """
import json, re, sys, time
import torch
from internlm2.checkpoint.load import load_model  # imports are not part of loading
from pathlib import Path
def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = status("VmRSS")
start = time.monotonic()
model = load_model(sys.argv[1], dtype=sys.argv[2])
seconds = time.monotonic() - start
after_load = status("VmHWM")
with torch.inference_mode():
    model(torch.ones(1, 1, dtype=torch.int64))  # touches every weight but the embedding
print(json.dumps({"before": before, "load": after_load, "forward": status("VmHWM"), "seconds": seconds}))
"""


class RandomCheckpoint:
    """A model of random weights that exists one tensor at a time."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.path = Path(name)
        self.config = preset(name)
        shapes = expected_shapes(self.config)
        self.tensors = {n: TensorInfo(s, dtype, "random") for n, s in shapes.items()}
        self.tokenizer_folder = None

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        # 1 MiB of noise repeated: the values do not matter here, only the bytes.
        noise = (torch.randn(1 << 19) * 0.02).to(info.dtype)
        size = torch.Size(info.shape).numel()
        return noise.repeat(-(-size // noise.numel()))[:size].view(info.shape)


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """One load in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), dtype], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Write the folders, measure, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--folder", type=Path, default=None, help="where the random models go")
    options = parser.parse_args()
    rows = []
    for stored, wanted in (("bfloat16", "bfloat16"), ("float16", "bfloat16")):
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary) / "model"
            checkpoint = RandomCheckpoint(options.preset, getattr(torch, stored))
            start = time.monotonic()
            save_checkpoint(checkpoint, folder)
            writing = time.monotonic() - start
            weights = sum(i.num_bytes for i in checkpoint.tensors.values())
            found = measure(folder, wanted)
        rows.append(
            f"| {stored} -> {wanted} | {weights / GIB:.2f} | {(found['load'] - found['before']) / GIB:.2f} | "
            f"{(found['forward'] - found['before']) / GIB:.2f} | "
            f"**{(found['forward'] - found['before'] - weights) / GIB:+.2f}** | {found['seconds']:.1f} "
            f"| {writing:.0f} |"
        )
        print(rows[-1], flush=True)
    text = header(
        f"Peak memory of loading, random InternLM2 {options.preset.upper()}",
        f"python benchmarks/load_memory.py --preset {options.preset}",
        ("torch", "safetensors"),
    )
    text += (
        "Peak resident memory (VmHWM) above what the process held before loading, in GiB. With equal dtypes the\n"
        "weights stay views of the mapped files, so they are resident only once a forward pass has touched them;\n"
        "with a cast every tensor is copied and its mapping closed before the next is read. Goal: weights + 1 GiB.\n\n"
        "| stored -> loaded | weights | peak after load | peak after a forward pass | above the weights "
        "| load s | write s |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    (RESULTS / "load_memory.md").write_text(text)


if __name__ == "__main__":
    main()
