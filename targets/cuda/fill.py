"""Zeros: what stands for the output of a layer before, where layers are measured alone."""

from __future__ import annotations

import numpy as np

from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.cuda.launch import THREADS, blocks_for, flat_kernel

_WORD_BYTES = 4


def fill(name: str, size: int, dtype: str, multiprocessors: int) -> CudaKernel:
    """Generate a kernel that writes `size` zeros of a dtype."""
    size_bytes = size * np.dtype(dtype).itemsize
    words = size_bytes // _WORD_BYTES
    body = f"""const int stride = {THREADS} * gridDim.x;
    const int first = threadIdx.x + {THREADS} * blockIdx.x;
    for (int i = first; i < {words}; i += stride)
        ((uint32_t *)y)[i] = 0;
    if (first < {size_bytes % _WORD_BYTES})
        ((uint8_t *)y)[{words * _WORD_BYTES} + first] = 0;"""
    blocks = blocks_for(words, multiprocessors)
    return flat_kernel(name, [(dtype, "y")], body, ("types.cuh",), blocks)
