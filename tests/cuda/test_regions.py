"""What edgepress has no CUDA kernel for, written by TVM: against onnxruntime and NumPy."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te, tirx, topi

from edgepress.targets.base import UnsupportedModel
from edgepress.targets.cuda.regions import region_kernels
from edgepress.targets.load import load_target
from edgepress.targets.lowering.relax import lower_region
from edgepress.targets.program import Array, Call, Program, Tensor
from tests.cuda.emulation import emulate

H100 = load_target("cuda-sm90")

OPERATORS = {
    "Add": "(float[3,1,5] x, float[4,1] w) => (float[3,4,5] y) { y = Add(x, w) }",
    "And": "(bool[5] x, bool[5] w) => (bool[5] y) { y = And(x, w) }",
    "ArgMax": "(float[3,70] x) => (int64[3,1] y) { y = ArgMax<axis=1>(x) }",
    "Cast to float": "(int32[7] x) => (float[7] y) { y = Cast<to=1>(x) }",
    "Cast to int": "(float[7] x) => (int32[7] y) { y = Cast<to=6>(x) }",
    "Clip": "(int32[9] x, int32 a, int32 b) => (int32[9] y) { y = Clip(x, a, b) }",
    "CumSum": "(float[3,40,2] x) => (float[3,40,2] y) <int64 a = {1}> { y = CumSum(x, a) }",
    "Div of integers": "(int32[9] x) => (int32[9] y) <int32 d = {3}> { y = Div(x, d) }",
    "Erf": "(float[300] x) => (float[300] y) { y = Erf(x) }",
    "Expand": "(float[3,1] x) => (float[2,3,4] y) <int64[3] s = {2,3,4}> { y = Expand(x, s) }",
    "Gather": "(float[5,6] x, int64[3] i) => (float[3,6] y) { y = Gather(x, i) }",
    "GatherElements": "(float[5,6] x, int64[2,6] i) => (float[2,6] y) { y = GatherElements(x, i) }",
    "LogSoftmax": "(float[4,33] x) => (float[4,33] y) { y = LogSoftmax(x) }",
    "MatMul": "(float[2,7,9] x, float[2,9,5] w) => (float[2,7,5] y) { y = MatMul(x, w) }",
    "Mod": "(int64[9] x) => (int64[9] y) <int64 d = {4}> { y = Mod(x, d) }",
    "Pad": "(float[3,5] x) => (float[6,5] y) <int64[4] p = {1,-1,2,1}> { y = Pad(x, p) }",
    "Pad by reflection": "(float[3,5] x) => (float[3,9] y) <int64[4] p = {0,2,0,2}> "
    '{ y = Pad<mode="reflect">(x, p) }',
    "Pow": "(float[40] x) => (float[40] y) <float e = {3.0}> { y = Pow(x, e) }",
    "ReduceMax": "(float[3,9,8] x) => (float[3,1,8] y) { y = ReduceMax<axes=[1]>(x) }",
    "ReduceMean": "(float[2,8,9,70] x) => (float[2,1,1,70] y) { y = ReduceMean<axes=[1,2]>(x) }",
    "ReduceProd": "(float[3,8] x) => (float[3] y) { y = ReduceProd<axes=[1], keepdims=0>(x) }",
    "ReduceSum of all": "(float[9,8,70] x) => (float y) { y = ReduceSum<keepdims=0>(x) }",
    "Relu": "(float[700] x) => (float[700] y) { y = Relu(x) }",
    "Round": "(float[40] x) => (float[40] y) { y = Round(x) }",
    "ScatterElements": "(float[5,3] x, float[2,3] u) => (float[5,3] y) "
    "<int64[2,3] i = {4,1,0,2,2,2}> { y = ScatterElements(x, i, u) }",
    "ScatterND": "(float[5,3] x, float[2,3] u) => (float[5,3] y) <int64[2,1] i = {4,1}> "
    "{ y = ScatterND(x, i, u) }",
    "Slice": "(float[7,6] x) => (float[2,6] y) <int64[1] s = {5}, int64[1] e = {0}, "
    "int64[1] a = {0}, int64[1] t = {-3}> { y = Slice(x, s, e, a, t) }",
    "Softmax": "(float[5,70] x) => (float[5,70] y) { y = Softmax(x) }",
    "Split": "(float[5,4] x) => (float[2,4] y, float[3,4] z) <int64[2] s = {2,3}> "
    "{ y, z = Split<axis=0>(x, s) }",
    "Tile": "(float[3,2] x) => (float[6,2] y) <int64[2] r = {2,1}> { y = Tile(x, r) }",
    "TopK": "(float[2,90] x) => (float[2,4] v, int64[2,4] n) <int64[1] k = {4}> "
    "{ v, n = TopK(x, k) }",
    "Transpose": "(float[3,4,5] x) => (float[5,3,4] y) { y = Transpose<perm=[2,0,1]>(x) }",
    "Where": "(bool[3,1] c, float[3,4] x, float[4] w) => (float[3,4] y) { y = Where(c, x, w) }",
}


def model_of(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["":13]> g {text}')


def lower(text: str, prefix: str = "r_") -> Program:
    return lower_region(ir.from_proto(model_of(text)), H100, prefix)


def feeds_of(program: Program) -> dict[str, Array]:
    """Normal floats, integers from -5 to 5 that no index is too large for, and booleans."""
    random = np.random.default_rng(0)
    feeds = {}
    for name in program.inputs:
        tensor = program.tensors[name]
        if tensor.dtype == "float32":
            feeds[name] = (2 * random.standard_normal(tensor.shape)).astype("float32")
        elif tensor.dtype == "bool":
            feeds[name] = random.random(tensor.shape) < 0.5
        else:
            feeds[name] = np.asarray(random.integers(-5, 5, tensor.shape), tensor.dtype)
    return feeds


@pytest.mark.parametrize("name", OPERATORS)
def test_it_computes_what_onnxruntime_does(name: str) -> None:
    program = lower(OPERATORS[name])
    feeds = feeds_of(program)
    session = onnxruntime.InferenceSession(model_of(OPERATORS[name]).SerializeToString())
    wanted = session.run(list(program.outputs), feeds)
    answers = emulate(program, feeds)
    for output, value in zip(program.outputs, map(np.asarray, wanted), strict=True):
        if value.dtype == np.float32:
            np.testing.assert_allclose(answers[output], value, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(answers[output], value)
        assert answers[output].dtype == value.dtype


def test_integers_are_exact() -> None:
    program = lower(
        "(int64[3] x, int8[4] b) => (int64[3] y, int8[4] c) "
        "<int64 k = {3}, int8 n = {2}> { y = Mul(x, k) d = Add(b, b) c = Div(d, n) }"
    )
    x = np.array([2**53 + 1, -(2**60), 7], np.int64)
    b = np.array([127, 100, -128, 3], np.int8)
    answers = emulate(program, {"x": x, "b": b})
    np.testing.assert_array_equal(answers["y"], x * 3)
    # the sum wraps before it is divided, and quotients are truncated
    np.testing.assert_array_equal(answers["c"], np.trunc((b + b) / np.int8(2)).astype(np.int8))


def test_infinities_and_nan() -> None:
    program = lower(
        "(bool[2] c, float[2] x) => (float[2] y, float[2] z, bool[2] n) "
        "<float low = {-inf}> { y = Where(c, x, low) z = Exp(x) n = IsNaN(x) }"
    )
    x = np.array([np.nan, np.inf], np.float32)
    answers = emulate(program, {"c": np.array([True, False]), "x": x})
    np.testing.assert_array_equal(answers["y"], np.array([np.nan, -np.inf], np.float32))
    np.testing.assert_array_equal(answers["z"], x)
    np.testing.assert_array_equal(answers["n"], [True, False])


def test_a_long_reduction_is_shared_by_threads() -> None:
    program = lower("(float[1,3,90,100] x) => (float[1,3,1,1] y) { y = GlobalAveragePool(x) }")
    assert [call.outputs for call in program.calls][1] == ("y",)
    first, second = (program.kernels[call.kernel] for call in program.calls)
    assert first.grid[0] * first.block[0] > 256 > second.grid[0] * second.block[0]
    x = np.random.default_rng(0).standard_normal((1, 3, 90, 100)).astype(np.float32)
    wanted = x.mean((2, 3), keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(emulate(program, {"x": x})["y"], wanted, atol=1e-6)


def test_what_follows_a_reduction_needs_no_kernel() -> None:
    program = lower(
        "(float[300,7] x) => (float[300] y) { y = ReduceMean<axes=[1], keepdims=0>(x) }"
    )
    assert len(program.calls) == 1


def test_rows_that_do_not_depend_on_each_other_run_on_threads() -> None:
    program = lower("(float[50,9] x) => (float[50,9] y) <int64 a = {1}> { y = CumSum(x, a) }")
    kernel = program.kernels[program.calls[0].kernel]
    assert kernel.grid[0] > 1


def test_scratch_memory_has_the_prefix_and_one_writer() -> None:
    program = lower(OPERATORS["TopK"], "part3_")
    inner = {*program.tensors, *program.constants, *program.kernels} - {"x", "v", "n"}
    assert inner
    assert all(name.startswith("part3_") for name in inner)
    program.validate()


def test_gathering_by_an_input_takes_two_kernels() -> None:
    program = lower(OPERATORS["Gather"])  # one bounds the indices
    assert len(program.calls) == 2
    assert "/ 6" in program.kernels[program.calls[1].kernel].source  # of 32 bits, not (int64_t)6


def test_the_largest_of_three() -> None:
    program = lower("(int32[2,3] x, int32[3] w, int32 k) => (int32[2,3] y) { y = Max(x, w, k) }")
    feeds = feeds_of(program)
    assert len(program.calls) == 1
    wanted = np.maximum(np.maximum(feeds["x"], feeds["w"]), feeds["k"])
    np.testing.assert_array_equal(emulate(program, feeds)["y"], wanted)


def test_the_text_of_a_kernel_grows_with_its_operators_only() -> None:
    steps = [
        f"a{i} = Sub(x{i}, w) b{i} = Mul(x{i}, a{i}) x{i + 1} = Sub(b{i}, a{i})" for i in range(8)
    ]
    program = lower(
        f"(float[4] x0, float[4] w) => (float[4] y) {{ {' '.join(steps)} y = Sub(x8, w) }}"
    )
    assert len(program.calls) == 1
    assert len(program.kernels[program.calls[0].kernel].source) < 10_000
    feeds = {"x0": np.full(4, 1.5, np.float32), "w": np.full(4, 0.5, np.float32)}
    x = 1.5
    for _ in steps:
        x = x * (x - 0.5) - (x - 0.5)
    np.testing.assert_allclose(emulate(program, feeds)["y"], x - 0.5, rtol=1e-5)


def test_an_output_without_elements_is_written_by_a_call() -> None:
    program = lower(
        "(float[3,2] x) => (float[0,2] y, float[3,2] z) <int64[1] s = {0}, int64[1] e = {0}> "
        "{ y = Slice(x, s, e) z = Neg(x) }"
    )
    answers = emulate(program, {"x": np.ones((3, 2), np.float32)})
    assert answers["y"].shape == (0, 2)
    np.testing.assert_array_equal(answers["z"], -np.ones((3, 2)))


def test_what_needs_the_runtime_of_tvm_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="NonZero"):
        lower("(float[2,3] x) => (int64[2,N] y) { [first] y = NonZero(x) }")


@pytest.mark.parametrize("name", ["ArgMax", "Erf", "Gather", "Softmax", "TopK", "Where"])
def test_only_words_that_every_compiler_knows(name: str) -> None:
    for kernel in lower(OPERATORS[name]).kernels.values():
        assert kernel.headers == ("regions.cuh",)
        assert kernel.source.count("__global__") == 1
        words = set(re.findall(r"\b[A-Za-z_]\w*", kernel.source))
        assert not {
            word for word in words if re.fullmatch(r"(u?(char|int|short)|float)[234]", word)
        }
        assert not words & {"CUDART_INF_F", "uchar", "uint", "max", "min", "asm", "half"}


@settings(deadline=None, max_examples=10)
@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    axes=st.integers(0, 15),
)
def test_sums_over_any_axes(shape: list[int], seed: int, axes: int) -> None:
    chosen = [axis for axis in range(len(shape)) if axes >> axis & 1]
    x = te.placeholder(shape, name="x")
    summed = topi.sum(x, axis=chosen) if chosen else topi.identity(x)
    data = np.random.default_rng(seed).integers(-9, 9, shape).astype(np.float32)
    answer = answer_of([x, topi.add(summed, tirx.const(1.0, "float32"))], data)
    np.testing.assert_array_equal(answer, data.sum(tuple(chosen)) + 1)


@settings(deadline=None, max_examples=10)
@given(shape=st.lists(st.integers(1, 12), min_size=2, max_size=4), data=st.data())
def test_transposing_any_shape(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    x = te.placeholder(shape, "int32", name="x")
    values = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    answer = answer_of([x, topi.transpose(topi.multiply(x, x), order)], values)
    np.testing.assert_array_equal(answer, (values * values).transpose(order))


def answer_of(tensors: list[object], data: Array) -> Array:
    """Run a function of one input and one output."""
    function = te.create_prim_func(tensors)
    source, result = (
        Tensor(name, str(p.ty.dtype), tuple(int(size) for size in p.ty.shape))
        for name, p in zip(("x", "y"), function.params, strict=True)
    )
    kernels = region_kernels("kernel", function, 1)
    scratch = [
        Tensor(f"scratch{i}", dtype, shape) for i, (dtype, shape) in enumerate(kernels.scratch)
    ]
    tensors_by_name = {tensor.name: tensor for tensor in (source, result, *scratch)}
    names = list(tensors_by_name)
    program = Program(
        inputs=("x",),
        outputs=("y",),
        tensors=tensors_by_name,
        calls=[
            Call(
                launch.kernel.name,
                tuple(names[place] for place in launch.arguments),
                tuple(names[place] for place in launch.written),
            )
            for launch in kernels.launches
        ],
        kernels={launch.kernel.name: launch.kernel for launch in kernels.launches},
    )
    return emulate(program, {"x": data})["y"]
