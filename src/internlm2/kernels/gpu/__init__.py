"""Compute on NVIDIA GPUs: what torch lacks there, in Triton, each kernel with a twin in plain torch.

`attention` reads pages of one new row a sequence, `prefill` attends with torch's own kernels, `elementwise` is what
stands between products, `linear` multiplies with int8 and int4 weights, `fp8` with e4m3. Files named `*_triton` are
imported on first use: nothing here needs a GPU, nor Triton, to be imported.
"""
