"""The tiny program of tests/targets/tiny.py with kernels for a GPU, and stand-ins for cubins."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from pathlib import Path

from edgepress.targets.base import Artifact, Target
from edgepress.targets.cuda.images import images_object
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.export import export
from edgepress.targets.program import Program
from tests.targets.tiny import HOST, compile_c, tiny_answer, tiny_feed, tiny_program

TARGET = dataclasses.replace(
    HOST, name="cuda-sm90", isa="cuda", cores=4, gpu_arch="sm_90", gpu_multiprocessors=8
)
COMPILER = "nvcc 13.0.48"
SHARED_BYTES = 100 * 1024
"""More than a kernel has without asking, and than some GPUs have."""

_ADD_ONE = """
extern "C" __global__ void add_one(const float *x, float *y)
{
    if (threadIdx.x < 6)
        y[threadIdx.x] = x[threadIdx.x] + 1;
}
"""
# Wrong, unless the counter was zero; the last of three blocks makes it zero again.
_SCALE = """
extern "C" __global__ void scale(const float *x, const float *factor, float *y, uint32_t *counter)
{
    __shared__ uint32_t before;
    if (threadIdx.x == 0)
        before = atomicAdd(counter + 1, 1u);
    __syncthreads();
    int i = blockIdx.x * 2 + threadIdx.x;
    if (threadIdx.x < 2)
        y[i] = before < gridDim.x ? x[i] * factor[i] : -99;
    if (threadIdx.x == 0 && before == gridDim.x - 1)
        counter[1] = 0;
}
"""
_SUM = """
extern "C" __global__ void sum(const float *x, const int8_t *offset, int32_t *total)
{
    wait_for_previous();
    SHARED_MEMORY(memory);
    float *values = (float *)(memory + 100 * 1024 - 32);
    if (threadIdx.x < 6)
        values[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    float all = 0;
    for (int i = 0; i < 6; i++)
        all += values[i];
    if (threadIdx.x == 0)
        *total = (int32_t)all + offset[0];
}
"""


def tiny_kernels() -> dict[str, CudaKernel]:
    """Kernels of `tiny_program`, by name: one with counters; one with much shared memory, which may
    start early."""
    one, three, warp = (1, 1, 1), (3, 1, 1), (32, 1, 1)
    return {
        "add_one": CudaKernel("add_one", _ADD_ONE, ("types.cuh",), one, warp),
        "scale": CudaKernel("scale", _SCALE, ("types.cuh",), three, warp, counters=2),
        "sum": CudaKernel("sum", _SUM, ("types.cuh",), one, warp, SHARED_BYTES, overlaps=True),
    }


def tiny_cuda_program() -> Program:
    """Return `tiny_program` for a GPU."""
    program = tiny_program()
    program.kernels = dict(tiny_kernels())
    return program


def stand_in_cubin(names: Sequence[str], architecture: int = 90) -> bytes:
    """An ELF file for a GPU that has functions of these names, and no code for it."""
    source = "".join(f"void {name}(void) {{}}\n" for name in names)
    image = bytearray(compile_c(HOST, source))
    image[8] = 7  # the ABI's version
    struct.pack_into("<H", image, 18, 190)  # the machine: NVIDIA CUDA
    struct.pack_into("<I", image, 48, architecture)
    return bytes(image)


def export_tiny_cuda(
    folder: Path, target: Target = TARGET, cubins: Sequence[bytes] | None = None
) -> Artifact:
    """Export the tiny program for a GPU, with two golden samples beside it."""
    if cubins is None:
        cubins = [stand_in_cubin(["add_one", "sum"]), stand_in_cubin(["scale"])]
    artifact = export(
        tiny_cuda_program(),
        images_object(cubins, target, COMPILER),
        target,
        folder,
        name="tiny",
        tolerances=(0, 0),
    )
    (folder / "golden").mkdir()
    for seed in range(2):
        feed = tiny_feed(seed)
        answer = tiny_answer(feed)
        (folder / f"golden/{seed}.in").write_bytes(b"".join(a.tobytes() for a in feed.values()))
        (folder / f"golden/{seed}.out").write_bytes(b"".join(a.tobytes() for a in answer.values()))
    return artifact
