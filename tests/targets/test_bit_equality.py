"""One integer answer everywhere: compiled programs against NumPy, natively and under qemu."""

from pathlib import Path

import numpy as np
import pytest

from edgepress.targets.compile import compile_kernels
from edgepress.targets.devices.base import open_device
from edgepress.targets.export import export
from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Array, Program
from edgepress.targets.schedules.epilogue import Epilogue
from edgepress.targets.schedules.stage import StageShape
from tests.targets.interpret import run_program
from tests.targets.kernels import (
    FLOATS,
    LOWEST,
    Case,
    Window,
    added_to,
    compare,
    conv_case,
    depthwise_case,
    native_isas,
    program_of,
    requantise_to,
    shift_to,
    stage_case,
    target_of,
)
from tests.targets.kernels import WIDE as WHOLE16
from tests.targets.qdq import (
    FIXED_POINT,
    WIDE,
    check_graphs,
    drawn,
    inputs_of,
    merged,
    merged_graphs,
    qdq_nets,
)
from tests.targets.test_elementwise import (
    binary_case,
    dequantise_case,
    quantise_case,
    rescale_case,
)
from tests.targets.test_float_bits import EPILOGUES as BIT_EPILOGUES
from tests.targets.test_float_bits import dequantise_case as bits_dequantise_case
from tests.targets.test_float_bits import hostile_floats
from tests.targets.test_float_bits import quantise_case as bits_quantise_case
from tests.targets.test_intake import SHAPES as INTAKES
from tests.targets.test_intake import intake_case
from tests.targets.test_pool import average_pool_case, max_pool_case
from tests.targets.test_transpose import case as transpose_case
from tests.targets.tiny import need

EMULATED = ["neon", "neon_dotprod", "neon_i8mm", "neon_armv7", "scalar"]


@pytest.mark.parametrize("isa", native_isas())
def test_random_graphs(isa: str) -> None:
    models = drawn(qdq_nets(), 60 if isa == native_isas()[-1] else 10)
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


