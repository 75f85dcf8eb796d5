"""What kernels take of a multiprocessor, out of what ptxas says with its option `-v`."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor.

    Attributes:
        registers: of 32 bits, per thread.
        stack_bytes: per thread, in memory beyond the chip.
        spill_store_bytes: instructions that save a register there, times what they save.
        spill_load_bytes: the same for loads.
        shared_bytes: static shared memory per block.
    """

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int

    @property
    def spills(self) -> bool:
        """Whether registers did not suffice."""
        return self.spill_store_bytes + self.spill_load_bytes > 0


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_resources(log: str) -> dict[str, Resources]:
    """Read what ptxas says about every kernel; functions that a kernel calls count with it.

    >>> parse_resources('''
    ... ptxas info    : Compiling entry function 'softmax' for 'sm_87'
    ... ptxas info    : Function properties for softmax
    ...     8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
    ... ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem
    ... ''')["softmax"].shared_bytes
    128
    """
    found = {}
    _, *parts = _ENTRY.split(log)
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        memory = [tuple(map(int, numbers)) for numbers in _MEMORY.findall(text)]
        registers, shared = _USED.search(text), _SHARED.search(text)
        if registers is None or not memory:
            raise ValueError(f"ptxas does not say what {name} takes: {text!r}")
        found[name] = Resources(
            registers=int(registers[1]),
            stack_bytes=max(stack for stack, _, _ in memory),
            spill_store_bytes=sum(stores for _, stores, _ in memory),
            spill_load_bytes=sum(loads for _, _, loads in memory),
            shared_bytes=int(shared[1]) if shared else 0,
        )
    return found
