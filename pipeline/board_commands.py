"""What the commands for boards do: deploy and verify, on one device or on many at once.

Every function prints tables, or one JSON document with `as_json`, and returns an exit code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgepress.pipeline.commands import DEVICE, GATE
from edgepress.pipeline.json_document import print_json
from edgepress.pipeline.progress import Progress

if TYPE_CHECKING:
    from edgepress.pipeline.bundle import Bundle
    from edgepress.pipeline.deploy import Deployment
    from edgepress.pipeline.fleet import Outcome


def verify(
    folder: Path,
    *,
    device: Sequence[str],
    everything: bool,
    evaluation: Path | None,
    model: Path | None,
    max_latency_ms: float | None,
    threads: int | None,
    cores: str | None,
    sustained_minutes: float | None,
    mlperf: bool,
    anyway: bool,
    html: Path | None,
    as_json: bool,
) -> int:
    """Close a bundle's gates on devices and keep the evidence in it; `edgepress verify`."""
    from edgepress.pipeline import report
    from edgepress.pipeline.bundle import read_bundle
    from edgepress.pipeline.evidence import fleet_evidence
    from edgepress.pipeline.fleet import chosen_devices, failed, raise_bug
    from edgepress.pipeline.fleet_progress import FleetProgress
    from edgepress.pipeline.html_report import html_report
    from edgepress.pipeline.latency import Measuring
    from edgepress.pipeline.output import refuse_existing, write_file
    from edgepress.pipeline.verify import verify_fleet, verify_folder

    if html is not None:
        refuse_existing(html, overwrite=False)
    devices = chosen_devices(device, everything=everything)
    bundle = read_bundle(folder)
    asked: dict[str, Any] = {
        "evaluation": evaluation,
        "original": model,
        "max_latency_ms": max_latency_ms,
        "measuring": Measuring(
            threads=threads,
            cores=cores,
            sustained_minutes=sustained_minutes,
            mlperf=mlperf,
            anyway=anyway,
        ),
    }
    outcomes: list[Outcome[Any]] = []
    if len(devices) < 2:
        only = devices[0] if devices else None
        evidence = verify_folder(bundle, only, **asked, progress=Progress()).to_json()
    else:
        outcomes = verify_fleet(bundle, devices, **asked, progress=FleetProgress())
        evidence = fleet_evidence(outcomes)
    bundle = _keep(bundle, evidence)
    if html is not None:
        write_file(html, html_report(bundle, evidence).encode())
    if as_json:
        print_json({"bundle": str(folder), **evidence})
    else:
        report.show_bundle(bundle, evidence, report.console())
    raise_bug(outcomes)
    if failed(outcomes):
        return DEVICE
    return 0 if evidence["passed"] else GATE


def _keep(bundle: Bundle, evidence: dict[str, Any]) -> Bundle:
    """Write evidence into the bundle; one on a read-only disk can be verified too."""
    from edgepress.pipeline.bundle import write_evidence
    from edgepress.pipeline.output import OutputError

    if "device" not in evidence:  # no board answered
        return bundle
    try:
        return write_evidence(bundle, evidence)
    except OutputError as error:
        Progress().note(f"the evidence is not kept in the bundle: {error}")
        return bundle


def deploy(
    folder: Path,
    *,
    device: Sequence[str],
    everything: bool,
    to: str | None,
    back: bool,
    trusted_keys: Sequence[Path],
    as_json: bool,
) -> int:
    """Install a bundle on devices, or go back to the one before; `edgepress deploy`."""
    from edgepress.pipeline import deploy as deployment
    from edgepress.pipeline.bundle import read_bundle
    from edgepress.pipeline.fleet import chosen_devices, failed, on_devices, raise_bug
    from edgepress.pipeline.fleet_progress import FleetProgress
    from edgepress.pipeline.prepare import UsageError
    from edgepress.pipeline.signing import require_signature

    if back and trusted_keys:
        raise UsageError(
            "--rollback goes back to what is on the board, whose signature is not known there; "
            "leave --require-signature out, or deploy the older bundle."
        )
    devices = chosen_devices(device, everything=everything)
    bundle = read_bundle(folder)
    if trusted_keys:
        require_signature(bundle, trusted_keys)  # once, and not as a failure of every board

    def install(name: str | None, progress: Progress) -> Deployment:
        if back:
            return deployment.rollback(bundle, name, destination=to, progress=progress)
        return deployment.deploy(
            bundle, name, destination=to, trusted_keys=trusted_keys, progress=progress
        )

    if len(devices) < 2:
        done = install(devices[0] if devices else None, Progress())
        if as_json:
            print_json(dataclasses.asdict(done))
        else:
            print(_sentence(done))
        return 0
    outcomes = on_devices(
        devices, install, progress=FleetProgress(), verdict=lambda _done: "installed"
    )
    _show(outcomes, as_json=as_json)
    raise_bug(outcomes)
    return DEVICE if failed(outcomes) else 0


def _sentence(done: Deployment) -> str:
    sent = f"{done.sent_bytes / 1e3:.0f} of {done.size_bytes / 1e3:.0f} kB sent"
    before = f", before it {done.previous}" if done.previous else ""
    tried = f"{done.golden_samples} golden samples right there"
    return f"{done.folder} on {done.device}: version {done.version}{before}, {sent}, {tried}"


def _show(outcomes: Sequence[Outcome[Deployment]], *, as_json: bool) -> None:
    """Print what became of each board."""
    from rich.table import Table
    from rich.text import Text

    from edgepress.pipeline import report
    from edgepress.pipeline.printable import one_line

    if as_json:
        rows = [
            {
                "device": outcome.device,
                "error": None if outcome.error is None else str(outcome.error),
                **({} if outcome.value is None else dataclasses.asdict(outcome.value)),
            }
            for outcome in outcomes
        ]
        print_json({"boards": rows})
        return
    table = Table()
    for heading in ("board", "", "version", "before", "sent kB", "where, or why not"):
        justify: Literal["left", "right"] = "right" if heading == "sent kB" else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for outcome in outcomes:
        done = outcome.value
        if done is None:
            why = one_line(str(outcome.error))
            table.add_row(Text(outcome.device), Text("failed", style="red"), "", "", "", Text(why))
        else:
            table.add_row(
                Text(outcome.device),
                Text("installed", style="green"),
                done.version,
                done.previous or "",
                f"{done.sent_bytes / 1e3:.0f}",
                Text(done.folder),
            )
    report.console().print(table)


def devices(names: Sequence[str], *, as_json: bool) -> int:
    """Look at devices; `edgepress devices`."""
    from edgepress.pipeline import device_table

    return device_table.devices(names, as_json=as_json)
