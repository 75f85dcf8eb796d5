import dataclasses
import subprocess
import sys
from importlib import resources

import pytest

from edgepress.targets.base import Target, UnknownTarget
from edgepress.targets.isa.base import load_isa
from edgepress.targets.load import (
    InvalidBoard,
    host_flags,
    load_target,
    parse_target,
    target_names,
    tvm_target,
    validate,
)

BOARD = """
description = "a board"
triple = "aarch64-linux-gnu"
cpu = "cortex-a72"
isa = "neon"
compiler = "aarch64-linux-gnu-gcc"
"""
AVX2 = "fma f16c avx2 bmi1 bmi2 movbe abm"
AVX512 = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl"


def native(flags: str, key: str = "flags", processors: int = 2) -> Target:
    text = (resources.files("edgepress.targets.boards") / "native.toml").read_text()
    return parse_target(
        "native", text, "".join(f"processor\t: {i}\n{key}\t: {flags}\n" for i in range(processors))
    )


def test_the_promised_boards_are_there() -> None:
    assert {
        "x86-64-v3",
        "x86-64-v4",
        "native",
        "raspberry-pi-4",
        "raspberry-pi-5",
        "cortex-a55",
        "armv8-i8mm",
        "armv7-neon",
        "armv7-soft-float",
        "cuda-sm80",
        "cuda-sm90",
        "jetson-orin-nano",
        "jetson-agx-orin",
    } <= set(target_names())


@pytest.mark.parametrize("name", target_names())
def test_every_board_is_known_to_llvm(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    target = load_target(name)
    tvm = tvm_target(target)
    assert target.name == name
    assert tvm.attrs["mcpu"] == target.cpu
    assert int(tvm.attrs["num-cores"]) == target.cores
    assert capfd.readouterr().err == ""  # LLVM's own complaints come only there


@pytest.mark.parametrize(
    ("name", "isa", "cpu"),
    [
        ("x86-64-v3", "avx2", "x86-64-v3"),
        ("x86-64-v4", "avx512", "x86-64-v4"),
        ("raspberry-pi-4", "neon", "cortex-a72"),
        ("raspberry-pi-5", "neon_dotprod", "cortex-a76"),
        ("cortex-a55", "neon_dotprod", "cortex-a55"),
        ("armv8-i8mm", "neon_i8mm", "cortex-a76"),
        ("armv7-neon", "neon_armv7", "cortex-a7"),
        ("armv7-soft-float", "scalar", "cortex-a5"),
        ("cuda-sm80", "cuda", "x86-64-v3"),
        ("cuda-sm90", "cuda", "x86-64-v3"),
        ("jetson-orin-nano", "cuda", "cortex-a78ae"),
        ("jetson-agx-orin", "cuda", "cortex-a78ae"),
    ],
)
def test_boards_name_their_instruction_set(name: str, isa: str, cpu: str) -> None:
    target = load_target(name)
    assert (target.isa, target.cpu) == (isa, cpu)


@pytest.mark.parametrize(
    ("name", "gpu", "multiprocessors"),
    [
        ("cuda-sm80", "sm_80", 108),
        ("cuda-sm90", "sm_90", 132),
        ("jetson-orin-nano", "sm_87", 8),
        ("jetson-agx-orin", "sm_87", 16),
    ],
)
def test_boards_name_their_gpu(name: str, gpu: str, multiprocessors: int) -> None:
    target = load_target(name)
    assert target.is_cuda
    assert (target.gpu_arch, target.gpu_multiprocessors) == (gpu, multiprocessors)


def test_other_boards_have_no_gpu() -> None:
    others = [name for name in target_names() if not name.startswith(("cuda-", "jetson-"))]
    assert not any(load_target(name).is_cuda for name in others)


def test_armv7_says_how_floats_are_passed() -> None:
    assert str(tvm_target(load_target("armv7-neon")).attrs["mfloat-abi"]) == "hard"
    assert str(tvm_target(load_target("armv7-soft-float")).attrs["mfloat-abi"]) == "soft"


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("x86-64-v4", "avx512bw", "avx512vnni"),
        ("raspberry-pi-4", "neon", "dotprod"),
        ("raspberry-pi-5", "dotprod", "i8mm"),
        ("cortex-a55", "dotprod", "i8mm"),
        ("armv8-i8mm", "i8mm", "sve"),
        ("armv7-neon", "vfp4", "dotprod"),
        ("armv7-soft-float", "v7", "fpregs"),
    ],
)
def test_llvm_compiles_for_what_the_board_has(name: str, has: str, lacks: str) -> None:
    from tvm.target.codegen import llvm_get_cpu_features

    features = llvm_get_cpu_features(tvm_target(load_target(name)))
    assert has in features
    assert lacks not in features


def test_every_instruction_set_has_its_file() -> None:
    for name in target_names():
        load_isa(load_target(name).isa)


