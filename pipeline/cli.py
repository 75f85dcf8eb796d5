"""The command line: parse, call, map errors to exit codes. No logic.

Heavy imports are inside the commands, so that `--help` and plain mistakes answer at once.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from edgepress.pipeline import interruption
from edgepress.pipeline.cli_options import (
    ALL,
    CALIB,
    DEVICE_OPTION,
    DEVICES_OPTION,
    EVAL,
    FOLDER,
    GATE_THREADS,
    HTML,
    MODEL,
    NO_CACHE,
    OVERWRITE,
    PATH,
    RECIPE,
    SHAPE,
    TARGET,
    THREADS,
    TRAIN,
    common,
    example,
    output,
)
from edgepress.pipeline.printable import printable

BUG, USAGE, REFUSED, COMPILE, DEVICE, GATE, INTERRUPTED = 1, 2, 3, 4, 5, 6, 130
# By name, since importing the classes would import everything
EXIT_CODES = {
    "edgepress.calibration.base.CalibrationError": USAGE,
    "edgepress.passes.base.UnknownPass": USAGE,
    "edgepress.pipeline.bundle.BundleError": USAGE,
    "edgepress.pipeline.image.ImageError": USAGE,
    "edgepress.pipeline.image.ImageFailed": COMPILE,
    "edgepress.pipeline.output.OutputError": USAGE,
    "edgepress.pipeline.prepare.UsageError": USAGE,
    "edgepress.pipeline.recipe.RecipeError": USAGE,
    "edgepress.pipeline.signing.SignatureError": GATE,
    "edgepress.pipeline.signing_keys.InvalidKey": USAGE,
    "edgepress.targets.base.UnknownTarget": USAGE,
    "edgepress.targets.load.InvalidBoard": USAGE,
    "edgepress.targets.named_devices.InvalidDevices": USAGE,
    "edgepress.passes.base.PassError": REFUSED,
    "edgepress.pipeline.load.ModelError": REFUSED,
    "edgepress.targets.base.UnsupportedModel": REFUSED,
    "edgepress.targets.base.CompileFailed": COMPILE,
    "edgepress.targets.base.DeviceFailed": DEVICE,
    "edgepress.targets.base.TargetError": COMPILE,
    "builtins.MemoryError": REFUSED,  # the model's tensors do not fit this machine
}
ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(importlib.metadata.version("edgepress"), prog_name="edgepress")
def cli() -> None:
    """Make an ONNX model small and fast on the board where it will run, and prove it there.

    Exit codes: 0 every gate passed, 1 bug, 2 usage or recipe, 3 model refused, 4 compile failed,
    5 device unreachable or wrong, 6 a gate failed.
    """


@cli.command(
    epilog=example("edgepress run model.onnx -t raspberry-pi-4 --calib train.npz -o bundle")
)
@MODEL
@click.option(
    "-t",
    "--target",
    help="Board; `edgepress targets` lists them. Default: what devices.toml says of the device.",
)
@RECIPE
@CALIB
@TRAIN
@EVAL
@SHAPE
@DEVICE_OPTION
@output("DIR")
@OVERWRITE
@NO_CACHE
@HTML
@GATE_THREADS
@click.option(
    "--tune",
    "tune_minutes",
    type=click.FloatRange(0, min_open=True),
    metavar="MINUTES",
    help="Search for better tiles on the device; kept for later builds, even after Ctrl-C.",
)
@common
def run(model: Path, target: str | None, recipe: str, as_json: bool, **options: Any) -> int:
    """Compress, compile, bundle and verify MODEL."""
    from edgepress.pipeline import commands

    return commands.run(model, target, recipe, as_json=as_json, check=True, **options)


@cli.command("compile", epilog=example("edgepress compile model.onnx -t native -o bundle"))
@MODEL
@TARGET
@SHAPE
@output("DIR")
@OVERWRITE
@NO_CACHE
@common
def compile_(model: Path, target: str, as_json: bool, **options: Any) -> int:
    """Compile MODEL as it is: no compression, no verification."""
    from edgepress.pipeline import commands

    return commands.run(model, target, "none", as_json=as_json, check=False, **options)


@cli.command(
    epilog=example("edgepress compress model.onnx -r default --calib train.npz -o small.onnx")
)
@MODEL
@RECIPE
@click.option("-t", "--target", help="Board to choose widths for and to measure layers on.")
@CALIB
@TRAIN
@EVAL
@SHAPE
@DEVICE_OPTION
@output("OUT.onnx")
@OVERWRITE
@NO_CACHE
@common
def compress(model: Path, recipe: str, as_json: bool, **options: Any) -> int:
    """Run the graph passes of a recipe on MODEL and write the result as ONNX.

    Passes that keep only what is faster need a target. Of the recipe's budget, accuracy_drop and
    sqnr_db are held to, on --eval or else on --calib, by raising layers to a higher precision.
    """
    from edgepress.pipeline import commands

    return commands.compress(model, recipe, as_json=as_json, **options)


@cli.command(epilog=example("edgepress verify bundle -d pi4-lab -d jetson-3 --eval test.npz"))
@FOLDER
@DEVICES_OPTION
@ALL
@EVAL
@click.option("--model", type=PATH, help="The original model, to measure the loss of accuracy.")
@click.option("--max-latency-ms", type=click.FloatRange(0), help="Gate on the median latency.")
@GATE_THREADS
@click.option(
    "--cores",
    metavar="LIST",
    help="Pin one thread to each for the latency: big, little, or numbers such as 0,2-3.",
)
@click.option(
    "--sustained",
    "sustained_minutes",
    type=click.FloatRange(0, min_open=True),
    metavar="MINUTES",
    help="Measure so long, show the curve, and gate on its last quarter.",
)
@click.option("--mlperf", is_flag=True, help="Measure by MLPerf's single-stream rule.")
@click.option("--anyway", is_flag=True, help="Give figures even where they cannot be defended.")
@HTML
@common
def verify(folder: Path, as_json: bool, **options: Any) -> int:
    """Run the bundle DIR on devices and close its gates.

    On each: selftest, accuracy on --eval, latency and peak memory. The evidence stays in DIR.
    """
    from edgepress.pipeline import board_commands

    return board_commands.verify(folder, as_json=as_json, **options)


@cli.command(epilog=example("edgepress deploy bundle -d ssh:pi@10.0.0.7 --to /opt/models/digits"))
@FOLDER
@DEVICES_OPTION
@ALL
@click.option("--to", metavar="FOLDER", help="Folder on the device. Default: ~/edgepress/NAME.")
@click.option("--rollback", "back", is_flag=True, help="Go back to the version before.")
@click.option(
    "--require-signature",
    "trusted_keys",
    multiple=True,
    type=PATH,
    metavar="PUBLIC.pem",
    help="Refuse a bundle that none of these keys has signed.",
)
@common
def deploy(folder: Path, as_json: bool, **options: Any) -> int:
    """Install the bundle DIR on devices: sent, checked, tried there, then switched to.

    What a device has already is not sent again, and an upload that broke goes on where it stopped.
    """
    from edgepress.pipeline import board_commands

    return board_commands.deploy(folder, as_json=as_json, **options)


@cli.command(epilog=example("edgepress keygen release.pem"))
@click.argument("key", metavar="KEY.pem", type=PATH)
@click.option(
    "--passphrase",
    is_flag=True,
    help="Protect it with one, from EDGEPRESS_KEY_PASSPHRASE or else asked for.",
)
@common
def keygen(key: Path, as_json: bool, **options: Any) -> int:
    """Make an Ed25519 key pair to sign bundles with: KEY.pem, and KEY.pem.pub to give away."""
    from edgepress.pipeline import signing_commands

    return signing_commands.keygen(key, as_json=as_json, **options)


@cli.command(epilog=example("edgepress sign bundle --key release.pem"))
@FOLDER
@click.option("--key", type=PATH, required=True, metavar="KEY.pem", help="Private key.")
@common
def sign(folder: Path, as_json: bool, **options: Any) -> int:
    """Sign the bundle DIR: its manifest, which has the checksum of every file."""
    from edgepress.pipeline import signing_commands

    return signing_commands.sign(folder, as_json=as_json, **options)


@cli.command(epilog=example("edgepress image raspberry-pi-4"))
@click.argument("target", metavar="TARGET")
@click.option(
    "--engine",
    type=click.Choice(["docker", "podman", "buildah"]),
    help="What builds it. Default: the first that works here.",
)
@click.option("--base", metavar="IMAGE", help="Debian image to build on.")
@click.option("--tag", help="Name of the image. Default: edgepress:STAGE.")
@click.option("--context", type=PATH, help="Checkout of edgepress. Default: where it came from.")
@click.option("--print", "print_only", is_flag=True, help="Print the command instead.")
@common
def image(target: str, as_json: bool, **options: Any) -> int:
    """Build the container image that compiles for TARGET: a board, or a stage of the Dockerfile."""
    from edgepress.pipeline import image_commands

    return image_commands.image(target, as_json=as_json, **options)


@cli.command(epilog=example("edgepress infer bundle --data test.npz -o answers.npz"))
@FOLDER
@click.option("--data", type=PATH, required=True, help="Samples: an .npz with the model's inputs.")
@DEVICE_OPTION
@output("OUT.npz")
@OVERWRITE
@common
def infer(folder: Path, as_json: bool, **options: Any) -> int:
    """Ask the compiled model in DIR itself, and write its answers."""
    from edgepress.pipeline import commands

    return commands.infer(folder, as_json=as_json, **options)


@cli.command(
    epilog=example("edgepress bench bundle --against onnxruntime --against openvino --model m.onnx")
)
@click.argument("path", metavar="DIR|MODEL", type=PATH)
@click.option(
    "--against",
    multiple=True,
    type=click.Choice(["litert", "ncnn", "onnxruntime", "openvino"]),
    help="Race against this runtime. May be given more than once.",
)
@THREADS
@click.option("--rounds", type=click.IntRange(1), help="Visits of every contender. Default: 7.")
@click.option("--model", type=PATH, help="The original model: what others convert and quantize.")
@click.option("--calib", type=PATH, help="Samples for others to quantize on. Default: random.")
@click.option(
    "--eval", "evaluation", type=PATH, help="Samples to compare answers on. Default: the golden."
)
@click.option(
    "--peer-python",
    envvar="EDGEPRESS_PEER_PYTHON",
    metavar="PYTHON",
    help="An interpreter that has the runtimes which are missing here.",
)
@click.option("--profile", is_flag=True, help="Time every layer of the bundle instead.")
@DEVICE_OPTION
@NO_CACHE
@common
def bench(path: Path, as_json: bool, **options: Any) -> int:
    """Time a bundle or a model on this machine, alone or in an interleaved race.

    A quantized bundle races what others make of the float model in float and in int8, with the
    signal to noise ratio of everybody's answers; a float bundle races their float only. With
    --profile: per layer time, operations per second, and the share of what this machine can do.
    """
    from edgepress.pipeline import commands

    return commands.bench(path, as_json=as_json, **options)


@cli.command(epilog=example("edgepress unpack bundle -o model.onnx"))
@FOLDER
@output("OUT.onnx")
@OVERWRITE
@common
def unpack(folder: Path, as_json: bool, **options: Any) -> int:
    """Write the decoded model of the bundle DIR; it runs in onnxruntime."""
    from edgepress.pipeline import commands

    return commands.unpack(folder, as_json=as_json, **options)


@cli.command(
    epilog=example("edgepress inspect model.onnx --sensitivity --calib train.npz -t raspberry-pi-4")
)
@click.argument("path", metavar="MODEL|DIR", type=PATH)
@SHAPE
@click.option("--channels", is_flag=True, help="Show which channels must be cut together.")
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Show what cutting each channel group of a float model alone costs and saves.",
)
@click.option("--calib", type=PATH, help="Samples for --sensitivity: an .npz.")
@click.option("-t", "--target", help="Board to measure the latency of layers for.")
@DEVICE_OPTION
@click.option("--plot", type=PATH, help="Also draw the sensitivity: a .png, .svg or .pdf file.")
@OVERWRITE
@NO_CACHE
@common
def inspect(path: Path, as_json: bool, **options: Any) -> int:
    """Show inputs, outputs, operators, sizes and float islands of a model or a bundle.

    With --channels the channel groups instead, with --sensitivity how much each of them matters.
    """
    from edgepress.pipeline import commands

    return commands.inspect(path, as_json=as_json, **options)


@cli.command(epilog=example("edgepress explain bundle --calib train.npz --model model.onnx"))
@FOLDER
@CALIB
@click.option("--model", type=PATH, help="The original model, to see what rounding weights cost.")
@DEVICE_OPTION
@NO_CACHE
@common
def explain(folder: Path, as_json: bool, **options: Any) -> int:
    """Explain where the time and the error of the bundle DIR come from, and what would help.

    Per layer: precision, instructions in its code, work, time on the device; with --calib also the
    error that it adds, and the three changes of the recipe that help most, each made and measured.
    """
    from edgepress.pipeline import explain_command

    return explain_command.explain(folder, as_json=as_json, **options)


@cli.command(epilog=example("edgepress passes"))
@common
def passes(as_json: bool) -> int:
    """List the passes and their options."""
    from edgepress.pipeline import listings

    return listings.passes(as_json=as_json)


@cli.command(epilog=example("edgepress targets"))
@common
def targets(as_json: bool) -> int:
    """List the boards."""
    from edgepress.pipeline import listings

    return listings.targets(as_json=as_json)


@cli.command(epilog=example("edgepress devices pi4-lab"))
@click.argument("names", metavar="[DEVICE]...", nargs=-1)
@common
def devices(names: tuple[str, ...], as_json: bool) -> int:
    """Look at devices: can they be reached, what are they, and do they fit their targets?

    Without names: local, qemu, and every board of devices.toml, which is a table per board such as
    pi4-lab = { connect = "ssh:pi@10.0.0.7", target = "raspberry-pi-4" }.
    """
    from edgepress.pipeline import board_commands

    return board_commands.devices(names, as_json=as_json)


@cli.command(epilog=example("edgepress doctor"))
@common
def doctor(as_json: bool) -> int:
    """Check this machine: what is installed, what is missing, and how to mend it."""
    from edgepress.pipeline import listings

    return listings.doctor(as_json=as_json)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with one of the documented codes."""
    arguments = sys.argv[1:] if arguments is None else arguments
    interruption.install()
    try:
        code = cli.main(arguments, prog_name="edgepress", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        print("edgepress: interrupted; what had not finished is as it was.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if interruption.received():  # what a library made of it
            print("edgepress: interrupted; what had not finished is as it was.", file=sys.stderr)
            sys.exit(INTERRUPTED)
        sys.exit(_fail(error, arguments))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception, arguments: list[str]) -> int:
    """Print one paragraph, with --json a document too, and return the exit code."""
    if "--debug" in arguments:
        traceback.print_exc()
    code, message = exit_code(error), printable(_paragraph(error))
    if code == BUG:
        message = (
            f"this is a bug in edgepress: {type(error).__name__}: {message.rstrip('.')}. "
            "Run again with --debug and report what it prints."
        )
    print(f"edgepress: {message}", file=sys.stderr)
    if "--json" in arguments:
        kind = type(error).__name__
        print(json.dumps({"error": {"code": code, "kind": kind, "message": message}}))
    return code


def exit_code(error: Exception) -> int:
    """Map an error to the documented exit code."""
    if isinstance(error, click.ClickException):
        return USAGE
    if isinstance(error, OSError) and error.errno in ENVIRONMENT:
        return USAGE
    if _disk_is_full(error):
        return USAGE
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__)
    return next((EXIT_CODES[name] for name in names if name in EXIT_CODES), BUG)


def _disk_is_full(error: Exception) -> bool:
    """Whether a compiler that edgepress calls ran out of space, which only its log says."""
    return os.strerror(errno.ENOSPC) in getattr(error, "log", "")


def _paragraph(error: Exception) -> str:
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "edgepress"
        return f"{error.format_message().rstrip('.')}. Try `{path} --help`."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full{f' at {error.filename}' if error.filename else ''}: free some space."
        )
    if _disk_is_full(error):
        return "the disk with the temporary files is full: free some space, or set TMPDIR."
    notes = " ".join(getattr(error, "__notes__", ()))
    return f"{error} {notes}".strip()


if __name__ == "__main__":
    main()
