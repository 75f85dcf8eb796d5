"""More registers for kernels that spill.

Left to itself, ptxas aims at a number of blocks that are resident together, and saves a few
registers in memory to make room for them. Told that fewer blocks are enough, it does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgepress.targets.cuda.resources import Resources

REGISTERS_OF_MULTIPROCESSOR = 65536
_BOUNDS = re.compile(r"__launch_bounds__\((\d+)\)\s*(\w+)\(")


def with_fewer_blocks(
    source: str, taken: Mapping[str, Resources], shares: Mapping[str, float]
) -> str:
    """Say that fewer blocks of some kernels need be resident.

    A kernel whose text says how many stays as it is.

    Args:
        source: text with the kernels.
        taken: what each kernel takes as the text stands.
        shares: kernels to change, and how many of the blocks that registers have room for now.

    >>> taken = {"softmax": Resources(96, 8, 4, 4, 0)}
    >>> with_fewer_blocks("void __launch_bounds__(128) softmax()", taken, {"softmax": 0.75})
    'void __launch_bounds__(128, 3) softmax()'
    """

    def bounds(found: re.Match[str]) -> str:
        threads, name = int(found[1]), found[2]
        if name not in shares:
            return found[0]
        now = REGISTERS_OF_MULTIPROCESSOR // (taken[name].registers * threads)
        fewer = max(1, int(now * shares[name]))
        return found[0].replace(f"({threads})", f"({threads}, {fewer})", 1)

    return _BOUNDS.sub(bounds, source)
