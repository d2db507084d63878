"""What torch lacks: products of few rows with packed bf16, int8 or int4 weights, attention over pages, whole layers.

C++ without torch headers (`cpu/`), built when the package is installed or on first use (`build.py`), called through
ctypes (`library.py`). `linear`, `attention.attend` and `attention.write` have twins in plain torch that tests compare
with and that run where no compiler is found; `decoder`, all layers in one call, has the network itself as its twin.
"""

from internlm2.kernels.dispatch import linear
from internlm2.kernels.packed import PackedWeight, pack_bfloat16, pack_int4, pack_int8, turn, unpack

__all__ = ["PackedWeight", "linear", "pack_bfloat16", "pack_int4", "pack_int8", "turn", "unpack"]
