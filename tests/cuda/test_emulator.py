"""The emulator: computes what a GPU computes, and finds what would go wrong on one."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.program import Array, Call, Program, Tensor
from tests.cuda import emulation
from tests.cuda.emulation import ORDERS, EmulationError

LANES = np.arange(32)
# What is found without looking at every load and store.
emulate = functools.partial(emulation.emulate, checked=False)
emulate_kernel = functools.partial(emulation.emulate_kernel, checked=False)


def kernel(
    name: str,
    parameters: str,
    body: str,
    *,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
    shared_bytes: int = 0,
    counters: int = 0,
) -> CudaKernel:
    source = f'extern "C" __global__ void {name}({parameters})\n{{\n{body}\n}}\n'
    return CudaKernel(name, source, ("types.cuh",), grid, block, shared_bytes, counters)


def random(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Threads and barriers


def test_every_thread_of_every_block_runs_once() -> None:
    numbered = kernel(
        "numbered",
        "uint32_t *out",
        """
        uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        uint32_t at = block * blockDim.x * blockDim.y * blockDim.z + thread;
        out[at] += at;
        """,
        grid=(3, 2, 5),
        block=(5, 3, 4),
    )
    out = np.ones(30 * 60, np.uint32)
    emulate_kernel(numbered, [out])
    np.testing.assert_array_equal(out, 1 + np.arange(1800))


REVERSED = """
    __shared__ float turned[64];
    turned[threadIdx.x] = x[threadIdx.x];
    {barrier}
    y[threadIdx.x] = turned[63 - threadIdx.x];
"""


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_makes_what_was_written_visible(order: str) -> None:
    body = REVERSED.format(barrier="__syncthreads();")
    turned = kernel("turned", "const float *x, float *y", body, block=(64, 1, 1))
    x, y = random((64,)), np.zeros(64, np.float32)
    emulate_kernel(turned, [x, y], order=order)
    np.testing.assert_array_equal(y, x[::-1])


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_leaves_nan(order: str) -> None:
    turned = kernel(
        "unsynchronised", "const float *x, float *y", REVERSED.format(barrier=""), block=(64, 1, 1)
    )
    x, y = random((64,)), np.zeros(64, np.float32)
    emulate_kernel(turned, [x, y], order=order)
    assert np.isnan(y).any()


def test_shared_memory_is_not_that_of_the_block_before() -> None:
    stale = kernel(
        "stale",
        "uint32_t *out",
        """
        SHARED_MEMORY(memory);
        __shared__ uint32_t fixed[32];
        uint32_t *words = (uint32_t *)memory;
        out[blockIdx.x * 64 + threadIdx.x] = words[threadIdx.x];
        out[blockIdx.x * 64 + 32 + threadIdx.x] = fixed[threadIdx.x];
        words[threadIdx.x] = fixed[threadIdx.x] = 7;
        """,
        grid=(6, 1, 1),
        shared_bytes=128,
    )
    out = np.zeros(6 * 64, np.uint32)
    emulate_kernel(stale, [out])
    assert set(out) == {0xFFA5FFA5}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 32) __syncthreads();", "warps of a block diverge.*diverging.cu:3"),
        ("if (threadIdx.x < 5) __syncthreads();", "lanes of a warp diverge.*__syncthreads"),
        ("if (threadIdx.x % 2) __syncwarp();", "lanes of a warp diverge.*__syncwarp"),
        ("if (threadIdx.x >= 40) return;\n__syncthreads();", "lanes of a warp diverge"),
        ("if (threadIdx.x < 32)\n__syncthreads();\nelse\n__syncthreads();", "warps of a block div"),
        ("out[0] = __shfl_sync(0xffff, 1, 0);", "whole warps"),
    ],
)
def test_threads_that_part_are_reported(body: str, message: str) -> None:
    diverging = kernel("diverging", "int *out", body, block=(64, 1, 1))
    with pytest.raises(EmulationError, match=rf"(?s)diverging.*{message}"):
        emulate_kernel(diverging, [np.zeros(64, np.int32)])


def test_after_a_failure_the_next_launch_is_right() -> None:
    test_threads_that_part_are_reported("if (threadIdx.x < 5) __syncthreads();", "diverge")
    test_a_barrier_makes_what_was_written_visible("forward")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_bytes": 228 * 1024}, "shared memory"),
        ({"grid": (1, 65536, 1)}, "grid"),
        ({"block": (1, 1, 65)}, "threads"),
    ],
)
def test_impossible_launches_are_refused(changes: dict[str, object], message: str) -> None:
    launch = kernel("impossible", "int *out", "out[0] = 1;")
    with pytest.raises(EmulationError, match=f"impossible: .*{message}"):
        emulate_kernel(dataclasses.replace(launch, **changes), [np.zeros(1, np.int32)])  # type: ignore[arg-type]


# Memory


def test_writing_behind_an_argument_is_reported() -> None:
    behind = kernel("behind", "const int *x, char *out", "out[threadIdx.x + 1] = 0;")
    with pytest.raises(EmulationError, match="behind: wrote outside argument 1, at byte 32 of 32"):
        emulate_kernel(behind, [np.zeros(1, np.int32), np.zeros(32, np.int8)])


def test_writing_before_an_argument_is_reported() -> None:
    before = kernel("before", "char *out", "out[(int)threadIdx.x - 1] = 0;")
    with pytest.raises(EmulationError, match="before: wrote outside argument 0, at byte -1 of 32"):
        emulate_kernel(before, [np.zeros(32, np.int8)])


def test_writing_behind_shared_memory_is_reported() -> None:
    behind = kernel("beyond", "char *out", "SHARED_MEMORY(m); m[33] = 0;", shared_bytes=33)
    with pytest.raises(EmulationError, match="beyond: wrote behind its 33 bytes of shared memory"):
        emulate_kernel(behind, [np.zeros(32, np.int8)])


def test_an_address_without_memory_is_reported() -> None:
    wild = kernel("wild", "int *out", "out[threadIdx.x + (1l << 40)] = 0;")
    with pytest.raises(EmulationError, match=r"wild, block \(0, 0, 0\), thread .*no memory at 0x"):
        emulate_kernel(wild, [np.zeros(32, np.int32)])


def test_arguments_must_be_as_many_as_parameters() -> None:
    two = kernel("two", "int *a, int *b", "")
    with pytest.raises(EmulationError, match="two: 2 parameters, but 1 arguments"):
        emulate_kernel(two, [np.zeros(1, np.int32)])


SPLIT_SUM = """
    // The last block to arrive adds up what the others left, in their order.
    __shared__ uint32_t arrived;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = x[blockIdx.x];
        __threadfence();
        arrived = atomicAdd(counter, 1u);
    }
    __syncthreads();
    if (arrived == gridDim.x - 1 && threadIdx.x == 0) {
        float sum = 0;
        for (uint32_t i = 0; i < gridDim.x; ++i)
            sum += partial[i];
        out[0] = sum;
        LEAVE;
    }
