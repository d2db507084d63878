"""What torch lacks: matrix products of few rows at the speed of the memory, with packed bf16, int8 or int4 weights.

C++ without torch headers (`cpu/`), built when the package is installed or on first use (`build.py`), called through
ctypes (`library.py`); every function has a plain-torch twin (`twin.py`) that tests compare it with and that runs
where no compiler is found. `linear` chooses between them.
"""

from internlm2.kernels.dispatch import linear
from internlm2.kernels.packed import PackedWeight, pack_bfloat16, pack_int4, pack_int8, unpack

__all__ = ["PackedWeight", "linear", "pack_bfloat16", "pack_int4", "pack_int8", "unpack"]
