"""CUDA C++ → machine code by nvcc, NVIDIA's compiler driver, which runs the host's C++ compiler."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepress.targets.base import CompileFailed

_TIMEOUT_S = 600


def compile_with_nvcc(
    program: Path, source: str, headers: Mapping[str, str], options: Sequence[str]
) -> tuple[bytes, str]:
    """Compile a text for one architecture.

    Args:
        program: nvcc.
        source: CUDA C++.
        headers: what it may include: name to text.
        options: of nvcc.

    Returns:
        The cubin, and what the compiler said. No path is in the cubin.

    Raises:
        CompileFailed: the text is wrong, or nvcc cannot be used; carries the log.
    """
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        folder = Path(temporary)
        for name, text in {**headers, "kernels.cu": source}.items():
            (folder / name).write_text(text, encoding="utf-8")
        command = [str(program), *options, "-cubin", "-I.", "kernels.cu", "-o", "kernels.cubin"]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except OSError as error:
            raise CompileFailed(f"{program} cannot be run: {error}") from error
        except subprocess.TimeoutExpired:
            raise CompileFailed(f"{program} did not finish in {_TIMEOUT_S} s") from None
        log = done.stdout.decode("utf-8", "replace")
        if done.returncode:
            raise CompileFailed(f"{program} failed:", log)
        return (folder / "kernels.cubin").read_bytes(), log