"""


@pytest.mark.parametrize("order", ORDERS)
def test_the_last_of_many_blocks_sees_what_the_others_wrote(order: str) -> None:
    parameters = "const float *x, float *partial, float *out, uint32_t *counter"
    body = SPLIT_SUM.replace("LEAVE", "atomicExch(counter, 0u)")
    added = kernel("added", parameters, body, grid=(301, 1, 1), counters=1)
    x, out = random((301,)), np.zeros(1, np.float32)
    for seed in range(5):
        emulate_kernel(added, [x, np.zeros(301, np.float32), out], order=order, seed=seed)
        assert out[0] == np.cumsum(x, dtype=np.float32)[-1]


def test_counters_must_be_left_at_zero() -> None:
    parameters = "const float *x, float *partial, float *out, uint32_t *counter"
    body = SPLIT_SUM.replace("LEAVE", "")
    added = kernel("uncleared", parameters, body, grid=(3, 1, 1), counters=1)
    arrays = [random((3,)), np.zeros(3, np.float32), np.zeros(1, np.float32)]
    with pytest.raises(EmulationError, match=r"uncleared: left its counters at \[3\]"):
        emulate_kernel(added, arrays)


# Copies by cp.async

COPIED = """
    SHARED_MEMORY(memory);
    float *stage = (float *)memory;
    for (int group = 0; group < 3; ++group) {
        cp_async_zero<16>(stage + group * 128 + threadIdx.x * 4, x + group * 128 + threadIdx.x * 4,
                          threadIdx.x < 31);
        cp_async_commit();
    }
    WAIT;
    __syncthreads();
    for (int i = threadIdx.x; i < 384; i += 32)
        out[i] = stage[i];
