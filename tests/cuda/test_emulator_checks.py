"""The emulator's checks of every load and store find what a GPU would not report."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.program import Call, Program, Tensor
from tests.cuda import emulation
from tests.cuda.emulation import EmulationError
from tests.cuda.test_emulator import kernel, random

emulate = functools.partial(emulation.emulate, checked=True)
emulate_kernel = functools.partial(emulation.emulate_kernel, checked=True)

# Either of the two may come first.
RACE = (
    r"checked, block \(0, 0, 0\), thread .*: (loads|stores) byte \d+ of shared memory"
    r"( \(by (cp.async|ldmatrix)\))?, in a race with thread \d+ of the block"
)
# A block of 64 threads: each writes its word of shared memory, then does what the case says.
CASES = {
    "a barrier": ("__syncthreads(); y[i] = words[63 - i];", ""),
    "no barrier": (
        "y[i] = words[63 - i];",
        RACE,
    ),
    "own words": ("y[i] = words[i];", ""),
    "a neighbour's after __syncwarp": ("__syncwarp(); y[i] = words[i ^ 1];", ""),
    "a neighbour's after a shuffle": (
        "__shfl_sync(0xffffffff, i, 0); y[i] = words[i ^ 1];",
        RACE,
    ),
    "another warp's after __syncwarp": (
        "__syncwarp(); y[i] = words[i ^ 32];",
        RACE,
    ),
    "a store after others' loads": (
        "__syncthreads(); y[i] = words[63 - i]; words[i] = 0;",
        RACE,
    ),
    "a store after others' loads and a barrier": (
        "__syncthreads(); y[i] = words[63 - i]; __syncthreads(); words[i] = 0;",
        "",
    ),
    "a store after all have loaded": (
        "__syncthreads(); y[i] = words[0]; if (i == 63) words[0] = 0;",
        RACE,
    ),
    "two stores": ("words[i / 2] = 1;", RACE),
    "static shared memory": (
        "__shared__ int fixed[64]; fixed[i] = i; y[i] = fixed[63 - i];",
        RACE,
    ),
    "behind shared memory": ("words[64] = 0;", "stores 4 bytes at byte 256 of 256 of shared"),
    "an index outside": (
        "int own[4] = {}; own[i] = 1; y[i] = own[(i + 1) % 4];",
        r"checked.cu:9: index \d+ is outside its array",
    ),
    "outside an argument": (
        "y[i] = x[64];",
        r"loads 4 bytes at 0x\w+, outside all arguments \(checked.cu:9\)",
    ),
    "across the end of an argument": (
        "Vector<int, 4> v = *(const Vector<int, 4> *)(x + i / 32 * 61 / 4 * 4); y[i] = v.lane[3];",
        "",
    ),
    "not aligned": (
        "Vector<int, 4> v = *(const Vector<int, 4> *)(x + 1); y[i] = v.lane[0];",
        r"0x\w+ is not a multiple of 16",
    ),
    "two threads' outputs": (
        "y[i / 2] = 1;",
        r"stores byte \d+ of argument 1, in a race with thread \d+ of the block \(checked.cu:9\)",
    ),
    "two blocks' outputs": ("y[0] = x[blockIdx.x];", "in a race with"),
    "a block's output read by another": (
        "if (blockIdx.x == 0) y[i] = 1; else z[i] = y[i];",
        r"byte \d+ of argument 1, in a race with block",
    ),
    "a copy that is waited for": (
        "cp_async<4>(words + i, x + i); cp_async_commit(); cp_async_wait<0>(); y[i] = words[i];",
        "",
    ),
    "a copy that is not waited for": (
        "cp_async<4>(words + i, x + i); cp_async_commit(); cp_async_wait<1>(); y[i] = words[i];",
        "loads byte .* of shared memory, which cp.async still fills",
    ),
    "a copy that another thread has waited for": (
        "cp_async<4>(words + i, x + i); cp_async_commit(); cp_async_wait<0>();"
        "y[i] = words[i ^ 1];",
        RACE,
    ),
    "a copy over what others read": (
        "__syncthreads(); y[i] = words[63 - i]; cp_async<4>(words + i, x + i); cp_async_commit();"
        "cp_async_wait<0>();",
        RACE,
    ),
    "a copy from outside": (
        "cp_async<4>(words + i, x + 64);",
        "loads 4 bytes at .*, outside all arguments",
    ),
    "a matrix whose rows are there": (
        "__syncwarp(); uint32_t r[4]; ldmatrix_x4(r, words + i / 32 * 32 + i % 8 * 4);", ""
    ),
    "a matrix whose rows are not": (
        "uint32_t r[4]; ldmatrix_x4(r, words + i / 32 * 32 + i % 8 * 4);",
        RACE,
    ),
}  # fmt: skip


def case(body: str, blocks: int) -> CudaKernel:
    text = f"""
        SHARED_MEMORY(memory);
        int *words = (int *)memory;
        int i = threadIdx.x;
        words[i] = i;
        (void)z;
{body}"""
    parameters = "const int *x, int *y, int *z"
    return kernel(
        "checked", parameters, text, grid=(blocks, 1, 1), block=(64, 1, 1), shared_bytes=256
    )


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str, order: str) -> None:
    body, message = CASES[name]
    checked = case(body, 2 if "block" in name else 1)
    arrays = [np.arange(64, dtype=np.int32), np.zeros(64, np.int32), np.zeros(64, np.int32)]
    if not message:
        emulate_kernel(checked, arrays, order=order)
        return
    with pytest.raises(EmulationError, match=message):
        emulate_kernel(checked, arrays, order=order)


def test_blocks_with_counters_may_wait_for_each_other() -> None:
    body = """
        __shared__ uint32_t arrived;
        partial[blockIdx.x * 32 + threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x];
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0)
            arrived = atomicAdd(counter, 1u);
        __syncthreads();
        if (arrived == gridDim.x - 1) {
            for (uint32_t i = 0; i < gridDim.x; ++i)
                sum += partial[i * 32 + threadIdx.x];
            out[threadIdx.x] = sum;
            if (threadIdx.x == 0)
                atomicExch(counter, 0u);
        }
    """
    parameters = "const float *x, float *partial, float *out, uint32_t *counter"
    added = kernel("ordered", parameters, "float sum = 0;" + body, grid=(9, 1, 1), counters=1)
    x, out = random((9, 32)), np.zeros(32, np.float32)
    emulate_kernel(added, [x, np.zeros((9, 32), np.float32), out])
    np.testing.assert_array_equal(out, np.cumsum(x, axis=0, dtype=np.float32)[-1])


def overlapping(body: str) -> Program:
    """Return a second call, of a kernel that may start before the first has ended."""
    first = kernel("before", "const float *x, float *t", "t[threadIdx.x] = x[threadIdx.x];")
    second = kernel("early", "const float *t, const float *w, float *y", body)
    return Program(
        inputs=("x",),
        outputs=("y",),
        tensors={name: Tensor(name, "float32", (32,)) for name in "xty"},
        constants={"w": random((32,), 1)},
        calls=[Call("before", ("x", "t"), ("t",)), Call("early", ("t", "w", "y"), ("y",))],
        kernels={"before": first, "early": dataclasses.replace(second, overlaps=True)},
    )


def test_weights_may_be_read_before_the_kernel_before_has_ended() -> None:
    program = overlapping(
        "int i = threadIdx.x; float weight = w[i]; wait_for_previous(); y[i] = weight * t[i];"
    )
    x = random((32,))
    np.testing.assert_array_equal(emulate(program, {"x": x})["y"], x * program.constants["w"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("float given = t[threadIdx.x]; wait_for_previous(); y[threadIdx.x] = given;", "loads"),
        ("y[threadIdx.x] = 1; wait_for_previous();", "stores"),
        ("if (threadIdx.x) wait_for_previous(); y[threadIdx.x] = 1;", "stores"),
    ],
)
def test_other_tensors_may_not(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=rf"early.*{message} argument . before wait_for_prev"):
        emulate(overlapping(body), {"x": random((32,))})


def test_weights_are_not_written() -> None:
    program = overlapping("wait_for_previous(); ((float *)w)[threadIdx.x] = 1;")
    with pytest.raises(EmulationError, match=r"early.*: stores to argument 1, an input"):
        emulate(program, {"x": random((32,))})
