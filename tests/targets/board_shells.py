"""Shells of boards for tests: with a bare dash or busybox, and with links and power that fail."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgepress.targets.base import LinkBroken
from edgepress.targets.remote.board_scripts import TOOLS
from edgepress.targets.remote.shell import Shell
from tests.targets.tiny import need


@dataclass(frozen=True)
class BareShell:
    """A shell that has nothing but a few commands.

    Attributes:
        shell: words that start it.
        commands: folder with its commands.
        home: value of HOME, or None: not set.
        functions: commands that are something else, as bodies of shell functions.
        name: of the device.
    """

    shell: tuple[str, ...]
    commands: Path
    home: Path | None = None
    functions: Mapping[str, str] = field(default_factory=lambda: {"sync": ":"})
    name: str = "board"

    def words(self, script: str, arguments: Sequence[str]) -> list[str]:
        home = [] if self.home is None else [f"HOME={self.home}"]
        clean = ["env", "-i", f"PATH={self.commands}", *home]
        functions = "\n".join(f"{name}() {{\n{body}\n}}" for name, body in self.functions.items())
        script = f"{functions}\n{script}"
        return [*clean, *self.shell, "-c", script, "edgepress", *arguments]

    def check(self, result: subprocess.CompletedProcess[bytes]) -> None:
        """Nothing is between this machine and the board."""

    def having(self, **functions: str) -> BareShell:
        """The same board, where some commands are something else."""
        return replace(self, functions={**self.functions, **functions})


def bare_shell(kind: str, folder: Path, tools: str = TOOLS) -> BareShell:
    """A `dash` with this machine's commands, or `busybox` with its own; only those of `tools`."""
    commands = folder / f"{kind}-commands"
    commands.mkdir()
    need(kind, {"busybox": "busybox-static"}.get(kind, kind))
    program = Path(shutil.which(kind) or "")
    for tool in tools.split():
        here = program if kind == "busybox" else Path(shutil.which(tool) or "")
        (commands / tool).symlink_to(here)
    words = (str(program), "sh") if kind == "busybox" else (str(program),)
    return BareShell(words, commands)


@dataclass
class FaultyShell:
    """A shell whose link breaks at chosen scripts; what keeps the lock goes down with it.

    Attributes:
        inner: the shell behind it.
        faults: per number of a script what happens to it: `before` it starts, `after` it ended,
            or, where it is a number, what it reads ends after so many bytes; `flip`: the first
            byte that it reads arrives as another one.
        count: how many scripts were started.
    """

    inner: Shell
    faults: dict[int, str | int] = field(default_factory=dict)
    count: int = 0
    name: str = "board"

    def words(self, script: str, arguments: Sequence[str]) -> list[str]:
        words = self.inner.words(script, arguments)
        if _keeps_lock(script):
            return words
        self.count += 1
        fault = self.faults.get(self.count)
        if fault == "before":
            return ["sh", "-c", "exit 255"]
        if fault == "flip":
            flip = "{ dd bs=1 count=1 2>/dev/null | tr '\\000-\\377' '\\001-\\377\\000'; cat; }"
            return ["sh", "-c", f'{flip} | "$@"', "sh", *words]
        if isinstance(fault, int):
            return ["sh", "-c", f'head -c {fault} | "$@"; exit 255', "sh", *words]
        if fault == "after":
            return ["sh", "-c", '"$@"; exit 255', "sh", *words]
        return words

    def check(self, result: subprocess.CompletedProcess[bytes]) -> None:
        if result.returncode == 255:
            raise LinkBroken(f"{self.name}: the link broke")
        self.inner.check(result)


def _keeps_lock(script: str) -> bool:
    return "trap release EXIT" in script


class MortalShell:
    """A board that loses power as a chosen command is started; nothing runs on it afterwards.

    Attributes:
        inner: the shell behind it, whose commands count.
        name: of the device.
    """

    name = "board"

    def __init__(self, inner: BareShell, folder: Path) -> None:
        self._left, self._groups = folder / "left", folder / "groups"
        count = f"""read -r left <{self._left}
if [ "$left" = 0 ]; then
    while read -r group; do kill -9 "-$group"; done 2>/dev/null <{self._groups}
fi
echo $((left - 1)) >{self._left}
"""
        tools = [tool for tool in TOOLS.split() if tool != "dd"]  # it runs beside `head`
        self.inner = inner.having(**{tool: f'{count}command {tool} "$@"' for tool in tools})
        self.power_on(10**6)

    def power_on(self, commands: int) -> None:
        """Start the board; it goes down after so many commands."""
        self._left.write_text(f"{commands}\n")
        self._groups.write_text("")

    @property
    def is_off(self) -> bool:
        """Whether it went down."""
        return self._left.read_text() == "0\n"

    def words(self, script: str, arguments: Sequence[str]) -> list[str]:
        if self.is_off:
            return ["sh", "-c", "exit 255"]
        start = f'echo $$ >>{self._groups}; exec "$@"'
        return ["setsid", "sh", "-c", start, "sh", *self.inner.words(script, arguments)]

    def check(self, result: subprocess.CompletedProcess[bytes]) -> None:  # noqa: ARG002
        if self.is_off:
            raise LinkBroken(f"{self.name}: the link broke")


def new_boot(root: Path) -> None:
    """Let what holds the lock belong to an earlier start of the board."""
    holder = root / ".edgepress" / "lock" / "holder"
    if holder.is_file():
        lines = holder.read_text().splitlines()
        lines[1] = "another boot"
        holder.write_text("\n".join(lines) + "\n")


def time_passes(root: Path) -> None:
    """Let the last beat of whoever holds the lock be long ago."""
    beat = root / ".edgepress" / "lock" / "beat"
    if beat.is_file():
        beat.write_text("-1000\n")
