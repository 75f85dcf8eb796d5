"""Instructions against NumPy, with fragments built from the PTX ISA's formulas.

The emulator's, and where there is a GPU, the GPU's: what the emulator is to be like. The formulas
here give the place of every element; those of `emulator/warp.cpp` gather registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.program import Array
from tests.cuda.emulation import emulate_kernel
from tests.cuda.gpu import this_gpu

LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4


Machine = Callable[[CudaKernel, Sequence[Array]], None]


@pytest.fixture(scope="module", params=["emulator", pytest.param("gpu", marks=pytest.mark.cuda)])
def machine(request: pytest.FixtureRequest) -> Machine:
    """What runs a kernel."""
    return emulate_kernel if request.param == "emulator" else this_gpu().run


def place_a(i: int, depth: int) -> tuple[Array, Array]:
    """Row and column of element i of fragment A: m16n8k16 f16, m16n8k8 tf32, m16n8k32 s8."""
    match depth:
        case 16:
            row = GROUP if 0 <= i < 2 or 4 <= i < 6 else GROUP + 8
            column = MEMBER * 2 + (i & 1) + (0 if i < 4 else 8)
        case 8:
            row = GROUP if i in (0, 2) else GROUP + 8
            column = MEMBER if i in (0, 1) else MEMBER + 4
        case _:
            row = GROUP if 0 <= i < 4 or 8 <= i < 12 else GROUP + 8
            column = MEMBER * 4 + (i & 3) + (0 if i < 8 else 16)
    return row, column


def place_b(i: int, depth: int) -> tuple[Array, Array]:
    """Row and column of element i of fragment B."""
    match depth:
        case 16:
            row = MEMBER * 2 + (i & 1) + (0 if i < 2 else 8)
        case 8:
            row = MEMBER if i == 0 else MEMBER + 4
        case _:
            row = MEMBER * 4 + (i & 3) + (0 if i < 4 else 16)
    return row, GROUP


def place_d(i: int) -> tuple[Array, Array]:
    """Row and column of element i of the accumulators."""
    return GROUP if i < 2 else GROUP + 8, MEMBER * 2 + (i & 1)


def fragments(matrix: Array, registers: int, b: bool = False) -> Array:
    """Return [lane, register] as words of 32 bits."""
    depth = matrix.shape[0 if b else 1]
    elements = registers * 4 // matrix.itemsize
    place = place_b if b else place_a
    taken = np.stack([matrix[place(i, depth)] for i in range(elements)], axis=1)
    return np.ascontiguousarray(taken).view(np.uint32)


def multiply(machine: Machine, function: str, a: Array, b: Array, d: Array) -> Array:
    """Run one matrix instruction on matrices; returns d + a b as it says."""
    kind = "int32_t" if d.dtype == np.int32 else "float"
    parameters = f"const uint32_t *a, const uint32_t *b, {kind} *d"
    body = f"""
        uint32_t fa[4], fb[2];
        {kind} fd[4];
        for (int i = 0; i < 4; ++i) {{
            fa[i] = a[threadIdx.x * 4 + i];
            fd[i] = d[threadIdx.x * 4 + i];
        }}
        for (int i = 0; i < 2; ++i)
            fb[i] = b[threadIdx.x * 2 + i];
        {function}(fd, fa, fb);
        for (int i = 0; i < 4; ++i)
            d[threadIdx.x * 4 + i] = fd[i];
    """
    source = f'extern "C" __global__ void one_{function}({parameters})\n{{{body}}}\n'
    kernel = CudaKernel(f"one_{function}", source, ("types.cuh",), (1, 1, 1), (32, 1, 1))
    accumulators = np.stack([d[place_d(i)] for i in range(4)], axis=1)
    machine(kernel, [fragments(a, 4), fragments(b, 2, b=True), accumulators])
    result = np.empty_like(d)
    for i in range(4):
        result[place_d(i)] = accumulators[:, i]
    return result


def rounded(x: Array) -> Array:
    """float32 without the last 13 bits."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def in_turn(a: Array, b: Array, d: Array) -> Array:
    """Products one after the other in float32."""
    total = d.copy()
    for k in range(a.shape[1]):
        total += a[:, k : k + 1].astype(np.float32) * b[k].astype(np.float32)
    return total


