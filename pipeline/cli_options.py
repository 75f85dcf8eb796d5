"""Options and arguments of the command line that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


def common(command: _Command) -> _Command:
    """Add the options that every command has."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, help="Show a traceback of an error."
    )
    return as_json(debug(command))


def _shapes(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    """Parse `NAME:1x3x224x224`; a name may hold colons."""
    shapes = {}
    for text in given:
        name, _, dims = text.rpartition(":")
        if not name or not all(dim.isdigit() and int(dim) > 0 for dim in dims.split("x")):
            raise click.BadParameter(f"{text!r} is not of the form NAME:1x3x224x224")
        shapes[name] = tuple(int(dim) for dim in dims.split("x"))
    return shapes


PATH = click.Path(path_type=Path)
MODEL = click.argument("model", type=PATH)
FOLDER = click.argument("folder", metavar="DIR", type=PATH)
TARGET = click.option(
    "-t", "--target", required=True, help="Board; `edgepress targets` lists them."
)
RECIPE = click.option(
    "-r",
    "--recipe",
    default="default",
    show_default=True,
    help="default (static int8), transformer (dynamic), float16 (GPUs), none, or a .toml file.",
)
CALIB = click.option("--calib", type=PATH, help="Calibration samples: an .npz or images.")
TRAIN = click.option(
    "--train", type=PATH, help="Training samples with labels, for passes that train."
)
EVAL = click.option(
    "--eval", "evaluation", type=PATH, help="Evaluation samples, with labels or not."
)
SHAPE = click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    metavar="NAME:1x3x224x224",
    callback=_shapes,
    help="Fix the shape of a dynamic input.",
)
DEVICE_OPTION = click.option(
    "-d",
    "--device",
    help="local, qemu, ssh:HOST or a name in devices.toml; chosen by the target if absent.",
)
DEVICES_OPTION = click.option(
    "-d",
    "--device",
    multiple=True,
    help="local, qemu, ssh:HOST or a name in devices.toml; chosen by the target if absent. May be "
    "given more than once.",
)
ALL = click.option("--all", "everything", is_flag=True, help="Every board of devices.toml.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what is there.")
NO_CACHE = click.option("--no-cache", is_flag=True, help="Neither use nor keep cached stages.")
HTML = click.option("--html", type=PATH, help="Also write a report as one HTML file.")
COUNT = click.IntRange(1, 256)
THREADS = click.option("--threads", type=COUNT, default=1, show_default=True)
GATE_THREADS = click.option(
    "--threads", type=COUNT, help="Of the latency. Default: as many as the target has cores."
)


def output(metavar: str) -> Callable[[_Command], _Command]:
    """Add the option that names the result."""
    return click.option("-o", "--output", type=PATH, required=True, metavar=metavar, help="Result.")


def example(command: str) -> str:
    """Show a command below the help, on a line of its own."""
    return f"\b\nExample:\n  {command}"
