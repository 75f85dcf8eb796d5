"""Runs the C compiler of a target."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from edgepress.targets.base import CompileFailed, Target

_TIMEOUT_S = 600


def run_c_compiler(folder: Path, target: Target, arguments: Sequence[str]) -> None:
    """Run the C compiler of a target in a folder.

    Raises:
        CompileFailed: it is missing or failed; carries its log.
    """
    try:
        result = subprocess.run(
            [target.compiler, *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise CompileFailed(
            f"the target {target.name} needs the C compiler {target.compiler}, which is not "
            f"installed. On Debian or Ubuntu: apt-get install {target.compiler_package}"
        ) from None
    except subprocess.TimeoutExpired:
        raise CompileFailed(f"{target.compiler} did not finish in {_TIMEOUT_S} s") from None
    if result.returncode != 0:
        log = result.stderr.decode("utf-8", "replace")
        raise CompileFailed(f"{target.compiler} failed for the target {target.name}:", log)