def compare(machine: Machine, actual: Array, expected: Array) -> None:
    """Bit for bit; a GPU adds in an order, and cuts bits off, as it likes."""
    tolerance = 0 if machine is emulate_kernel else 1e-5
    np.testing.assert_allclose(actual, expected, tolerance, tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_mma_f16(machine: Machine, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = (random.standard_normal(s).astype(np.float16) for s in ((16, 16), (16, 8)))
    d = random.standard_normal((16, 8)).astype(np.float32)
    compare(machine, multiply(machine, "mma_f16", a, b, d), in_turn(a, b, d))


@pytest.mark.parametrize("seed", range(3))
def test_mma_tf32(machine: Machine, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b, d = (random.standard_normal(s).astype(np.float32) for s in ((16, 8), (8, 8), (16, 8)))
    expected = in_turn(rounded(a), rounded(b), d)
    compare(machine, multiply(machine, "mma_tf32", a, b, d), expected)


@pytest.mark.parametrize("start", [0, 2**31 - 1, -(2**31)])
def test_mma_s8(machine: Machine, start: int) -> None:
    random = np.random.default_rng(0)
    a, b = (random.integers(-128, 128, s, dtype=np.int8) for s in ((16, 32), (32, 8)))
    a[3], b[:, 5] = -128, -128
    d = np.full((16, 8), start, np.int32)
    exact = d.astype(np.int64) + a.astype(np.int64) @ b.astype(np.int64)
    np.testing.assert_array_equal(multiply(machine, "mma_s8", a, b, d), exact.astype(np.int32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix(machine: Machine, count: int, transposed: bool) -> None:
    """Lane 8 m + i points at row i of matrix m; register m is row GROUP, columns 2 MEMBER, + 1."""
    function = f"ldmatrix_x{count}{'_transposed' * transposed}"
    body = f"""
        SHARED_MEMORY(memory);
        uint16_t *rows = (uint16_t *)memory;
        for (int i = threadIdx.x; i < 4 * 8 * 8; i += 32)
            rows[i / 8 * 24 + i % 8] = x[i];
        __syncthreads();
        uint32_t r[{count}];
        {function}(r, rows + threadIdx.x % {8 * count} * 24);
        for (int i = 0; i < {count}; ++i)
            out[threadIdx.x * {count} + i] = r[i];
    """
    source = f"__global__ void one_{function}(const uint16_t *x, uint32_t *out)\n{{{body}}}\n"
    kernel = CudaKernel(
        f"one_{function}", 'extern "C" ' + source, ("types.cuh",), (1, 1, 1), (32, 1, 1), 32 * 48
    )
    x = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((32, count), np.uint32)
    machine(kernel, [x, out])
    matrices = x.transpose(0, 2, 1) if transposed else x
    for m in range(count):
        low, high = (matrices[m, GROUP, MEMBER * 2 + i].astype(np.uint32) for i in (0, 1))
        np.testing.assert_array_equal(out[:, m], low | high << 16)


TILE = """
    // a [16, K] and b [8, K], both of DEPTH-byte steps of 32 bytes; d [16, 8].
    SHARED_MEMORY(memory);
    const int BYTES = {bytes};
    unsigned char *rows_a = memory, *rows_b = memory + 16 * (BYTES + 16);
    for (int i = threadIdx.x; i < 24 * BYTES; i += 32) {{
        const unsigned char *from = i < 16 * BYTES ? a + i : b + i - 16 * BYTES;
        memory[i / BYTES * (BYTES + 16) + i % BYTES] = *from;
    }}
    __syncthreads();
    int lane = threadIdx.x;
    {kind} fd[4] = {{}};
    for (int at = 0; at < BYTES; at += 32) {{
        uint32_t fa[4], fb[2];
        ldmatrix_x4(fa, rows_a + lane % 16 * (BYTES + 16) + at + lane / 16 * 16);
        ldmatrix_x2(fb, rows_b + lane % 8 * (BYTES + 16) + at + lane / 8 % 2 * 16);
        {function}(fd, fa, fb);
    }}
    for (int i = 0; i < 4; ++i)
        d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = fd[i];
"""


@pytest.mark.parametrize(
    ("function", "dtype"), [("mma_f16", np.float16), ("mma_tf32", np.float32), ("mma_s8", np.int8)]
)
def test_a_tile_through_ldmatrix(machine: Machine, function: str, dtype: type) -> None:
    """Rows of 32 bytes, loaded as 16-bit matrices, are the fragments of every type."""
    random = np.random.default_rng(0)
    depth = 128 // np.dtype(dtype).itemsize
    a: Array = random.integers(-8, 8, (16, depth)).astype(dtype)
    b: Array = random.integers(-8, 8, (8, depth)).astype(dtype)
    kind = "int32_t" if dtype == np.int8 else "float"
    body = TILE.format(bytes=128, kind=kind, function=function)
    parameters = f"const unsigned char *a, const unsigned char *b, {kind} *d"
    source = f'extern "C" __global__ void tile_{function}({parameters})\n{{{body}}}\n'
    kernel = CudaKernel(f"tile_{function}", source, ("types.cuh",), (1, 1, 1), (32, 1, 1), 24 * 144)
    d = np.zeros((16, 8), np.int32 if dtype == np.int8 else np.float32)
    machine(kernel, [a, b, d])
    np.testing.assert_array_equal(d, a.astype(np.int64) @ b.astype(np.int64).T)


# One value at a time


def mapped(machine: Machine, expression: str, result: str, *arrays: Array) -> Array:
    """Evaluate an expression of x0, x1, … for every element."""
    kinds = {"float32": "float", "int32": "int32_t", "uint32": "uint32_t", "uint16": "uint16_t"}
    count = arrays[0].size
    parameters = [f"const {kinds[str(x.dtype)]} *p{i}" for i, x in enumerate(arrays)]
    loads = "".join(f"auto x{i} = p{i}[at];\n" for i in range(len(arrays)))
    name = "mapped"
    source = (
        f'extern "C" __global__ void {name}({", ".join(parameters)}, {kinds[result]} *out, '
        f"const uint32_t *count)\n{{\nuint32_t at = blockIdx.x * 128 + threadIdx.x;\n"
        f"if (at < *count) {{\n{loads}out[at] = {expression};\n}}\n}}\n"
    )
    kernel = CudaKernel(name, source, ("types.cuh",), (math.ceil(count / 128), 1, 1), (128, 1, 1))
    out = np.zeros(count, result)
    machine(kernel, [*arrays, out, np.array([count], np.uint32)])
    return out


def test_every_half_and_back(machine: Machine) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = mapped(machine, "half_value(x0)", "float32", bits)
    expected = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(values, expected)
    again = mapped(machine, "half_bits(x0)", "uint16", expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(again[number], bits[number])
    assert set(again[~number]) == {0x7FFF}


def interesting_floats() -> Array:
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 20000, dtype=np.uint32)
    near = np.arange(-3000, 3000).astype(np.float32) / 2
    edges = [0.0, -0.0, 65504, 65519.99, 65520, 2**-24, 2**-25, 3 * 2**-26, np.inf, -np.inf]
    edges += [np.nan, 2**31, 2**31 - 128, -(2**31), -(2**31) - 256, 3e38]
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2
    return np.concatenate(
        [bits.view(np.float32), near, np.array(edges, np.float32), between, -between]
    ).astype(np.float32)


@pytest.mark.filterwarnings("ignore:.*cast:RuntimeWarning")
def test_rounding_to_half(machine: Machine) -> None:
    x = interesting_floats()
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(
        mapped(machine, "half_bits(x0)", "uint16", x), x.astype(np.float16).view(np.uint16)
    )


def test_rounding_to_tf32(machine: Machine) -> None:
    x = interesting_floats()
    x = x[np.isfinite(x)]
    magnitude = np.abs(x).view(np.uint32).astype(np.int64)
    away = (magnitude + 0x1000) // 0x2000 * 0x2000  # nearest multiple of 2**13, ties away from zero
    expected = np.where(np.signbit(x), away + (1 << 31), away).astype(np.uint32)
    np.testing.assert_array_equal(mapped(machine, "round_tf32(x0)", "uint32", x), expected)


def test_rounding_to_integers(machine: Machine) -> None:
    x = interesting_floats()
    x[np.isnan(x)] = np.nan  # one that float64 takes quietly
    exact = np.rint(np.nan_to_num(x.astype(np.float64), nan=0, posinf=1e300, neginf=-1e300))
    expected = np.clip(exact, -(2.0**31), 2.0**31 - 1).astype(np.int64).astype(np.int32)
    np.testing.assert_array_equal(mapped(machine, "round_even(x0)", "int32", x), expected)


words = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3)


@settings(max_examples=5, deadline=None)
@given(st.lists(words, min_size=1, max_size=50))
def test_dp4a(machine: Machine, rows: list[list[int]]) -> None:
    a, b, c = np.array(rows, np.int32).T.copy()
    dot = a.view(np.int8).reshape(-1, 4).astype(np.int64) * b.view(np.int8).reshape(-1, 4)
    expected = (dot.sum(axis=1) + c).astype(np.int32)
    np.testing.assert_array_equal(mapped(machine, "dp4a(x0, x1, x2)", "int32", a, b, c), expected)


def test_byte_permute(machine: Machine) -> None:
    random = np.random.default_rng(0)
    a, b, selector = random.integers(0, 1 << 32, (3, 500), dtype=np.uint32)
    both = np.stack([a, b], axis=1).view(np.uint8)
    expected = np.zeros(500, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & 15
        byte = both[np.arange(500), nibble & 7].astype(np.uint32)
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        expected |= byte << np.uint32(8 * i)
    actual = mapped(machine, "byte_permute(x0, x1, x2)", "uint32", a, b, selector)
    np.testing.assert_array_equal(actual, expected)


def test_products_and_sums_are_not_fused(machine: Machine) -> None:
    x, y, z = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    np.testing.assert_array_equal(
        mapped(machine, "add(multiply(x0, x1), x2)", "float32", x, y, z), x * y + z
    )
