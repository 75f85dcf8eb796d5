"""No layer without a schedule: whatever does much work does it in vectors."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from tvm import te, topi

from edgepress.calibration.base import Samples
from edgepress.passes.base import Context, refresh_shapes
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.targets.base import Target
from edgepress.targets.compile import kernel_assembly
from edgepress.targets.coverage import Work, scalar_kernels, work_of
from edgepress.targets.kernel_code import kernel_codes
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Program
from edgepress.targets.schedules import generic
from tests.graphs import feeds
from tests.targets.kernels import target_of
from tests.targets.zoo import FAMILIES, IMAGE, graph
from tests.test_architectures import ARCHITECTURES

MUCH = 100_000
AVX2 = target_of("avx2")
# What stays one element at a time, and why.
SCALAR = {"reflected": "neighbours in the output are not neighbours in the input"}
SCALAR_INTEGERS = {"softmax of channels": "tables, and divisions of integers"}
GRAPHS = [(family, name) for family, (_, graphs) in FAMILIES.items() for name in graphs]
QUANTIZED = [
    *(("convolutions", name) for name in FAMILIES["convolutions"][1] if "transposed" not in name),
    *(("windows", name) for name in ("max pool", "average pool", "global average", "nearest")),
    *(("elementwise", name) for name in ("add channels", "Sigmoid", "multiply", "clip")),
    ("windows", "softmax of channels"),
    ("windows", "split and concat"),
    ("transformers", "dense"),
]


def unscheduled(program: Program, target: Target) -> dict[str, Work]:
    """Kernels of much work, one element at a time, that LLVM did not vectorise either."""
    found = scalar_kernels(program, MUCH)
    if not found:
        return {}
    kernels = {name: program.kernels[name] for name in found}
    codes = kernel_codes(kernel_assembly(Program(kernels=kernels), target), kernels)
    return {name: work for name, work in found.items() if not codes[name].vector}


def quantized(model: ir.Model) -> ir.Model:
    samples = Samples(feeds(model))
    context = Context(samples=samples)
    for step in (Calibrate(), QuantizeInt8(bias_correction=False)):
        model = step.call(model, context).model
        refresh_shapes(model, step.name)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_float_layers(family: str) -> None:
    signature, graphs = FAMILIES[family]
    for name, body in graphs.items():
        found = unscheduled(lower(graph(signature, body), AVX2), AVX2)
        assert bool(found) == (name in SCALAR), f"{name}: {found}"


@pytest.mark.parametrize(("family", "name"), QUANTIZED)
def test_integer_layers(family: str, name: str) -> None:
    """Behind a convolution, so that they read integers."""
    signature, graphs = FAMILIES[family]
    body = graphs[name]
    if signature == IMAGE:
        inside = re.sub(r"\bx\b", "q", body)
        body = f"q = Conv <pads=[1,1,1,1]> (x, w3) {inside}"
    program = lower(quantized(graph(signature, body)), AVX2)
    assert any(tensor.dtype == "uint8" for tensor in program.tensors.values())
    assert bool(unscheduled(program, AVX2)) == (name in SCALAR_INTEGERS)


@pytest.mark.parametrize("isa", ["neon", "neon_armv7"])
def test_convolutions_on_boards(isa: str) -> None:
    signature, graphs = FAMILIES["convolutions"]
    for name, body in graphs.items():
        assert not unscheduled(lower(graph(signature, body), target_of(isa)), target_of(isa)), name


def test_whole_networks() -> None:
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    for proto in (ARCHITECTURES.resnet18(images), ARCHITECTURES.encoder()):
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        model = ir.from_proto(proto)
        refresh_shapes(model, "test")
        assert not unscheduled(lower(model, AVX2), AVX2), proto.graph.name


def test_what_no_schedule_reached_is_found() -> None:
    rows, columns = te.placeholder((64, 64), name="A"), te.placeholder((64, 64), name="B")
    product = te.create_prim_func([rows, columns, topi.nn.matmul(rows, columns)])
    assert work_of(product) == Work(scalar=64**3, vector=0)
    scheduled = work_of(generic.schedule(product, AVX2))
    assert scheduled.vector >= 64**3
    assert scheduled.scalar == 0
    program = Program(kernels={"product": product, "scheduled": generic.schedule(product, AVX2)})
    assert list(scalar_kernels(program, MUCH)) == ["product"]
    assert list(scalar_kernels(program, 64**3 + 1)) == []
    scattered = te.create_prim_func([rows, te.compute((64, 64), lambda i, j: rows[j * j % 64, i])])
    assert work_of(generic.schedule(scattered, AVX2)).vector == 0
