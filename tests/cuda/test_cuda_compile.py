"""Kernels in CUDA C++ become machine code, and that becomes data for the host's linker."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from edgepress.targets.base import CompileFailed
from edgepress.targets.compile import compile_kernels, compile_with_assembly, kernel_assembly
from edgepress.targets.cuda import compile as cuda_compile
from edgepress.targets.cuda.compile import Image, Unit, compile_cuda, kernel_resources, units_of
from edgepress.targets.cuda.kernel import CudaKernel
from edgepress.targets.cuda.resources import Resources, parse_resources
from edgepress.targets.cuda.toolkit import cuda_compiler, cuda_compiler_version
from edgepress.targets.elf import sections
from edgepress.targets.load import load_target
from edgepress.targets.program import Program
from tests.targets.tiny import need, run

TARGETS = ("cuda-sm80", "cuda-sm90", "jetson-orin-nano", "jetson-agx-orin")
SERVER = load_target("cuda-sm90")
JETSON = load_target("jetson-orin-nano")
CUDA_ELF_MACHINE = 190
EXECUTABLE = 4  # flag of a section
FMUL, FADD, FFMA = 0x20, 0x21, 0x23
SCALED = """
struct Factor { static const int VALUE = %d; };
extern "C" __global__ void %s(const half *x, float *y)
{
    y[threadIdx.x] = to_float(x[threadIdx.x]) * Factor::VALUE;
}
"""


def kernel(name: str, source: str, *headers: str) -> CudaKernel:
    return CudaKernel(name, source, headers, (1, 1, 1), (128, 1, 1))


def scaled(factor: int) -> CudaKernel:
    name = f"scaled_{factor}"
    return kernel(name, SCALED % (factor, name), "types.cuh")


def program_of(*kernels: CudaKernel) -> Program:
    return Program(kernels={one.name: one for one in kernels})


def fresh(program: Program) -> bytes:
    cuda_compile._compile.cache_clear()
    return compile_cuda(program, SERVER)


def linked(code: bytes, compiler: str, folder: Path) -> Path:
    """A program that prints what it finds in the object."""
    (folder / "kernels.o").write_bytes(code)
    (folder / "main.c").write_text(
        """
        #include <stdint.h>
        #include <stdio.h>
        struct kernel_image { const void *data; uint64_t bytes; };
        extern const struct kernel_image kernel_images[];
        extern const int kernel_image_count;
        extern const char kernel_architecture[], kernel_compiler[];
        int main(void)
        {
            printf("%s, %s", kernel_architecture, kernel_compiler);
            for (int i = 0; i < kernel_image_count; i++) {
                const unsigned char *data = kernel_images[i].data;
                unsigned sum = 0;
                for (uint64_t byte = 0; byte < kernel_images[i].bytes; byte++) sum += data[byte];
                printf(", %d %d %u", (uintptr_t)data % 64 == 0, data[18], sum);
            }
            return 0;
        }
        """,
        "utf-8",
    )
    flags = ["-fPIC", "-pie", "-Wl,-z,relro,-z,now,-z,noexecstack,-z,text", "-Wl,--fatal-warnings"]
    run([compiler, *flags, "main.c", "kernels.o", "-o", "main"], folder)
    return folder / "main"


def cubins(*kernels: CudaKernel, target: str = "cuda-sm90") -> list[bytes]:
    images = cuda_compile._images(program_of(*kernels), load_target(target), cuda_compiler())
    return [image.cubin for image in images]


def opcodes(cubin: bytes) -> Counter[int]:
    """Count the instructions of a cubin with one kernel: of each 128 bits, 9 are the opcode."""
    (code,) = (section for section in sections(cubin)[0] if section.flags & EXECUTABLE)
    words = range(code.offset, code.offset + code.size, 16)
    return Counter(int.from_bytes(cubin[at : at + 2], "little") & 0x1FF for at in words)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_with_a_gpu_compiles(name: str) -> None:
    target = load_target(name)
    need(target.compiler, target.compiler_package)
    code = compile_kernels(program_of(scaled(2), scaled(3)), target)
    assert code[:4] == b"\x7fELF"
    assert code[18] == {"x86_64": 62, "aarch64": 183}[target.architecture]
    assert b"scaled_2" in code
    assert target.gpu_arch.encode() + b"\0" + cuda_compiler_version().encode() + b"\0" in code


def test_a_program_finds_the_machine_code(tmp_path: Path) -> None:
    kernels = [scaled(factor) for factor in range(1, 18)]
    code = compile_cuda(program_of(*kernels), SERVER)
    main = linked(code, SERVER.compiler, tmp_path)
    images = cubins(*kernels)
    assert len(images) > 1
    entries = [f"1 {CUDA_ELF_MACHINE} {sum(image)}" for image in images]
    assert run([str(main)]) == ", ".join(["sm_90", cuda_compiler_version(), *entries])


def test_a_program_for_jetson_finds_it_too(tmp_path: Path) -> None:
    need(JETSON.compiler, JETSON.compiler_package)
    need("qemu-aarch64", "qemu-user")
    code = compile_cuda(program_of(scaled(1)), JETSON)
    main = linked(code, JETSON.compiler, tmp_path)
    said = run(["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(main)])
    (image,) = cubins(scaled(1), target=JETSON.name)
    assert said == f"sm_87, {cuda_compiler_version()}, 1 {CUDA_ELF_MACHINE} {sum(image)}"


def test_no_kernels_are_no_images(tmp_path: Path) -> None:
    main = linked(compile_cuda(Program(), SERVER), SERVER.compiler, tmp_path)
    assert run([str(main)]) == f"sm_90, {cuda_compiler_version()}"


def test_the_same_kernels_are_the_same_bytes() -> None:
    program = program_of(*(scaled(factor) for factor in range(1, 12)))
    assert fresh(program) == fresh(program)


def test_the_bytes_do_not_depend_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(*(scaled(factor) for factor in range(1, 12)))
    before = fresh(program)
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: {0})
    assert fresh(program) == before


def test_no_folder_is_in_the_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert str(tmp_path).encode() not in fresh(program_of(scaled(1)))


def test_kernels_with_the_same_headers_share_a_unit() -> None:
    kernels = [scaled(1), kernel("bare", 'extern "C" __global__ void bare() {}'), scaled(2)]
    units = units_of(kernels)
    assert [unit.names for unit in units] == [("scaled_1", "scaled_2"), ("bare",)]
    assert [unit.source.count("#include") for unit in units] == [1, 0]


def test_a_change_of_one_kernel_compiles_its_unit_again() -> None:
    fresh(program_of(scaled(1)))
    before = cuda_compile._compile.cache_info()
    compile_cuda(program_of(scaled(1)), SERVER)
    kernel_resources(program_of(scaled(1)), SERVER)
    assert cuda_compile._compile.cache_info().misses == before.misses
    compile_cuda(program_of(scaled(2)), SERVER)
    compile_cuda(program_of(scaled(2)), load_target("cuda-sm80"))
    assert cuda_compile._compile.cache_info().misses == before.misses + 2


def test_a_kernel_that_is_wrong_is_named_with_what_the_compiler_says() -> None:
    wrong = kernel("wrong", 'extern "C" __global__ void wrong(float *y)\n{\n    y[0] = nothing;\n}')
    message = r"(?s)nvrtc [\d.]+ refused wrong for sm_90\..*wrong\(3\): error.*nothing"
    with pytest.raises(CompileFailed, match=message) as caught:
        compile_kernels(program_of(kernel("right", SCALED % (1, "right"), "types.cuh"),
                                   wrong), SERVER)  # fmt: skip
    assert "right" not in str(caught.value).partition("\n")[0]


def test_a_kernel_that_wants_too_much_is_named() -> None:
    greedy = kernel(
        "greedy",
        'extern "C" __global__ void greedy(float *y)\n{\n'
        "    __shared__ float big[99999];\n    big[threadIdx.x] = y[0];\n    __syncthreads();\n"
        "    y[threadIdx.x] = big[threadIdx.x + 1];\n}",
    )
    fine = kernel("fine", 'extern "C" __global__ void fine() {}')
    with pytest.raises(
        CompileFailed, match=r"refused greedy for sm_90\.(?s:.*)too much shared"
    ) as caught:
        compile_kernels(program_of(fine, greedy), SERVER)
    assert str(caught.value).replace("\n", "").isprintable()


def test_a_kernel_whose_template_cannot_be_made_is_named() -> None:
    wrong = kernel(
        "wrong",
        'extern "C" __global__ void wrong(float *y)\n{\n    y[0] = from_float<char *>(y[1]) + 1;\n'
        "    Vector<void, 4> none;\n}",
        "types.cuh",
    )
    with pytest.raises(CompileFailed, match=r"refused wrong for sm_90\."):
        compile_kernels(program_of(scaled(1), wrong), SERVER)


def test_an_architecture_that_the_compiler_does_not_know() -> None:
    unknown = dataclasses.replace(SERVER, gpu_arch="sm_199")
    with pytest.raises(CompileFailed, match=r"for sm_199"):
        compile_kernels(program_of(scaled(1)), unknown)


def test_without_the_hosts_compiler_it_says_what_to_install() -> None:
    target = dataclasses.replace(SERVER, compiler="no-such-gcc", compiler_package="no-such-package")
    with pytest.raises(CompileFailed, match="apt-get install no-such-package"):
        compile_kernels(program_of(scaled(1)), target)


def test_there_is_no_text_of_a_gpus_instructions() -> None:
    for read in (kernel_assembly, compile_with_assembly):
        with pytest.raises(CompileFailed, match="cuda-sm90 run on a GPU"):
            read(program_of(scaled(1)), SERVER)


def test_products_and_sums_of_integer_code_are_not_fused() -> None:
    """One fused multiply-add rounds once; the functions for integers round twice."""
    source = 'extern "C" __global__ void %s(float *x)\n{\n    x[0] = %s;\n}'
    fused = kernel("fused", source % ("fused", "x[1] * x[2] + x[3]"), "types.cuh")
    apart = kernel("apart", source % ("apart", "add(multiply(x[1], x[2]), x[3])"), "types.cuh")
    together, twice = (opcodes(cubins(one)[0]) for one in (fused, apart))
    assert [together[code] for code in (FFMA, FMUL, FADD)] == [1, 0, 0]
    assert [twice[code] for code in (FFMA, FMUL, FADD)] == [0, 1, 1]


def test_resources_are_those_of_the_kernel() -> None:
    shared = kernel(
        "shared",
        'extern "C" __global__ void shared(float *x)\n{\n    __shared__ float s[128];\n'
        "    s[threadIdx.x] = x[threadIdx.x];\n    __syncthreads();\n"
        "    x[threadIdx.x] = s[127 - threadIdx.x];\n}",
    )
    spilling = kernel(
        "spilling",
        'extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float *x)\n{\n'
        "    float held[64];\n#pragma unroll\n"
        "    for (int i = 0; i < 64; i++) held[i] = x[i * 1024 + threadIdx.x];\n"
        "    __syncthreads();\n#pragma unroll\n"
        "    for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = held[i] * held[63 - i];\n}",
    )
    found = kernel_resources(program_of(spilling, shared, scaled(1)), SERVER)
    assert list(found) == ["spilling", "shared", "scaled_1"]
    assert found["shared"].shared_bytes == 512
    assert 0 < found["shared"].registers < 32
    assert found["shared"].spill_store_bytes == found["shared"].stack_bytes == 0
    assert found["spilling"].spill_store_bytes > 0
    assert found["spilling"].spill_load_bytes > 0
    assert found["spilling"].registers <= 32


HELD = """
extern "C" __global__ void __launch_bounds__(%s) %s(float *x)
{
    float held[64];
#pragma unroll
    for (int i = 0; i < 64; i++) held[i] = x[i * 256 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; i++) x[i * 256 + threadIdx.x] = held[i] * held[63 - i];
}
"""


def test_a_kernel_that_spills_gets_more_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ptxas decides by itself is up to its version, so it is put here."""
    texts = []

    def compile_text(unit: Unit, _architecture: str, _compiler: object) -> Image:
        texts.append(unit.source)
        spilled = {"a": "(256)" in unit.source, "b": "(128)" in unit.source, "c": False}
        spilled["b"] |= "(128, 7)" in unit.source
        taken = {name: Resources(48, 0, 4 * spilled[name], 0, 0) for name in "abc"}
        return Image(str(len(texts)).encode(), taken)

    monkeypatch.setattr(cuda_compile, "_compile_text", compile_text)
    bounds = {"a": "256", "b": "128", "c": "64"}
    kernels = [kernel(name, HELD % (threads, name)) for name, threads in bounds.items()]
    (unit,) = units_of(kernels)
    image = cuda_compile._compile(unit, "sm_90", cuda_compiler())
    assert [re.findall(r"__launch_bounds__\((.*?)\)", text) for text in texts] == [
        ["256", "128", "64"],
        ["256, 3", "128, 7", "64"],
        ["256, 3", "128, 5", "64"],
    ]
    assert image.cubin == b"3"


