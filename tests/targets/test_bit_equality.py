"""One integer answer everywhere: compiled programs against NumPy, natively and under qemu."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from edgepress.calibration.samples import Samples
from edgepress.passes.base import Context
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.targets.compile import compile_kernels
from edgepress.targets.devices.base import open_device
from edgepress.targets.export import export
from edgepress.targets.isa.base import load_isa
from edgepress.targets.program import Array, Program
from edgepress.targets.reference import Reference
from edgepress.targets.schedules.stage import StageShape
from tests.graphs import conv_nets, feeds, random
from tests.targets.interpret import run_program
from tests.targets.kernels import (
    FLOATS,
    LOWEST,
    Case,
    Window,
    average_pool_case,
    compare,
    conv_case,
    depthwise_case,
    max_pool_case,
    native_isas,
    program_of,
    requantise_to,
    stage_case,
    target_of,
)
from tests.targets.qdq import merged_graphs, qdq_nets, shaped
from tests.targets.test_elementwise import (
    binary_case,
    dequantise_case,
    quantise_case,
    rescale_case,
)
from tests.targets.tiny import need

EMULATED = ["neon", "neon_dotprod", "neon_armv7"]


def drawn(strategy: st.SearchStrategy[ir.Model], count: int) -> list[ir.Model]:
    """The same models in every run."""
    models: list[ir.Model] = []

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(model: ir.Model) -> None:
        models.append(model)

    collect()
    return models


def quantized(model: ir.Model, activation: str) -> ir.Model:
    """What edgepress itself makes of a float model."""
    model = shaped(model)
    context = Context(samples=Samples({"x": random(4, *model.graph.inputs[0].shape[1:])}))
    model = Calibrate().call(model, context).model
    return shaped(QuantizeInt8(activation=activation).call(model, context).model)


def inputs_of(models: Sequence[ir.Model]) -> list[dict[str, Array]]:
    """Normal values, a few of them far out."""
    result = []
    for seed, model in enumerate(models):
        feed = feeds(model, seed)
        for array in feed.values():
            array *= 3
            array.flat[:: max(array.size // 5, 1)] *= 1e4
        result.append(feed)
    return result


def check_graphs(
    models: Sequence[ir.Model], inputs: Sequence[dict[str, Array]], results: dict[str, Array]
) -> int:
    """Compare with the reference; return how many graphs are integers throughout."""
    exact = 0
    for index, (model, feed) in enumerate(zip(models, inputs, strict=True)):
        reference = Reference(model)
        exact += reference.exact
        for name, wanted in reference.run(feed).items():
            answer = results[f"g{index}_{name}"]
            assert (answer.dtype, answer.shape) == (wanted.dtype, wanted.shape)
            if reference.exact:
                np.testing.assert_array_equal(answer, wanted, f"graph {index}: {name}")
    return exact


@pytest.mark.parametrize("isa", native_isas())
def test_random_graphs(isa: str) -> None:
    models = drawn(qdq_nets(), 60 if isa == native_isas()[-1] else 15)
    inputs = inputs_of(models)
    program, joined = merged_graphs(models, target_of(isa), inputs)
    exact = check_graphs(models, inputs, run_program(program, target_of(isa), joined))
    assert exact >= 0.9 * len(models)


@pytest.mark.parametrize("isa", native_isas()[-1:])
def test_graphs_with_moves(isa: str) -> None:
    models = drawn(qdq_nets(2, moves=True), 10)
    inputs = inputs_of(models)
    program, joined = merged_graphs(models, target_of(isa), inputs)
    assert check_graphs(models, inputs, run_program(program, target_of(isa), joined)) >= 8


@pytest.mark.parametrize("isa", native_isas()[-1:])
def test_graphs_that_edgepress_quantized(isa: str) -> None:
    floats = drawn(conv_nets(), 14)
    models = [quantized(m, "int8" if i % 2 else "uint8") for i, m in enumerate(floats)]
    models = [m for m in models if any(n.op_type == "QuantizeLinear" for n in m.graph)]
    assert len(models) >= 10
    inputs = inputs_of(models)
    program, joined = merged_graphs(models, target_of(isa), inputs)
    check_graphs(models, inputs, run_program(program, target_of(isa), joined))


# Under qemu ----------------------------------------------------------------------------------


def emulate(program: Program, isa: str, folder: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    """Build for a board and run under its emulator."""
    target = target_of(isa)
    code = compile_kernels(program, target)
    export(program, code, target, folder, name="test", tolerances=[0.0] * len(program.outputs))
    (answer,) = open_device("qemu", target).infer(folder, [inputs])
    return answer


def need_board(isa: str) -> None:
    target = target_of(isa)
    need(target.compiler, target.compiler_package)
    need(target.emulator, "qemu-user")


@pytest.mark.parametrize("isa", EMULATED)
def test_random_graphs_on_boards(isa: str, tmp_path: Path) -> None:
    need_board(isa)
    models = drawn(qdq_nets(3), 20) + drawn(qdq_nets(1, moves=True), 4)
    inputs = inputs_of(models)
    program, joined = merged_graphs(models, target_of(isa), inputs)
    exact = check_graphs(models, inputs, emulate(program, isa, tmp_path, joined))
    assert exact >= 20


@pytest.mark.parametrize("isa", EMULATED)
def test_kernels_on_boards(isa: str, tmp_path: Path) -> None:
    need_board(isa)
    cases = board_cases(isa)
    program, inputs = program_of(cases)
    compare(cases, emulate(program, isa, tmp_path, inputs))


def board_cases(isa_name: str) -> list[Case]:
    isa = load_isa(isa_name)
    low = LOWEST[isa.storage]
    windows = [
        Window(),
        Window(out=(1, 1), channels=33, out_channels=17, kernel=(3, 3)),
        Window(
            batch=2, channels=3, out_channels=7, kernel=(2, 3), strides=(2, 2), dilations=(1, 2)
        ),
        Window(out=(2, 19), channels=17, out_channels=35, kernel=(1, 5), extra=(1, 1)),
        Window(channels=9, out_channels=15, kernel=(2, 2), groups=3),
    ]
    epilogues = [requantise_to(isa, 3), requantise_to(isa, 255, 10, 250), FLOATS]
    cases = [conv_case(w, isa, e, seed=i) for i, w in enumerate(windows) for e in epilogues]
    cases += [
        conv_case(windows[1], isa, epilogues[0], multiplier=m, weight=w)
        for m, w in ((1e-9, None), (1e9, None), (2.0**-9, 1), (1e-6, -128), (1e-6, 127))
    ]
    cases += [depthwise_case(w, isa, e, seed=i) for i, w in enumerate(windows) for e in epilogues]
    cases += [max_pool_case(w, isa, t) for w in windows[:3] for t in (isa.storage, "float32")]
    cases += [average_pool_case(w, isa, e) for w in windows[:3] for e in epilogues]
    cases.append(
        stage_case(StageShape(2, 5, 7, 3, 1, 2, 8, 12, 4), isa, (isa.storage, isa.staged), low)
    )
    ties = (np.arange(-600, 601) / 2).astype(np.float32)
    ends = np.array([np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0], np.float32)
    values = np.concatenate([ties, np.nextafter(ties, np.float32(1e9)), ends])
    cases += [quantise_case(values, isa, scale, epilogues[0]) for scale in (1.0, 0.1, 2.0**-100)]
    for scale in (0.37, 2.0**-100):
        cases.append(dequantise_case(259, isa, isa.storage, float(np.float32(scale)), low + 7))
    for multiplier in (0.0, 1e-9, 0.5, 0.7231, 2.0**96):
        cases.append(rescale_case(259, isa, isa.storage, multiplier, epilogues[1]))
    factors = (2**21, -(2**20) - 12345)
    for size, periods in ((35, (35, 35)), (35, (7, 35)), (35, (35, 1))):
        cases.append(binary_case("add", size, periods, isa, epilogues[0], factors, 2.0**-22))
        cases.append(binary_case("multiply", size, periods, isa, epilogues[0], multiplier=0.004))
    return cases
