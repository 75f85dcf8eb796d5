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
import pkgutil
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

import edgepress.targets.devices
from edgepress.targets.base import TargetError
from edgepress.targets.load import near_names

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOML_TYPES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "such a list",
    dict: "a table",
}


class InvalidDevices(TargetError):
    """`devices.toml` breaks a rule."""


@dataclass(frozen=True, kw_only=True)
class NamedDevice:
    """A board of `devices.toml`.

    Attributes:
        name: its table.
        connect: how to reach it: `ssh:HOST`, `local` or `qemu`.
        target: what to build for it, or empty.
        folder: where bundles are installed on it: absolute, or below `~/`; empty: `~/edgepress`.
        run_with: words before the executable on the board, such as `("chrt", "-f", "50")`, or an
            emulator there.
    """

    name: str
    connect: str
    target: str = ""
    folder: str = ""
    run_with: tuple[str, ...] = ()


def device_names() -> list[str]:
    """Every kind of device, by file name, sorted."""
    modules = pkgutil.iter_modules(edgepress.targets.devices.__path__)
    return sorted(module.name for module in modules if module.name != "base")


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
        if os.environ.get("EDGEPRESS_DEVICES"):
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
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise InvalidDevices(f"{path} is not TOML: {error}.") from error
    return {name: _device(name, table, path) for name, table in tables.items()}


def _device(name: str, table: object, path: str) -> NamedDevice:
    """Check every key and type of one table."""
    where = f"{path}: [{name}]"
    if not _NAME.fullmatch(name):
        raise InvalidDevices(f"{where}: a name is letters, digits, dots, dashes and underscores.")
    if name in device_names():
        raise InvalidDevices(f"{where}: {name} is a kind of device. Give the board another name.")
    if not isinstance(table, dict):
        raise InvalidDevices(f'{where} must be a table, such as {{ connect = "ssh:HOST" }}.')
    values = {key: _value(key, value, where) for key, value in table.items()}
    if not values.get("connect"):
        raise InvalidDevices(f'{where}: missing connect, such as connect = "ssh:pi@10.0.0.7".')
    device = NamedDevice(name=name, **values)
    kind = device.connect.partition(":")[0]
    if kind not in device_names():
        raise InvalidDevices(
            f"{where}: connect = {device.connect!r} is of no known kind."
            f"{near_names(kind, device_names())}"
        )
    if device.folder and not device.folder.startswith(("/", "~/")):
        raise InvalidDevices(f"{where}: folder must begin with / or ~/, it is {device.folder!r}.")
    if device.run_with and not device.run_with[0]:
        raise InvalidDevices(f"{where}: the first word of run_with is empty; it is a program.")
    return device


def _value(key: str, value: object, where: str) -> Any:
    """Check the key and type of one value, and make a tuple of a list."""
    keys = [field.name for field in dataclasses.fields(NamedDevice) if field.name != "name"]
    if key not in keys:
        raise InvalidDevices(f"{where}: unknown key {key!r}.{near_names(key, keys)}")
    words = value if key == "run_with" else [value]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        wanted = "a list of strings" if key == "run_with" else "a string"
        kind = _TOML_TYPES.get(type(value), "a date or a time")
        raise InvalidDevices(f"{where}: {key} must be {wanted}, not {kind}.")
    if any("\0" in str(word) for word in words):
        raise InvalidDevices(f"{where}: {key} holds a NUL character, which no command can take.")
    return tuple(words) if key == "run_with" else value
