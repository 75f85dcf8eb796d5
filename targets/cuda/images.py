"""Machine code for a GPU as data in an ELF object for its host."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgepress.targets.base import Target
from edgepress.targets.c_compiler import run_c_compiler


def images_object(cubins: Sequence[bytes], target: Target, compiler: str) -> bytes:
    """Make an object for the host of a target, x86_64 or aarch64, by the target's C compiler.

    Args:
        cubins: what the CUDA driver loads, one by one.
        target: names the C compiler and the GPU's architecture.
        compiler: what made the cubins, such as `nvrtc 12.6.85`.

    Returns:
        An object that defines::

            struct kernel_image { const void *data; uint64_t bytes; };
            const struct kernel_image kernel_images[];  // one with no bytes where there are none
            const int kernel_image_count;
            const char kernel_architecture[];           // "sm_87"
            const char kernel_compiler[];               // "nvrtc 12.6.85"

    Raises:
        CompileFailed: the C compiler is missing or failed.
    """
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        folder = Path(temporary)
        for index, cubin in enumerate(cubins):
            (folder / f"{index}.cubin").write_bytes(cubin)
        source = _assembly(len(cubins), target.gpu_arch, compiler)
        (folder / "images.s").write_text(source, encoding="utf-8")
        run_c_compiler(folder, target, ["-c", "images.s", "-o", "images.o"])
        return (folder / "images.o").read_bytes()


def _assembly(images: int, architecture: str, compiler: str) -> str:
    """Write directives that assemblers for x86-64 and for AArch64 both know."""
    data = [
        line
        for index in range(images)
        for line in (
            ".balign 64",
            f"image_{index}:",
            f'.incbin "{index}.cubin"',
            f"image_{index}_end:",
        )
    ]
    entries = [f".quad image_{i}, image_{i}_end - image_{i}" for i in range(images)]
    lines = [
        '.section .rodata,"a"',
        *data,
        *_object("kernel_image_count", 4, [f".long {images}"]),
        *_object("kernel_architecture", 1, [f'.asciz "{architecture}"']),
        *_object("kernel_compiler", 1, [f'.asciz "{compiler}"']),
        # the linker fills in addresses, and in a position-independent program the loader does
        '.section .data.rel.ro,"aw"',
        *_object("kernel_images", 8, entries or [".quad 0, 0"]),
        '.section .note.GNU-stack,"",%progbits',
    ]
    return "\n".join(lines) + "\n"


def _object(name: str, alignment: int, data: Sequence[str]) -> list[str]:
    return [
        f".balign {alignment}",
        f".globl {name}",
        f".type {name}, %object",
        f"{name}:",
        *data,
        f".size {name}, . - {name}",
    ]
