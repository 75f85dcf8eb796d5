"""This machine."""

from __future__ import annotations

from edgepress.targets.base import DeviceFailed, Target
from edgepress.targets.command_device import CommandDevice
from edgepress.targets.devices.base import host_architecture
from edgepress.targets.named_devices import NamedDevice


def connect(target: Target, address: str, board: NamedDevice) -> CommandDevice:
    """Run bundles on this machine. Raises DeviceFailed where it has another architecture."""
    if address:
        raise DeviceFailed(f"local takes no address, so `local:{address}` is wrong: write `local`.")
    if host_architecture() != target.architecture:
        raise DeviceFailed(
            f"local is {host_architecture()}, but {target.name} is {target.architecture}. "
            "Use the device qemu, or a board."
        )
    return CommandDevice(board.name, board.run_with)
