"""Fixed-point graphs compile to code without a float instruction, on every instruction set.

The assembly text is read line by line: what calculates with floats or converts them is named, by
mnemonic; so is what calls a library that would. Moves are allowed, and what only chooses, repeats
or exchanges bits, whatever unit it belongs to: `vmovups`, `vxorps`, `vblendvps`, `vbroadcastss`,
`vscatterdps` on x86, `fmov` on AArch64, `vldr`, `vstr` and `vmov` on 32-bit Arm.
"""

import dataclasses
import re

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.base import Target
from edgepress.targets.compile import compile_kernels, kernel_assembly
from edgepress.targets.isa.base import load_isa
from edgepress.targets.lowering.build import lower
from edgepress.targets.reference import Reference
from edgepress.targets.schedules import float_bits
from tests.graphs import feeds
from tests.targets.interpret import run_program
from tests.targets.kernels import ISAS, Case, native_isas, program_of, target_of
from tests.targets.qdq import FIXED_POINT, Qdq, drawn, merged_graphs, qdq_nets
from tests.targets.test_float_bits import EPILOGUES

X86_FLOAT = re.compile(
    r"v?(?:add|sub|addsub|hadd|hsub|mul|div|max|min|sqrt|rsqrt\w*|rcp\w*|round|rndscale|cmp\w*|u?comi"
    r"|dp|range|reduce|fixupimm|getexp|getmant|scalef|fpclass)(?:ss|sd|ps|pd|sh|ph)"
    r"|vfn?m(?:add|sub)\w+|v?cvt\w+|f(?:ld|st|add|sub|mul|div|ild|ist)\w*"
)
AARCH64_FLOAT = re.compile(r"f(?!mov)[a-z]\w*|[su]cvtf|bf\w*mmla|bfdot|bfcvt\w*")
ARM_FLOAT = re.compile(r"v\w+\.[bf](?:16|32|64)(?:\.\w+)?|v(?:cvt|jcvt|rint)\w*(?:\.\w+)*|vsqrt\w*")
# LLVM's and the C library's functions on floats
LIBRARY = re.compile(
    r"__aeabi_[fd](?!ree)\w*|__aeabi_(?:u?[il]2[fd]|c[fd]\w+)|__\w+[sdht]f[0-9]?|expf?|logf?|powf?"
    r"|roundf?|rintf?|roundevenf?|nearbyintf?|f(?:max|min|mod|ma)f?|sqrtf?|ldexpf?"
)
ALLOWED = {"bfi", "bfc", "bfxil"}  # move fields of bits
CALL = re.compile(r"\t(?:callq?|jmp|bl|blx|b)\s+\"?([A-Za-z_]\w*)")
HALVES = ".text.tvm.fp16.conv"  # TVM adds these to every object; kernels do not call them


def float_code(text: str, target: Target) -> list[str]:
    """Lines of an assembly text that calculate with floats, or call what does."""
    pattern = AARCH64_FLOAT if target.architecture == "aarch64" else ARM_FLOAT
    pattern = X86_FLOAT if target.architecture == "x86_64" else pattern
    found, inside = [], True
    for line in text.splitlines():
        if re.match(r"\s+\.section|\s+\.text", line):
            inside = HALVES not in line
        code = re.match(r"\t([a-z][\w.]*)", line)
        if not inside or not code or code[1] in ALLOWED:
            continue
        call = CALL.match(line)
        if pattern.fullmatch(code[1]) or (call and LIBRARY.fullmatch(call[1])):
            found.append(line.strip())
    return found


