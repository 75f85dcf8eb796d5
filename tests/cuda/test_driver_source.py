"""The generated driver.c of a model on a GPU, and the C beside it."""

from pathlib import Path

import pytest

from edgepress.targets.cuda.driver_source import ALIGNMENT_BYTES, cuda_driver_source
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.driver_source import Driver, header_source
from edgepress.targets.export import copy_runtime
from edgepress.targets.memory import plan
from edgepress.targets.program import Call, Program, Tensor
from tests.cuda.tiny import TARGET, tiny_cuda_program
from tests.targets.test_runtime_c import WARNINGS
from tests.targets.tiny import PI4, need, run

DRIVER = Driver(
    name="tiny",
    tolerances=(0, 0),
    weights=[{"name": "same", "codec": "raw", "raw_bytes": 24, "offset": 0},
             {"name": "w", "codec": "raw", "raw_bytes": 24, "offset": 0}],
    weights_checksum=0x1234,
    weight_bytes=24,
)  # fmt: skip


def driver_of(program: Program, driver: Driver = DRIVER) -> str:
    return cuda_driver_source(program, plan(program, ALIGNMENT_BYTES), TARGET, driver)


def write_cuda_sources(folder: Path) -> None:
    """Everything that export compiles, for the tiny program."""
    copy_runtime(folder)
    api = (folder / "api.h").read_text()
    (folder / "model.h").write_text(header_source(tiny_cuda_program(), "tiny", api))
    (folder / "driver.c").write_text(driver_of(tiny_cuda_program()))


def test_a_launch_per_call() -> None:
    lines = driver_of(tiny_cuda_program()).splitlines()
    start = lines.index("const struct place places[] = {")
    assert lines[start + 1 : start + 11] == [
        "    {PLACE_INPUT, 0}, /* x */",
        "    {PLACE_ARENA, 0u}, /* moved */",
        "    {PLACE_ARENA, 0u}, /* moved */",
        "    {PLACE_WEIGHT, 1}, /* w */",
        "    {PLACE_OUTPUT, 0}, /* scaled */",
        "    {PLACE_OUTPUT, 0}, /* scaled */",
        "    {PLACE_INPUT, 1}, /* offset */",
        "    {PLACE_OUTPUT, 1}, /* total */",
        "    {PLACE_ARENA, 0},",
        "};",
    ]
    start = lines.index("const struct launch launches[] = {")
    assert lines[start + 1 : start + 4] == [
        '    {.kernel = "add_one", .grid = {1, 1, 1}, .block = {32, 1, 1}, .shared_bytes = 0, '
        ".counters = 0, .overlaps = 0, .first_place = 0, .place_count = 2},",
        '    {.kernel = "scale", .grid = {3, 1, 1}, .block = {32, 1, 1}, .shared_bytes = 0, '
        ".counters = 2, .overlaps = 0, .first_place = 2, .place_count = 3},",
        '    {.kernel = "sum", .grid = {1, 1, 1}, .block = {32, 1, 1}, .shared_bytes = 102400, '
        ".counters = 0, .overlaps = 1, .first_place = 5, .place_count = 3},",
    ]
    assert "    .call_count = 3," in lines
    assert "    .threads = 1," in lines
    assert "    .arena_bytes = 256u," in lines


def copying_program() -> Program:
    """`y = x + 1`; the outputs are `y`, `x` and `y`."""
    tensors = {name: Tensor(name, "float32", (2, 3)) for name in "xy"}
    kernel = CudaKernel("add_one", "", (), (1, 1, 1), (32, 1, 1))
    call = Call("add_one", ("x", "y"), ("y",), "add")
    return Program(("x",), ("y", "x", "y"), tensors, {}, [call], {"add_one": kernel})


def test_an_output_that_is_an_input_or_named_twice_is_copied() -> None:
    driver = Driver(
        name="copies", tolerances=(0, 0, 0), weights=[], weights_checksum=0, weight_bytes=0
    )
    lines = driver_of(copying_program(), driver).splitlines()
    start = lines.index("const struct place places[] = {")
    assert lines[start + 1 : start + 7] == [
        "    {PLACE_INPUT, 0}, /* x */",
        "    {PLACE_OUTPUT, 0}, /* y */",
        "    {PLACE_OUTPUT, 1},",
        "    {PLACE_INPUT, 0},",
        "    {PLACE_OUTPUT, 2},",
        "    {PLACE_OUTPUT, 0},",
    ]
    copies = [line for line in lines if ".kernel = NULL" in line]
    assert copies == [
        f"    {{.kernel = NULL, .first_place = {first}, .place_count = 2, .copied_bytes = 24u}},"
        for first in (2, 4)
    ]
    assert '    "copy to x",' in lines
    assert "    .call_count = 3," in lines


def test_tensors_of_a_gpu_are_aligned() -> None:
    program = tiny_cuda_program()
    program.tensors["moved"] = Tensor("moved", "float32", (2, 3))
    arena = plan(program, 64)
    arena.offsets["moved"] = 64
    with pytest.raises(ValueError, match="moved: not aligned to 256 bytes"):
        cuda_driver_source(program, arena, TARGET, DRIVER)


def test_a_call_has_no_more_arguments_than_a_kernel() -> None:
    names = [f"x{i}" for i in range(511)]
    tensors = {name: Tensor(name, "float32", (1,)) for name in (*names, "y")}
    call = Call("many", (*names, "y"), ("y",), "Concat_1")
    kernel = CudaKernel("many", "", (), (1, 1, 1), (32, 1, 1))
    program = Program(tuple(names), ("y",), tensors, {}, [call], {"many": kernel})
    with pytest.raises(ValueError, match="Concat_1: 512 arguments, a kernel takes 511"):
        driver_of(program)


@pytest.mark.parametrize(
    ("compiler", "package"),
    [("gcc", "gcc"), ("clang", "clang"), (PI4.compiler, PI4.compiler_package)],
)
def test_no_compiler_warns(tmp_path: Path, compiler: str, package: str) -> None:
    need(compiler, package)
    write_cuda_sources(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.c"))
    run([compiler, *WARNINGS, "-fPIC", "-c", *files], tmp_path)