def test_the_start_up_check_knows_every_flag() -> None:
    source = (resources.files("edgepress.targets.runtime") / "cpu.c").read_text(encoding="utf-8")
    flags = {flag for name in target_names() for flag in load_target(name).cpu_flags}
    assert not {flag for flag in flags if f'{{"{flag}",' not in source}


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(UnknownTarget, match=r"raspberry-pi-5|raspberry-pi-4") as caught:
        load_target("rasberry-pi-6")
    assert "raspberry-pi-4" in caught.value.near


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("featuers = []", r"board\.toml: unknown key 'featuers'\. Did you mean features"),
        ("name = 'x'", r"unknown key 'name'"),
        ("cores = '4'", r"cores must be int, it is '4'"),
        ("cores = true", r"cores must be int"),
        ("cores = 0", r"cores must be 1 or more"),
        ("features = '+neon'", r"features must be a list of strings"),
        ("features = ['neon']", r"features start with \+ or -, 'neon' does not"),
        ("gpu_arch = 'sm_75'", r"gpu_arch must be sm_80 or later, it is 'sm_75'"),
        ("gpu_arch = 'compute_80'", r"gpu_arch must be sm_80 or later"),
        ("gpu_arch = 'sm_80; rm'", r"gpu_arch must be sm_80 or later"),
        ("gpu_arch = 'sm_80'", r'gpu_arch and isa = "cuda" go together'),
        ("gpu_multiprocessors = 8", r"gpu_multiprocessors must be"),
        ("cpu\n", r"is not TOML.*line 7"),
    ],
)
def test_a_broken_board_file_is_refused(line: str, message: str) -> None:
    with pytest.raises(InvalidBoard, match=message):
        parse_target("board", BOARD + line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r'gpu_arch and isa = "cuda" go together'),
        ("gpu_arch = 'sm_87'", r"gpu_multiprocessors must be 1 or more"),
        ("gpu_arch = 'sm_87'\ngpu_multiprocessors = -8", r"gpu_multiprocessors must be 1 or more"),
    ],
)
def test_a_broken_board_with_a_gpu_is_refused(line: str, message: str) -> None:
    with pytest.raises(InvalidBoard, match=message):
        parse_target("board", BOARD.replace('"neon"', '"cuda"') + line)


def test_a_gpu_needs_a_host_of_64_bits() -> None:
    text = BOARD.replace('"neon"', '"cuda"').replace("aarch64-linux", "armv7l-linux")
    with pytest.raises(InvalidBoard, match="host of a GPU is x86_64 or aarch64, not armv7l"):
        parse_target("board", text + "gpu_arch = 'sm_87'\ngpu_multiprocessors = 8")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InvalidBoard, match=r"board\.toml: missing compiler, isa"):
        parse_target("board", "description=''\ntriple='a-b'\ncpu='c'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"triple": "aarch46-linux-gnu"}, r"no architecture 'aarch46'.*aarch64"),
        ({"cpu": "cortex-a27"}, r"no cpu 'cortex-a27' for aarch64-linux-gnu.*cortex-a7"),
        ({"features": ("+dotprd",)}, r"no feature 'dotprd'.*dotprod"),
        ({"features": ("+avx2",)}, r"no feature 'avx2'"),
    ],
)
def test_what_llvm_does_not_know_is_refused(
    change: dict[str, object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    target = dataclasses.replace(parse_target("board", BOARD), **change)  # type: ignore[arg-type]
    with pytest.raises(InvalidBoard, match=message):
        validate(target)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "key", "isa", "feature"),
    [
        (f"{AVX512} avx512_vnni", "flags", "avx512_vnni", "+avx512vnni"),
        (AVX512, "flags", "avx512", "-prefer-256-bit"),
        (AVX512.replace(" avx512bw", ""), "flags", "avx2", None),
        (AVX2, "flags", "avx2", None),
        ("fp asimd crc32 atomics asimddp", "Features", "neon_dotprod", "+dotprod"),
        ("fp asimd crc32", "Features", "neon", None),
    ],
)
def test_native_follows_cpuinfo(flags: str, key: str, isa: str, feature: str | None) -> None:
    target = native(flags, key)
    assert target.isa == isa
    assert (feature in target.features) if feature else target.features == ()
    assert set(target.cpu_flags) <= set(flags.split())
    assert target.cores == 2
    tvm_target(target)


@pytest.mark.parametrize("flags", ["", "sse4_2 avx", "neon vfpv4"])
def test_native_refuses_a_host_without_a_candidate(flags: str) -> None:
    with pytest.raises(InvalidBoard, match=r"fits no candidate.*avx2.*Name a board"):
        native(flags)


def test_a_flag_counts_only_where_every_processor_has_it() -> None:
    assert host_flags("flags: a b\nother: c\nflags: b a d") == {"a", "b"}


def test_listing_and_loading_do_not_import_tvm() -> None:
    code = (
        "import sys; from edgepress.targets.load import load_target, target_names; "
        "[load_target(name) for name in target_names()]; assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