def test_a_kernel_that_says_how_many_blocks_are_resident_keeps_its_word() -> None:
    program = program_of(kernel("held", HELD % ("256, 8", "held")))
    taken = kernel_resources(program, SERVER)["held"]
    assert taken.registers <= 32
    assert taken.spills


def test_functions_that_a_kernel_calls_count_with_it() -> None:
    log = """ptxas info    : 0 bytes gmem, 24 bytes cmem[4]
ptxas info    : Compiling entry function 'a' for 'sm_80'
ptxas info    : Function properties for a
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for slow_path
    32 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 32 bytes cumulative stack size
ptxas info    : Compiling entry function 'b' for 'sm_80'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 1 barriers, 2048 bytes smem, 360 bytes cmem[0]
"""
    assert parse_resources(log) == {
        "a": Resources(255, 32, 5, 10, 0),
        "b": Resources(8, 0, 0, 0, 2048),
    }


def test_a_log_that_says_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="does not say what a takes"):
        parse_resources("ptxas info    : Compiling entry function 'a' for 'sm_80'\n")


def test_nvcc_serves_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    monkeypatch.setenv("EDGEPRESS_NVCC", "nvcc")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = program_of(scaled(1), scaled(2))
    code = fresh(program)
    assert fresh(program) == code
    assert str(tmp_path).encode() not in code
    assert run([str(linked(code, SERVER.compiler, tmp_path))]).startswith("sm_90, nvcc ")
    assert kernel_resources(program, SERVER)["scaled_1"].registers > 0
    wrong = kernel("wrong", 'extern "C" __global__ void wrong(float *y)\n{\n    y[0] = nothing;\n}')
    with pytest.raises(
        CompileFailed, match=r"(?s)nvcc [\d.]+ refused wrong for.*wrong\(3\): error"
    ):
        compile_kernels(program_of(wrong, kernel("b", 'extern "C" __global__ void b() {}')), SERVER)


def test_a_board_is_read_without_a_compiler_of_either_kind() -> None:
    """Neither NVRTC's library, of 60 MB, nor TVM is opened before it is needed."""
    code = (
        "import sys, edgepress.targets.cuda.compile as c; "
        "maps = open('/proc/self/maps').read(); assert 'nvrtc' not in maps"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