@pytest.mark.parametrize("isa", native_isas())
def test_random_graphs_of_16_bits_and_in_fixed_point(isa: str) -> None:
    count = 20 if isa == native_isas()[-1] else 6
    models = [
        *drawn(qdq_nets(styles=WIDE), count),
        *drawn(qdq_nets(styles=FIXED_POINT), count),
        *drawn(qdq_nets(2, moves=True, styles=(*WIDE, *FIXED_POINT)), count // 2),
    ]
    inputs = inputs_of(models)
    program, joined = merged_graphs(models, target_of(isa), inputs)
    exact = check_graphs(models, inputs, run_program(program, target_of(isa), joined))
    assert exact >= 0.9 * len(models)


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
def test_boards(isa: str, tmp_path: Path) -> None:
    """Random graphs and single kernels in one bundle."""
    need_board(isa)
    models = drawn(qdq_nets(3), 20) + drawn(qdq_nets(1, moves=True), 4)
    models += drawn(qdq_nets(3, styles=WIDE), 8) + drawn(qdq_nets(3, styles=FIXED_POINT), 8)
    models += drawn(qdq_nets(1, moves=True, styles=(*WIDE, *FIXED_POINT)), 4)
    inputs = inputs_of(models)
    graphs = [lower(model, target_of(isa)) for model in models]
    cases = board_cases(isa)
    kernels, arguments = program_of(cases)
    joined = {
        f"g{i}_{n}": a for i, feed in enumerate([*inputs, arguments]) for n, a in feed.items()
    }
    results = emulate(merged([*graphs, kernels]), isa, tmp_path, joined)
    assert check_graphs(models, inputs, results) >= 0.9 * len(models)
    compare(cases, {f"k{i}_out": results[f"g{len(models)}_k{i}_out"] for i in range(len(cases))})


@pytest.mark.parametrize("isa", ["scalar", "neon_armv7"])
def test_transposes_on_32_bit_arm(isa: str, tmp_path: Path) -> None:
    """Long runs of stores in a row, which LLVM merged into stores to wrong places."""
    need_board(isa)
    cases = [
        transpose_case(1, 64, columns, dtype, isa)
        for columns in (5, 6, 7, 12)
        for dtype in ("float32", "int32")
    ]
    program, inputs = program_of(cases)
    compare(cases, emulate(program, isa, tmp_path, inputs))


def wide_cases(isa: Isa, windows: list[Window]) -> list[Case]:
    """16-bit operands, shifts, and floats taken apart as integers."""
    wide, shift, left = ("int16", "int16"), shift_to("int16"), shift_to(isa.storage, left=True)
    cases = [conv_case(w, isa, shift, seed=i, operands=wide) for i, w in enumerate(windows)]
    cases += [conv_case(windows[1], isa, e, operands=("int16", "int8")) for e in (WHOLE16, left)]
    cases += [depthwise_case(w, isa, e, operands=wide) for w in windows[1:4] for e in (shift, left)]
    cases += [max_pool_case(w, isa, "int16") for w in windows[1:3]]
    cases += [average_pool_case(w, isa, shift, dtype="int16") for w in windows[1:3]]
    for exponent in (-100, -9, 0, 119):
        x = hostile_floats(exponent)
        cases += [bits_quantise_case(x, isa, exponent, e) for e in (WHOLE16, BIT_EPILOGUES[2])]
        cases += [bits_dequantise_case(isa, exponent, dtype, 0) for dtype in ("int16", "int8")]
    cases += [rescale_case(259, isa, "int16", n, left) for n in (-17, 0, 9, 31)]
    cases.append(binary_case("add", 35, (35, 35), isa, WHOLE16, (2**15, 77), 2.0**-16, wide))
    cases.append(binary_case("multiply", 35, (7, 35), isa, shift, multiplier=16, dtypes=wide))
    return cases


# Eight inputs are one product of matrices; pixels without a neighbour, and what is left of 16.
EIGHTS = [
    Window(out=(2, 7), channels=24, out_channels=21, kernel=(3, 3), strides=(2, 2)),
    Window(batch=2, out=(3, 1), channels=8, out_channels=5),
    Window(out=(1, 1), channels=40, out_channels=33),
    Window(out=(2, 3), channels=16, out_channels=14, kernel=(1, 2), dilations=(1, 2), groups=2),
]


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
    whole, clamped = requantise_to(isa, 3), requantise_to(isa, 255, 10, 250)
    epilogues: list[Epilogue] = [whole, clamped, FLOATS]
    cases = [conv_case(w, isa, e, seed=i) for i, w in enumerate(windows) for e in epilogues]
    cases += [
        conv_case(windows[1], isa, whole, multiplier=m, weight=w)
        for m, w in ((1e-9, None), (1e9, None), (2.0**-9, 1), (1e-6, -128), (1e-6, 127))
    ]
    cases += [conv_case(w, isa, e, seed=i) for i, w in enumerate(EIGHTS) for e in epilogues[:2]]
    cases += [depthwise_case(w, isa, e, seed=i) for i, w in enumerate(windows) for e in epilogues]
    sums = (added_to(isa), added_to(isa, shift_to(isa.storage)))
    cases += [conv_case(w, isa, e, seed=i) for i, w in enumerate(windows) for e in sums]
    cases += [max_pool_case(w, isa, t) for w in windows[:3] for t in (isa.storage, "float32")]
    cases += [average_pool_case(w, isa, e) for w in windows[:3] for e in epilogues]
    cases.append(
        stage_case(StageShape(2, 5, 7, 3, 1, 2, 8, 12, 4), isa, (isa.storage, isa.staged), low)
    )
    cases += [intake_case(s, isa, k) for s in INTAKES[::2] for k in ("plain", "quantised")]
    ties = (np.arange(-600, 601) / 2).astype(np.float32)
    ends = np.array([np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0, np.nan], np.float32)
    values = np.concatenate([ties, np.nextafter(ties, np.float32(1e9)), ends])
    cases += wide_cases(isa, windows)
    cases += [quantise_case(values, isa, scale, whole) for scale in (1.0, 0.1, 2.0**-100)]
    for scale in (0.37, 2.0**-100):
        cases.append(dequantise_case(259, isa, isa.storage, float(np.float32(scale)), low + 7))
    for multiplier in (0.0, 1e-9, 0.5, 0.7231, 2.0**96):
        cases.append(rescale_case(259, isa, isa.storage, multiplier, clamped))
    factors = (2**21, -(2**20) - 12345)
    for size, periods in ((35, (35, 35)), (35, (7, 35)), (35, (35, 1))):
        cases.append(binary_case("add", size, periods, isa, whole, factors, 2.0**-22))
        cases.append(binary_case("multiply", size, periods, isa, whole, multiplier=0.004))
    return cases