def every_operator(dtype: str) -> ir.Model:
    """A fixed-point graph of all that the drawn ones may miss."""
    random = np.random.default_rng(0)
    graph = Qdq((1, 5, 7, 9), dtype)
    fine = 2.0**-8 if dtype == "int16" else 1.0

    def pair(value: str, power: int) -> str:
        return graph.pair(value, (2.0**power * fine, 128))

    def weight(*shape: int) -> str:
        w = random.integers(-127, 128, shape).astype(np.int8)
        return graph.weight(w, np.exp2(random.integers(-9, -5, shape[0])).astype(np.float32))

    bias = graph.constant(random.uniform(-1, 1, 21).astype(np.float32))
    conv = graph.op("Conv", pair("x", -5), weight(21, 5, 3, 3), bias, attributes="pads=[1,1,1,1]")
    x = pair(graph.op("Relu", conv), -4)
    y = pair(graph.op("Conv", x, weight(21, 1, 3, 3), attributes="group=21, pads=[1,1,1,1]"), -3)
    y = pair(graph.op("Add", y, pair(graph.op("Sub", x, y), -3)), -3)
    y = pair(graph.op("Concat", y, pair(graph.op("Mul", x, y), 0), attributes="axis=1"), -1)
    y = pair(graph.op("MaxPool", y, attributes="kernel_shape=[2,2], strides=[1,2]"), -1)
    y = pair(graph.op("AveragePool", y, attributes="kernel_shape=[3,3], pads=[1,0,0,1]"), -3)
    y = pair(graph.op("Sigmoid", y), -7)
    y = pair(graph.op("Transpose", y, attributes="perm=[0,2,1,3]"), -7)
    y = pair(graph.op("Pad", y, graph.constant(np.array([0, 0, 1, 0, 0, 0, 0, 1]))), -7)
    y = pair(graph.op("Conv", y, weight(3, 5, 2, 2), attributes="strides=[2,2]"), -4)
    flat = pair(graph.op("Flatten", pair(graph.op("GlobalAveragePool", y), -6)), -6)
    return graph.model(pair(graph.op("Gemm", flat, weight(40, 3), attributes="transB=1"), -6))


@pytest.mark.parametrize("name", [*ISAS, "scalar"])
def test_no_float_instruction(name: str) -> None:
    target = target_of(name)
    models = [every_operator("int8"), every_operator("int16")]
    assert all(Reference(model).exact for model in models)
    models += [m for m in drawn(qdq_nets(styles=FIXED_POINT), 2) if Reference(m).exact]
    program, _ = merged_graphs(models, target, [feeds(model) for model in models])
    text = kernel_assembly(program, target)
    assert len(text) > 10_000
    assert not float_code(text, target)


@pytest.mark.parametrize("name", [*ISAS, "scalar"])
def test_ends_at_any_power_of_two(name: str) -> None:
    target = target_of(name)
    isa, cases = load_isa(target.isa), []
    x, y = np.zeros(16, np.int32), np.zeros(16, np.int16)
    for power in range(-100, 128, 45):
        for out in EPILOGUES[:3:2]:
            narrow = y.astype(out.dtype)
            cases += [
                Case(
                    lambda name, power=power, out=out: float_bits.quantise(  # type: ignore[misc]
                        name, x.size, isa, power, out
                    ),
                    (x,),
                    narrow,
                    "",
                ),
                Case(
                    lambda name, power=power, dtype=out.dtype: float_bits.dequantise(  # type: ignore[misc]
                        name, x.size, isa, power, dtype, 0
                    ),
                    (narrow,),
                    x,
                    "",
                ),
            ]
    assert not float_code(kernel_assembly(program_of(cases)[0], target), target)


@pytest.mark.parametrize("name", [*ISAS, "scalar"])
def test_float_code_is_found(name: str) -> None:
    """Multipliers are floats: the same graph at other scales has float code everywhere."""
    target = target_of(name)
    graph = Qdq((1, 3, 6, 6), "int8")
    conv = graph.op(
        "Conv", graph.pair("x", (0.05, 128)), graph.weight(np.ones((4, 3, 1, 1), np.int8), 0.1)
    )
    model = graph.model(graph.pair(conv, (0.1, 128)))
    found = float_code(kernel_assembly(lower(model, target), target), target)
    assert len(found) >= 4


def test_a_board_without_floats_calls_no_float_library() -> None:
    target = target_of("scalar")
    program = lower(every_operator("int16"), target)
    names = re.findall(
        rb"__aeabi_[fd]\w+|__\w+sf[23]|__\w+df[23]", compile_kernels(program, target)
    )
    assert {n for n in names if not re.match(rb"__(trunc|extend)", n)} == set()


@pytest.mark.parametrize("isa", native_isas()[:1])
def test_one_lane_answers_the_same(isa: str) -> None:
    """The generators also work without vectors: here on this machine."""
    target = dataclasses.replace(target_of(isa), isa="scalar")
    models = [every_operator("int8"), every_operator("int16"), *drawn(qdq_nets(3), 4)]
    inputs = [feeds(model) for model in models]
    program, joined = merged_graphs(models, target, inputs)
    answers = run_program(program, target, joined)
    for index, (model, feed) in enumerate(zip(models, inputs, strict=True)):
        reference = Reference(model)
        for output, wanted in reference.run(feed).items():
            if reference.exact:
                np.testing.assert_array_equal(answers[f"g{index}_{output}"], wanted)
