"""`edgepress devices`: devices as a table on the terminal, or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from edgepress.pipeline.commands import DEVICE
from edgepress.pipeline.device_rows import DeviceRow, examine
from edgepress.pipeline.fleet_progress import FleetProgress
from edgepress.pipeline.json_document import print_json
from edgepress.pipeline.printable import one_line
from edgepress.pipeline.report import console
from edgepress.targets.base import TargetError
from edgepress.targets.load import load_target
from edgepress.targets.remote.board_probe import BoardFacts, Core

_STYLES = {"stops": "red", "spoils": "yellow", "note": "cyan"}
_LABELS = {"stops": "stops", "spoils": "spoils times", "note": "note"}


def devices(names: Sequence[str] = (), *, as_json: bool) -> int:
    """List devices: what each is, what it runs, what would stop a bundle or spoil a measurement.

    Args:
        names: devices; none: local, qemu and every board of `devices.toml`.
        as_json: print one JSON document instead of a table.

    Returns:
        An exit code: 5 where a device that was named is not reached or cannot run its target.

    Raises:
        DeviceFailed: a name is of no device.
        InvalidDevices: `devices.toml` breaks a rule.
    """
    rows = examine(names, progress=FleetProgress())
    if as_json:
        print_json({"devices": [row.document() for row in rows]})
    else:
        show_devices(rows, console())
    return DEVICE if names and not all(row.works for row in rows) else 0


def show_devices(rows: Iterable[DeviceRow], screen: Console) -> None:
    """Print a line of the table per device, and below it what there is to mind."""
    rows = list(rows)
    table = Table(show_lines=True)
    for heading in ("device", "board, CPU, libc", "runs"):
        table.add_column(heading, overflow="fold")
    for heading in ("cores", "clock", "memory, disk"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        table.add_row(_name(row), *(Text("\n".join(cell)) for cell in _cells(row)))
    screen.print(table)
    for row in rows:
        lines = list(_remarks(row))
        if lines:
            screen.print(Text(one_line(row.board.name), style="bold"))
        for line in lines:
            screen.print(Padding(line, (0, 0, 0, 2), expand=False))


def _name(row: DeviceRow) -> Text:
    """The device, and how it is reached."""
    name = Text(one_line(row.board.name))
    if row.board.connect != row.board.name:
        name.append(f"\n{one_line(row.board.connect)}", style="dim")
    if row.error:
        name.append("\nunreachable", style="red")
    return name


def _cells(row: DeviceRow) -> list[list[str]]:
    """Lines of every other cell."""
    runs = list(row.targets)
    if row.board.target and not row.error:
        runs = [row.board.target if row.works else f"not {row.board.target}"]
    facts = row.facts
    if facts is None:
        return [[], runs, [], [], []]
    libcs = dict.fromkeys(libc for libc in facts.loaders.values() if libc)
    cells = [
        [facts.board, facts.cpu, ", ".join(libcs)],
        runs,
        _cores(facts),
        _clock(facts),
        [_size(facts.memory_total_bytes, ""), _size(facts.disk_free_bytes, " free")],
    ]
    return [[one_line(line) for line in cell if line] for cell in cells]


def _cores(facts: BoardFacts) -> list[str]:
    """How many there are, and which are the fast ones."""
    lines = [str(len(facts.cores)) if facts.cores else ""]
    kinds = facts.core_kinds
    if len(kinds) > 1:
        names = ["big", *["middle"] * (len(kinds) - 2), "little"]
        lines += [f"{name} {_ranges(kind)}" for name, kind in zip(names, kinds, strict=True)]
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as `--cores` takes them.

    >>> _ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _clock(facts: BoardFacts) -> list[str]:
    """Governors, frequency of the fastest core, temperature."""
    governors = list(dict.fromkeys(core.governor for core in facts.cores if core.governor))
    fastest = max(facts.cores, key=lambda core: core.highest_khz or 0, default=Core(number=0))
    megahertz = [
        "?" if khz is None else f"{khz / 1000:.0f}"
        for khz in (fastest.frequency_khz, fastest.highest_khz)
    ]
    heat = facts.temperature_celsius
    return [
        ", ".join(governors),
        "" if megahertz == ["?", "?"] else f"{'/'.join(megahertz)} MHz",
        "" if heat is None else f"{heat:.0f} °C",
    ]


def _size(size_bytes: int | None, what: str) -> str:
    if size_bytes is None:
        return ""
    if size_bytes < 1e9:
        return f"{size_bytes / 1e6:.0f} MB{what}"
    return f"{size_bytes / 1e9:.1f} GB{what}"


def _remarks(row: DeviceRow) -> Iterable[Text]:
    """What to say about a device below the table."""
    if row.error:
        yield Text(one_line(row.error), style="red")
    for finding in row.findings:
        label = (f"{_LABELS[finding.kind]}: ", _STYLES[finding.kind])
        yield Text.assemble(label, one_line(finding.text))
    if not row.board.target:
        for why in dict.fromkeys(why for name, why in row.refused.items() if _near(row, name)):
            yield Text.assemble(("does not run: ", "cyan"), one_line(why))
    if row.facts is not None and row.facts.deployed:
        bundles = ", ".join(f"{k} ({v[-16:]})" for k, v in row.facts.deployed.items())
        yield Text.assemble(("installed: ", "cyan"), one_line(bundles))


def _near(row: DeviceRow, name: str) -> bool:
    """Whether a user may have expected that a device runs this target."""
    try:
        target = load_target(name)
    except TargetError:
        return row.board.connect == "local"
    if row.facts is None:
        return bool(target.emulator)
    return bool(row.targets) and target.architecture == row.facts.machine
