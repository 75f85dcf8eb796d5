"""The code of kernels: counted per kernel, innermost loops apart, as objdump counts it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from edgepress.targets.compile import compile_with_assembly
from edgepress.targets.kernel_code import kernel_codes
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from tests.targets.qdq import drawn, qdq_nets
from tests.targets.tiny import need

TEXT = """
	.text
	.globl	dense
	.type	dense,@function
dense:
	pushq	%rbx
	leaq	.Lpart.1(%rip), %rdi
	imulq	$24, %rsi, %rsi
	callq	*%rax
	retq
.Lfunc_end0:
	.size	dense, .Lfunc_end0-dense

	.type	.Lpart.1,@function
.Lpart.1:
	xorl	%eax, %eax
.LBB1_1:
	imulq	$48, %rax, %rcx
	vpxor	%zmm0, %zmm0, %zmm0
.LBB1_2:
	vpdpbusd	(%rdi), %zmm1, %zmm0
	vpdpbusd	64(%rdi), %zmm1, %zmm0
	incq	%rdx
	jne	.LBB1_2
	vcvtdq2ps	%zmm0, %zmm0
	incq	%rax
	jne	.LBB1_1
	jmp	.LBB1_4
.LBB1_4:
	retq
.Lfunc_end1:
	.size	.Lpart.1, .Lfunc_end1-.Lpart.1

	.section	.rodata
.LCPI0_0:
	.long	0x437f0000
	.text
	.globl	scalar
	.type	scalar,@function
scalar:                                 # @scalar
.LBB2_1:
	movzbl	(%rdi), %eax
	imull	%ecx, %eax
	movb	%al, (%rsi)
	jne	.LBB2_1
	retq
	.size	scalar, .-scalar

	.type	straight,@function
straight:
	movzbl	(%rdi), %eax
	retq
	.size	straight, .-straight
"""


def test_the_private_part_of_a_kernel_belongs_to_it() -> None:
    code = kernel_codes(TEXT, ["dense"])["dense"]
    assert code.instructions == 5 + 12
    assert code.multiplies == {"imulq": 2, "vpdpbusd": 2}
    assert code.kinds["call"] == 1
    assert code.float_instructions == code.kinds["conversion"] == 1


def test_innermost_loops_are_counted_apart() -> None:
    code = kernel_codes(TEXT, ["dense"])["dense"]
    assert code.loop_multiplies == {"vpdpbusd": 2}
    assert code.loop_kinds == {"vector_integer_multiply": 2, "other": 1, "jump": 1}
    assert (code.multiply, code.vector, code.calls_library) == ("vpdpbusd", True, False)


def test_a_scalar_loop_is_told() -> None:
    code = kernel_codes(TEXT, ["scalar"])["scalar"]
    assert (code.multiply, code.vector) == ("imull", False)
    assert code.loop_kinds == {"load": 1, "scalar_integer_multiply": 1, "store": 1, "jump": 1}


def test_without_a_loop_all_instructions_count() -> None:
    code = kernel_codes(TEXT, ["straight"])["straight"]
    assert code.loop_kinds == code.kinds == {"load": 1, "other": 1}
    assert (code.multiply, code.vector) == ("", False)


def test_products_decide_between_a_vector_loop_and_a_scalar_tail() -> None:
    loop = "\n.A:\n\tvpmaddwd\t%ymm0, %ymm1, %ymm2\n\tjne\t.A\n"
    tail = ".B:\n" + "\timull\t%eax, %ecx\n" * 9 + "\tjne\t.B\n"
    text = f"\t.type\tf,@function\nf:{loop}{tail}\tretq\n\t.size\tf, 1\n"
    code = kernel_codes(text, ["f"])["f"]
    assert (code.multiply, code.vector) == ("vpmaddwd", True)
    assert code.loop_multiplies == {"vpmaddwd": 1, "imull": 9}


def test_a_kernel_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no function 'other'"):
        kernel_codes(TEXT, ["other"])


@pytest.mark.parametrize(
    ("board", "prefix", "mnemonics"),
    [
        ("x86-64-v3", "", ["vpmaddwd", "vmulps", "vcvtdq2ps", "vmaxps"]),
        ("x86-64-v4", "", ["vpmaddwd", "vmulps", "vcvtdq2ps"]),
        ("raspberry-pi-4", "aarch64-linux-gnu-", ["smlal", "smlal2", "fmul", "scvtf"]),
        ("raspberry-pi-5", "aarch64-linux-gnu-", ["sdot", "fmul", "scvtf"]),
        ("armv7-neon", "arm-linux-gnueabihf-", ["vmlal.s16", "vmul.f32"]),
    ],
)
def test_counts_are_those_of_a_disassembler(
    board: str, prefix: str, mnemonics: list[str], tmp_path: Path
) -> None:
    objdump = f"{prefix}objdump"
    need(objdump, f"binutils-{prefix}".rstrip("-"))
    target = load_target(board)
    wanted, counted = Counter[str](), Counter[str]()
    for number, model in enumerate(drawn(qdq_nets(), 6)):
        program = lower(model, target)
        code, assembly = compile_with_assembly(program, target)
        path = tmp_path / f"{number}.o"
        path.write_bytes(code)
        listing = subprocess.run(
            [objdump, "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
        ).stdout
        wanted.update(re.findall(r"^\s*[0-9a-f]+:\s+(\S+)", listing, re.MULTILINE))
        for line in assembly.splitlines():
            if found := re.match(r"\t([a-z][\w.]*)", line):
                counted[found[1]] += 1
        for kernel in kernel_codes(assembly, program.kernels).values():
            assert sum(kernel.multiplies.values()) == sum(
                count for kind, count in kernel.kinds.items() if kind.endswith("multiply")
            )
    assert {name: counted[name] for name in mnemonics} == {name: wanted[name] for name in mnemonics}
    assert all(wanted[name] for name in mnemonics[:1])
