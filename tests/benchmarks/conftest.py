"""The benchmarks are scripts, not a package. What is tested of them is imported here and their folder then leaves the
path, where its `kernels.py` or `engine.py` would hide the folders of the same names beside this one.
"""

import importlib
import sys
from pathlib import Path

FOLDER = str(Path(__file__).parents[2] / "benchmarks")

sys.path.append(FOLDER)
for name in ("hardware", "load_memory", "race"):
    importlib.import_module(name)
sys.path.remove(FOLDER)
