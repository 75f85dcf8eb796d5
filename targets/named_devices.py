"""Boards with names: `devices.toml`.

    [pi4-lab]
    connect = "ssh:pi@10.0.0.7"
    target = "raspberry-pi-4"

It is the file that EDGEPRESS_DEVICES names, else `devices.toml` in the working folder, else the one
in the user's configuration folder.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from edgepress.targets.base import TargetError
from edgepress.targets.load import near_names

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class InvalidDevices(TargetError):
    """`devices.toml` breaks a rule."""


@dataclass(frozen=True, kw_only=True)
class NamedDevice:
    """A board of `devices.toml`.

    Attributes:
        name: its table.
        connect: how to reach it: `ssh:HOST`, `local` or `qemu`.
        target: what to build for it, or empty.
        folder: where bundles are installed on it; empty: `edgepress` in the user's home folder.
        run_with: words before the executable on the board, such as `("chrt", "-f", "50")`, or an
            emulator there.
    """

    name: str
    connect: str
    target: str = ""
    folder: str = ""
    run_with: tuple[str, ...] = ()


def devices_file() -> Path:
    """Path of the file that names boards; it need not be there."""
    if given := os.environ.get("EDGEPRESS_DEVICES"):
        return Path(given)
    here = Path("devices.toml")
    return here if here.is_file() else platformdirs.user_config_path("edgepress") / "devices.toml"


def named_devices() -> dict[str, NamedDevice]:
    """Read every board that has a name; none where there is no such file.

    Raises:
        InvalidDevices: the file breaks a rule, or cannot be read.
    """
    path = devices_file()
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        if "EDGEPRESS_DEVICES" in os.environ:
            raise InvalidDevices(f"EDGEPRESS_DEVICES names {path}, which is not there.") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDevices(f"{path} cannot be read: {error}.") from error
    return parse_devices(text, str(path))


def parse_devices(text: str, path: str) -> dict[str, NamedDevice]:
    """Parse the text of `devices.toml`; messages call it `path`. Raises InvalidDevices.

    >>> parse_devices('pi = { connect = "ssh:pi" }', "devices.toml")["pi"].connect
    'ssh:pi'
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidDevices(f"{path} is not TOML: {error}.") from error
    return {name: _device(name, table, path) for name, table in tables.items()}


def _device(name: str, table: object, path: str) -> NamedDevice:
    """Check every key and type of one table."""
    where = f"{path}: [{name}]"
    if not _NAME.fullmatch(name):
        raise InvalidDevices(f"{where}: a name is letters, digits, dots, dashes and underscores.")
    if not isinstance(table, dict):
        raise InvalidDevices(f'{where} must be a table, such as {{ connect = "ssh:HOST" }}.')
    fields = {field.name: field for field in dataclasses.fields(NamedDevice)}
    del fields["name"]
    for key, value in table.items():
        if key not in fields:
            raise InvalidDevices(f"{where}: unknown key {key!r}.{near_names(key, fields)}")
        if key == "run_with":
            fits = isinstance(value, list) and all(isinstance(word, str) for word in value)
        else:
            fits = isinstance(value, str)
        if not fits:
            wanted = "a list of strings" if key == "run_with" else "a string"
            raise InvalidDevices(f"{where}: {key} must be {wanted}, it is {value!r}.")
    if not table.get("connect"):
        raise InvalidDevices(f'{where}: missing connect, such as connect = "ssh:pi@10.0.0.7".')
    values: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in table.items()
    }
    return NamedDevice(name=name, **values)
