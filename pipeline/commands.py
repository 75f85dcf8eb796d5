"""What each command of the command line does: load what was named, call, print the answer.

Every function prints tables, or one JSON document with `as_json`, and returns an exit code.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepress.pipeline.cache import Cache, cache_folder
from edgepress.pipeline.json_document import print_json
from edgepress.pipeline.progress import Progress

if TYPE_CHECKING:
    from edgepress.targets.base import Target

DEVICE, GATE = 5, 6
Shapes = Mapping[str, tuple[int, ...]]


def run(
    model: Path,
    target: str | None,
    recipe: str,
    *,
    output: Path,
    input_shapes: Shapes,
    overwrite: bool,
    no_cache: bool,
    as_json: bool,
    check: bool,
    calib: Path | None = None,
    train: Path | None = None,
    evaluation: Path | None = None,
    device: str | None = None,
    html: Path | None = None,
    threads: int | None = None,
    tune_minutes: float | None = None,
) -> int:
    """Run the whole pipeline; `edgepress run` and `edgepress compile`."""
    from edgepress.pipeline import report
    from edgepress.pipeline import run as pipeline
    from edgepress.pipeline.html_report import html_report
    from edgepress.pipeline.output import refuse_existing, write_file
    from edgepress.pipeline.recipe import load_recipe

    if html is not None:
        refuse_existing(html, overwrite=overwrite)
    request = pipeline.Request(
        model=model,
        target=_target(target, device),
        recipe=load_recipe(recipe),
        output=output,
        calib=calib,
        train=train,
        eval=evaluation,
        input_shapes=input_shapes,
        device=device,
        overwrite=overwrite,
        check=check,
        threads=threads,
        tune_minutes=tune_minutes,
    )
    result = pipeline.run(request, cache=_cache(no_cache), progress=Progress())
    if html is not None:
        evidence = None if result.evidence is None else result.evidence.to_json()
        page = html_report(result.bundle, evidence)
        write_file(html, page.encode(), overwrite=overwrite)
    if as_json:
        print_json(report.result_json(result))
    else:
        report.show_result(result, report.console())
    if result.unverified is not None:
        what = f"{output} is built, but nothing verified it: {result.unverified}"
        print(f"edgepress: {what}", file=sys.stderr)
        return DEVICE
    return 0 if result.evidence is None or result.evidence.passed else GATE


def compress(
    model: Path,
    recipe: str,
    *,
    output: Path,
    target: str | None,
    device: str | None,
    calib: Path | None,
    evaluation: Path | None,
    input_shapes: Shapes,
    overwrite: bool,
    no_cache: bool,
    as_json: bool,
    train: Path | None = None,
) -> int:
    """Run the graph passes alone; `edgepress compress`."""
    from edgepress.pipeline import report
    from edgepress.pipeline.output import refuse_existing, write_file
    from edgepress.pipeline.prepare import UsageError, prepare
    from edgepress.pipeline.recipe import load_recipe
    from edgepress.targets.devices.base import open_device
    from edgepress.targets.load import load_target

    refuse_existing(output, overwrite=overwrite)
    board = None if target is None else load_target(target)
    if device is not None and board is None:
        raise UsageError("-d says where to measure; say with -t what board to compile for.")
    if device is not None and board is not None:
        open_device(device, board)  # a wrong name is better said at once
    prepared = prepare(
        model,
        load_recipe(recipe),
        target=board,
        device=device,
        calib=calib,
        train=train,
        evaluation=evaluation,
        input_shapes=input_shapes,
        cache=_cache(no_cache),
        progress=Progress(),
    )
    write_file(output, prepared.compressed.model, overwrite=overwrite)
    if as_json:
        steps = [dataclasses.asdict(step) for step in prepared.steps]
        print_json({"output": str(output), "source": prepared.source, "steps": steps})
    else:
        report.show_steps(prepared.steps, report.console())
    missed = prepared.precision is not None and not prepared.precision.best.holds
    return GATE if missed else 0


def infer(
    folder: Path,
    *,
    data: Path,
    device: str | None,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Bring the compiled model's own answers back; `edgepress infer`."""
    from edgepress.pipeline.accuracy import stack
    from edgepress.pipeline.bundle import read_bundle
    from edgepress.pipeline.output import refuse_existing, write_file
    from edgepress.pipeline.verify import infer_folder

    refuse_existing(output, overwrite=overwrite)
    answers = stack(infer_folder(read_bundle(folder), device, data, Progress()))
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(answers)
    np.savez(buffer, **arrays)
    write_file(output, buffer.getvalue(), overwrite=overwrite)
    shapes = {name: list(array.shape) for name, array in answers.items()}
    if as_json:
        print_json({"output": str(output), "outputs": shapes})
    else:
        for name, shape in shapes.items():
            print(f"{output}: {name} {shape}")
    return 0


