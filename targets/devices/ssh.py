"""A board that ssh reaches: `ssh:HOST`."""

from __future__ import annotations

import os
import threading
from weakref import WeakValueDictionary

from edgepress.targets.base import Target
from edgepress.targets.named_devices import NamedDevice
from edgepress.targets.remote.board_store import Store
from edgepress.targets.remote.ssh_device import SshDevice
from edgepress.targets.remote.ssh_shell import SshShell

_shells: WeakValueDictionary[tuple[str, ...], SshShell] = WeakValueDictionary()
_lock = threading.Lock()


def connect(target: Target, address: str, board: NamedDevice) -> SshDevice:
    """Run bundles on a board. Raises DeviceFailed where the address is none, or ssh is missing."""
    on_board = shell(address, board)
    return SshDevice(
        board.name,
        board.run_with,
        shell=on_board,
        target=target,
        store=Store(on_board, board.folder),
    )


def shell(address: str, board: NamedDevice) -> SshShell:
    """Return the shell of a board, the same while it is in use. Raises as `connect`."""
    key = (board.name, address, os.environ.get("EDGEPRESS_SSH_CONFIG", ""))
    with _lock:
        found = _shells.get(key)
        if found is None:
            found = _shells[key] = SshShell(board.name, address)
        return found
