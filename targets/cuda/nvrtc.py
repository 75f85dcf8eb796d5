"""CUDA C++ → machine code by NVRTC, NVIDIA's compiler as a library.

Interface: NVIDIA, "NVRTC", CUDA Toolkit documentation. Its functions may run in several threads at
once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from edgepress.targets.base import CompileFailed


def compile_with_nvrtc(
    library: Path, source: str, headers: Mapping[str, str], options: Sequence[str]
) -> tuple[bytes, str]:
    """Compile a text for one architecture.

    Args:
        library: `libnvrtc.so.NN`.
        source: CUDA C++.
        headers: what it may include: name to text.
        options: of NVRTC; they must name a real architecture, such as `sm_87`.

    Returns:
        The cubin, and what the compiler said.

    Raises:
        CompileFailed: the text is wrong, or the library cannot be used; carries the log.
    """
    nvrtc = _load(library)
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        source.encode(),
        b"kernels.cu",
        len(headers),
        _strings(list(headers.values())),
        _strings(list(headers)),
    )
    if status:
        raise CompileFailed(f"NVRTC: {_message(nvrtc, status)}")
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
        log = _answer(nvrtc, program, "ProgramLog").replace(b"\0", b"").decode("utf-8", "replace")
        if status:
            raise CompileFailed(f"NVRTC: {_message(nvrtc, status)}", log)
        return _answer(nvrtc, program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _load(library: Path) -> ctypes.CDLL:
    """Open the library, and before it what it opens by name alone."""
    try:
        for path in sorted(library.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        nvrtc = ctypes.CDLL(str(library))
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise CompileFailed(f"{library} cannot be used: {error}. Install it again.") from error
    return nvrtc


def _answer(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    """Fetch the log or the cubin."""
    size = ctypes.c_size_t()
    status = nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    answer = ctypes.create_string_buffer(size.value)
    status = status or nvrtc[f"nvrtcGet{what}"](program, answer)
    if status:
        raise CompileFailed(f"NVRTC: no {what}: {_message(nvrtc, status)}")
    return answer.raw


def _message(nvrtc: ctypes.CDLL, status: int) -> str:
    return str(nvrtc.nvrtcGetErrorString(status).decode())


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))