def bench(
    path: Path,
    *,
    against: tuple[str, ...],
    threads: int,
    rounds: int | None,
    model: Path | None,
    calib: Path | None,
    evaluation: Path | None,
    peer_python: str | None,
    profile: bool,
    device: str | None,
    no_cache: bool,
    as_json: bool,
) -> int:
    """Time a bundle or a model on this machine, or its layers; `edgepress bench`."""
    from edgepress.pipeline import report
    from edgepress.pipeline.prepare import UsageError
    from edgepress.pipeline.race import ROUNDS, show_race
    from edgepress.pipeline.race import bench as race

    if profile:
        given = {"--against": against, "--rounds": rounds, "--model": model, "--calib": calib,
                 "--eval": evaluation, "--peer-python": peer_python}  # fmt: skip
        for name in (name for name, value in given.items() if value):
            raise UsageError(f"{name} is for races, and --profile times layers; leave one out.")
        return _profile(path, device, threads, no_cache=no_cache, as_json=as_json)
    if device is not None:
        raise UsageError("-d is for --profile: races are run on this machine; leave it out.")
    if not against and (calib or evaluation or peer_python):
        raise UsageError(
            "--calib, --eval and --peer-python are for races; say with --against whom to race."
        )
    result = race(
        path,
        model=model,
        against=against,
        threads=threads,
        rounds=rounds or ROUNDS,
        calib=calib,
        evaluation=evaluation,
        peer_python=peer_python,
        cache=_cache(no_cache),
        progress=Progress(),
    )
    if as_json:
        print_json(result.to_json())
    else:
        show_race(result, report.console())
    return 0


def _profile(
    folder: Path, device: str | None, threads: int, *, no_cache: bool, as_json: bool
) -> int:
    """Time the layers of a bundle; `edgepress bench --profile`."""
    from edgepress.pipeline import report
    from edgepress.pipeline.layer_profile import profile, show_profile

    found = profile(
        folder, device=device, threads=threads, cache=_cache(no_cache), progress=Progress()
    )
    if as_json:
        print_json(found.to_json())
    else:
        show_profile(found, report.console())
    return 0


def unpack(folder: Path, *, output: Path, overwrite: bool, as_json: bool) -> int:
    """Write the graph of a bundle as an ordinary ONNX model; `edgepress unpack`."""
    from edgepress.pipeline.bundle import read_bundle
    from edgepress.pipeline.output import write_file

    data = (read_bundle(folder).folder / "graph.onnx").read_bytes()
    write_file(output, data, overwrite=overwrite)
    if as_json:
        print_json({"output": str(output), "size_bytes": len(data)})
    else:
        print(f"{output}: {len(data)} bytes")
    return 0


def inspect(
    path: Path,
    *,
    input_shapes: Shapes,
    channels: bool,
    sensitivity: bool,
    calib: Path | None,
    target: str | None,
    device: str | None,
    plot: Path | None,
    overwrite: bool,
    no_cache: bool,
    as_json: bool,
) -> int:
    """Show what is in a model or a bundle; `edgepress inspect`."""
    from edgepress.pipeline import report
    from edgepress.pipeline.inspection import inspect as look
    from edgepress.pipeline.inspection import show
    from edgepress.pipeline.prepare import UsageError

    if sensitivity and channels:
        raise UsageError("--channels and --sensitivity show different tables; give one of them.")
    if sensitivity:
        return _sensitivity(
            path,
            input_shapes=input_shapes,
            calib=calib,
            target=target,
            device=device,
            plot=plot,
            overwrite=overwrite,
            no_cache=no_cache,
            as_json=as_json,
        )
    given = {"--calib": calib, "-t": target, "-d": device, "--plot": plot}
    for name in (name for name, value in given.items() if value is not None):
        raise UsageError(f"{name} is for --sensitivity; give that too, or leave {name} out.")
    found = look(path, input_shapes, channels=channels)
    if as_json:
        print_json(found)
    else:
        show(found, report.console())
    return 0


def _sensitivity(
    path: Path,
    *,
    input_shapes: Shapes,
    calib: Path | None,
    target: str | None,
    device: str | None,
    plot: Path | None,
    overwrite: bool,
    no_cache: bool,
    as_json: bool,
) -> int:
    """Measure what cutting each channel group does; `edgepress inspect --sensitivity`."""
    from edgepress.pipeline import report
    from edgepress.pipeline.output import write_file
    from edgepress.pipeline.prepare import UsageError
    from edgepress.pipeline.sensitivity import inspect_sensitivity
    from edgepress.pipeline.sensitivity_plot import check_plot, plot_sensitivity
    from edgepress.pipeline.sensitivity_table import show_sensitivity
    from edgepress.targets.load import load_target

    if calib is None:
        raise UsageError(
            "--sensitivity compares outputs on samples; give some with --calib DATA.npz."
        )
    if device is not None and target is None:
        raise UsageError("-d says where to measure; say with -t what board to compile for.")
    if plot is not None:
        check_plot(plot, overwrite=overwrite)
    found = inspect_sensitivity(
        path,
        calib=calib,
        input_shapes=input_shapes,
        target=None if target is None else load_target(target),
        device=device,
        cache=_cache(no_cache),
        progress=Progress(),
    )
    if plot is not None:
        write_file(plot, plot_sensitivity(found, path.stem, plot.suffix), overwrite=overwrite)
    if as_json:
        print_json({**found.to_json(), "plot": None if plot is None else str(plot)})
    else:
        show_sensitivity(found, report.console())
    return 0


def _target(name: str | None, device: str | None) -> Target:
    """Load the board that was named, or else what `devices.toml` says that the device is."""
    from edgepress.pipeline.prepare import UsageError
    from edgepress.targets.devices.base import find_device
    from edgepress.targets.load import load_target

    if name is None and device is not None:
        name = find_device(device).target
    if not name:
        raise UsageError(
            "say with -t what board to compile for, or with -d a board whose target is in "
            "devices.toml; `edgepress targets` lists them all."
        )
    return load_target(name)


def _cache(no_cache: bool) -> Cache | None:
    return None if no_cache else Cache(cache_folder())
