"""Images that are quantized, transposed and padded in one pass: the kernel, and who gets it."""

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.floats import claim_float_operators
from edgepress.targets.lowering.intake import fuse_intakes
from edgepress.targets.lowering.nhwc import to_nhwc
from edgepress.targets.program import Array
from edgepress.targets.reference import Reference
from edgepress.targets.schedules.epilogue import Requantise
from edgepress.targets.schedules.intake import intake
from edgepress.targets.schedules.stage import StageShape
from tests.graphs import answers, feeds, net, nodes, random
from tests.targets.interpret import run_program
from tests.targets.kernels import HIGHEST, LOWEST, Case, check, native_isas, target_of
from tests.targets.qdq import Qdq, shaped

SHAPES = [
    StageShape(2, 5, 37, 3, 1, 2, 7, 41, 4),
    StageShape(1, 1, 1, 4, 0, 0, 1, 1, 4),
    StageShape(1, 4, 19, 2, 0, 0, 3, 18, 4),  # the last row and column are not read
    StageShape(1, 3, 16, 3, 2, 0, 9, 17, 4),
]


def padded(pixels: Array, shape: StageShape, fill: float) -> Array:
    """`[batch, height, width, channels]` within the border."""
    size = (shape.batch, shape.out_height, shape.out_width, shape.out_channels)
    result = np.full(size, fill, pixels.dtype)
    rows = min(shape.height, shape.out_height - shape.top)
    columns = min(shape.width, shape.out_width - shape.left)
    inside = result[:, shape.top :, shape.left :]
    inside[:, :rows, :columns, : shape.channels] = pixels[:, :rows, :columns]
    return result


def intake_case(shape: StageShape, isa: Isa, kind: str, *, seed: int = 0) -> Case:
    """Floats, 8-bit values, or (`quantised`) floats to 8-bit values."""
    size = (shape.batch, shape.channels, shape.height, shape.width)
    source = np.random.default_rng(seed)
    dtype, fill = isa.storage, LOWEST[isa.storage] + 200
    x = source.uniform(-3, 3, size).astype(np.float32)
    if kind == "float":
        shape = StageShape(**{**vars(shape), "out_channels": shape.channels})
        wanted = padded(x.transpose(0, 2, 3, 1), shape, 0)
        return Case(
            lambda name: intake(name, shape, isa, ("float32", "float32"), 0), (x,), wanted, kind
        )
    if kind == "plain":
        q = source.integers(LOWEST[dtype], HIGHEST[dtype] + 1, size).astype(dtype)
        wanted = padded(q.transpose(0, 2, 3, 1), shape, fill)
        return Case(lambda name: intake(name, shape, isa, (dtype, dtype), fill), (q,), wanted, kind)
    x.flat[:5] = [np.nan, np.inf, -np.inf, 0.5 * 0.7, -1.5 * 0.7]
    low, high, scale = LOWEST[dtype] + 3, HIGHEST[dtype] - 40, np.float32(0.7)
    rule = Requantise(dtype, fill, low, high)
    with np.errstate(invalid="ignore"):
        steps = np.clip(np.rint(x / scale), low - fill, high - fill)
    q = (np.where(np.isnan(x), high - fill, steps) + fill).astype(dtype)
    wanted = padded(q.transpose(0, 2, 3, 1), shape, fill)
    return Case(
        lambda name: intake(name, shape, isa, ("float32", dtype), fill, float(scale), rule),
        (x,), wanted, kind,
    )  # fmt: skip


@pytest.mark.parametrize("isa_name", native_isas())
def test_kernels(isa_name: str) -> None:
    isa, kinds = load_isa(isa_name), ("float", "plain", "quantised")
    check([intake_case(s, isa, kind, seed=i) for i, s in enumerate(SHAPES) for kind in kinds],
          isa_name)  # fmt: skip


def fused(model: ir.Model) -> list[str]:
    """The operators of a float model after the fusion."""
    lines = nodes(fuse_intakes(to_nhwc(claim_float_operators(shaped(model))))).splitlines()
    return [line.split(" = ")[1].split("(")[0] for line in lines]


@pytest.mark.parametrize("isa", native_isas()[:1])
def test_a_convolution_takes_the_image(isa: str) -> None:
    body = "y = Conv <pads=[1,2,0,1], strides=[2,1], dilations=[1,2]> (x, w)"
    model = net("(float[2,3,9,19] x) => (float y)", body, {"w": random(5, 3, 3, 2)})
    assert fused(model) == ["Intake", "Conv", "Transpose"]
    model = shaped(model)
    result = run_program(lower(model, target_of(isa)), target_of(isa), feeds(model))["y"]
    np.testing.assert_allclose(result, answers(model, feeds(model))[0], rtol=1e-4, atol=1e-5)


def test_who_keeps_the_transpose() -> None:
    same = "<pads=[1,1,1,1]>"
    weights = {"w": random(5, 3, 3, 3), "v": random(3, 1, 3, 3)}
    image = "(float[1,3,9,19] x) => (float y)"
    two = f"a = Conv {same} (x, w) b = Conv {same} (x, w) y = Mul(a, b)"
    assert "Intake" not in fused(net(image, two, weights))
    assert "Intake" not in fused(net(image, "y = Conv <group=3> (x, v)", weights))
    wide = net("(float[1,5,9,9] x) => (float y)", "y = Conv(x, u)", {"u": random(4, 5, 1, 1)})
    assert "Intake" not in fused(wide)


@pytest.mark.parametrize("isa", native_isas())
@pytest.mark.parametrize("scale", [0.05, 0.0625])
def test_integers_stay_the_same_bits(isa: str, scale: float) -> None:
    """A power of two keeps its Quantize without float instructions."""
    for dtype in ("uint8", "int8"):
        graph = Qdq((2, 3, 11, 19), dtype)
        x = graph.pair("x", (scale, 128))
        w = np.random.default_rng(0).integers(-127, 128, (9, 3, 3, 3)).astype(np.int8)
        y = graph.op("Conv", x, graph.weight(w, 0.01), attributes="pads=[1,1,0,2], strides=[2,2]")
        model = graph.model(graph.pair(y, (0.06, 100)))
        program = lower(model, target_of(isa))
        kinds = {name.split("_")[0] for name in program.kernels}
        assert "intake" in kinds
        assert ("quantise" in kinds) == (scale == 0.0625)
        results = run_program(program, target_of(isa), feeds(model))
        for key, wanted in Reference(model).run(feeds(model)).items():
            np.testing.assert_array_equal(results[key], wanted)