"""


@pytest.mark.parametrize(("left", "arrived"), [(0, 3), (1, 2), (2, 1), (3, 0)])
def test_copies_arrive_no_earlier_than_they_are_waited_for(left: int, arrived: int) -> None:
    body = COPIED.replace("WAIT", f"cp_async_wait<{left}>()")
    copied = kernel("copied", "const float *x, float *out", body, shared_bytes=384 * 4)
    x, out = random((3, 128)), np.zeros((3, 128), np.float32)
    emulate_kernel(copied, [x, out], order="forward")
    expected = np.where(np.arange(128) < 124, x, 0)
    np.testing.assert_array_equal(out[:arrived], expected[:arrived])
    assert np.isnan(out[arrived:]).all()


def test_copies_may_arrive_at_once() -> None:
    body = COPIED.replace("WAIT", "cp_async_wait<3>()")
    copied = kernel("hurried", "const float *x, float *out", body, shared_bytes=384 * 4)
    x, out = random((3, 128)), np.zeros((3, 128), np.float32)
    emulate_kernel(copied, [x, out], order="backward")
    np.testing.assert_array_equal(out, np.where(np.arange(128) < 124, x, 0))


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        ("cp_async<16>(memory + 4, x)", "not aligned"),
        ("cp_async<8>(memory, (const char *)x + 4)", "not aligned"),
        ("cp_async<16>(memory + 120, x)", "not in shared memory"),
        ("cp_async<16>((void *)x, x)", "not in shared memory"),
    ],
)
def test_copies_to_where_they_cannot_go_are_reported(copy: str, message: str) -> None:
    body = f"SHARED_MEMORY(memory); {copy};"
    wrong = kernel("miscopied", "const float *x", body, shared_bytes=128)
    with pytest.raises(EmulationError, match=f"miscopied.*{message}"):
        emulate_kernel(wrong, [random((32,))])


# What lanes do together


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("__shfl_sync(0xffffffff, x[lane], (lane + 5) % 64)", (LANES + 5) % 32),
        ("__shfl_xor_sync(0xffffffffu, x[lane], 9)", LANES ^ 9),
        ("__shfl_down_sync(0xffffffff, x[lane], 3)", np.where(LANES < 29, LANES + 3, LANES)),
        ("__shfl_up_sync(0xffffffff, x[lane], 3)", np.where(LANES > 2, LANES - 3, LANES)),
    ],
)
def test_shuffles_take_values_of_other_lanes(expression: str, expected: Array) -> None:
    body = f"int lane = threadIdx.x % 32; y[threadIdx.x] = {expression};"
    shuffled = kernel("shuffled", "const float *x, float *y", body, block=(64, 1, 1))
    x, y = random((32,)), np.zeros(64, np.float32)
    emulate_kernel(shuffled, [x, y])
    np.testing.assert_array_equal(y, np.tile(x[expected], 2))


def test_votes() -> None:
    body = "out[threadIdx.x] = __ballot_sync(0xffffffff, threadIdx.x % 3 == 0);"
    out = np.zeros(32, np.uint32)
    emulate_kernel(kernel("voted", "uint32_t *out", body), [out])
    assert set(out) == {sum(1 << lane for lane in range(0, 32, 3))}


# Programs


def two_calls(second: str) -> Program:
    """Return y = second(2 x), with a constant and scratch memory between."""
    doubled = kernel("doubled", "const float *x, float *t", "t[threadIdx.x] = 2 * x[threadIdx.x];")
    added = kernel("shifted_by", "float *t, const float *c, float *y", second)
    tensors = {"x": "float32", "t": "float32", "y": "float32"}
    return Program(
        inputs=("x",),
        outputs=("y",),
        tensors={name: Tensor(name, dtype, (4, 8)) for name, dtype in tensors.items()},
        constants={"c": random((32,))},
        calls=[
            Call("doubled", ("x", "t"), ("t",), "first"),
            Call("shifted_by", ("t", "c", "y"), ("y",), "second"),
        ],
        kernels={"doubled": doubled, "shifted_by": added},
    )


def test_a_program_gives_its_outputs() -> None:
    program = two_calls("y[threadIdx.x] = t[threadIdx.x] + c[threadIdx.x];")
    x = random((4, 8), 1)
    outputs = emulate(program, {"x": x})
    assert list(outputs) == ["y"]
    expected = 2 * x + program.constants["c"].reshape(4, 8)
    np.testing.assert_array_equal(outputs["y"], expected)


def test_what_no_call_writes_is_nan() -> None:
    program = two_calls("if (threadIdx.x) y[threadIdx.x] = t[threadIdx.x];")
    outputs = emulate(program, {"x": random((4, 8))})
    np.testing.assert_array_equal(np.isnan(outputs["y"].ravel()), np.arange(32) == 0)


def test_writing_into_an_input_of_a_call_is_reported() -> None:
    program = two_calls("y[threadIdx.x] = t[threadIdx.x]; t[3] = 0;")
    message = r"shifted_by \(second\): wrote into t, an input"
    with pytest.raises(EmulationError, match=message):
        emulate(program, {"x": random((4, 8))})


@pytest.mark.parametrize("x", [random((8, 4)), random((4, 8)).astype(np.float64), random((4, 9))])
def test_inputs_must_have_their_form(x: Array) -> None:
    with pytest.raises(ValueError, match=r"x is float32\[4, 8\], not "):
        emulate(two_calls(""), {"x": x})


def test_a_kernel_that_does_not_compile_is_reported() -> None:
    wrong = kernel("misspelt", "float *x", "y[0] = 1;")
    with pytest.raises(RuntimeError, match=r"misspelt.cu:3.*‘y’ was not declared"):
        emulate_kernel(wrong, [random((1,))])
