"""Write the reference pages out of the code: `make docs`. A test fails while one is stale."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import click

from edgepress.calibration.base import calibrator_class, calibrator_names
from edgepress.calibration.importance.base import importance, importance_names
from edgepress.passes.base import Pass, pass_class, pass_names
from edgepress.pipeline.cli import cli
from edgepress.targets.load import target_names

NOTE = "<!-- Written by `make docs` out of the code; edit the docstrings or the TOML files. -->\n"


def passes_page() -> str:
    """Every pass with its options, then every calibration method and channel importance."""
    parts = [
        NOTE,
        "# Passes\n",
        "A recipe lists passes by these names; the keys of a `[[pass]]` table are its options.\n",
    ]
    for name in pass_names():
        chosen = pass_class(name)
        text = _split(chosen)[0]
        # options of a base class, such as those of all passes that train, come last
        families = [base for base in chosen.__mro__ if issubclass(base, Pass)]
        options = {k: v for base in families for k, v in _split(base)[1].items()}
        parts += [f"## {name}\n", text]
        facts = ["It computes the same up to rounding."] if chosen.lossless else []
        facts += ["It needs calibration samples."] if chosen().needs_samples else []
        facts += ["It needs training samples with labels."] if chosen().needs_training else []
        parts += [" ".join(facts) + "\n"] if facts else []
        known = {field.name: field for field in dataclasses.fields(chosen)}
        fields = [known[option] for option in options if option in known]
        if fields:
            rows = [
                (f"`{f.name}`", f"`{f.type}`", f"`{_toml(f.default)}`", options[f.name])
                for f in fields
            ]
            parts.append(_table(("option", "type", "default", "meaning"), rows))
    parts.append("# Calibration methods\n")
    for name in calibrator_names():
        parts += [f"## {name}\n", _split(calibrator_class(name))[0]]
    parts.append("# Channel importances\n")
    parts.append("How much a channel matters; the channel with the least score is cut first.\n")
    for name in importance_names():
        made = importance(name)
        sampled = made.needs - {"gammas"}
        fact = "It needs calibration samples.\n" if sampled else "It needs no samples.\n"
        parts += [f"## {name}\n", _split(type(made))[0], fact]
    return "\n".join(parts)


def targets_page() -> str:
    """One row per board; a board that depends on the host has one row per candidate."""
    rows = []
    for name in target_names():
        file = resources.files("edgepress.targets.boards") / f"{name}.toml"
        board = tomllib.loads(file.read_text(encoding="utf-8"))
        for candidate in board.get("candidate", [board]):
            cpu = " ".join([candidate["cpu"], *candidate.get("features", [])])
            flags = " ".join(candidate.get("cpu_flags", []))
            emulator = candidate.get("emulator", "")
            kernels = " ".join([candidate["isa"], *filter(None, [candidate.get("gpu_arch")])])
            rows.append(
                (f"`{name}`", board["description"], f"`{candidate['triple']}`", f"`{cpu}`",
                 f"`{kernels}`", flags, f"`{candidate['compiler']}`",
                 f"`{emulator} -cpu {candidate['emulator_cpu']}`" if emulator else "")
            )  # fmt: skip
    head = ("target", "what", "triple", "LLVM cpu", "kernels", "the CPU must have", "C compiler",
            "emulator")  # fmt: skip
    return "\n".join(
        [
            NOTE,
            "# Targets\n",
            "`-t TARGET` takes these names. `native` is the first of its rows that the host "
            "fits. [Adding a board](adding_a_board.md) is one TOML file.\n",
            _table(head, rows),
        ]
    )


def cli_page() -> str:
    """Every command with its arguments and options."""
    parts = [NOTE, "# Command line\n"]
    for name, command in sorted(cli.commands.items()):
        words = [_argument(p) for p in command.params if isinstance(p, click.Argument)]
        parts.append(f"## edgepress {' '.join([name, *words])}\n")
        text = inspect.cleandoc(command.help or "").replace("\b\n", "")
        parts.append(re.sub(r"^Example:\n  (.*)$", r"    \1", text, flags=re.MULTILINE) + "\n")
        options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
        if options:
            rows = [(", ".join(f"`{o}`" for o in p.opts), _meaning(p)) for p in options]
            parts.append(_table(("option", "meaning"), rows))
    return "\n".join(parts)


PAGES = {"passes.md": passes_page, "targets.md": targets_page, "cli.md": cli_page}


def _split(documented: type) -> tuple[str, dict[str, str]]:
    """Docstring up to its example and without sections, and what the section on options says."""
    text = (inspect.getdoc(documented) or "") + "\n"
    section = r"^(Attributes|Options|Args|Raises):\n((?: {4}.*\n|\n(?= {4}))+)"
    entries: dict[str, str] = {}
    for title, body in re.findall(section, text, re.MULTILINE):
        if title in ("Attributes", "Options"):
            found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", body, re.MULTILINE)
            entries |= {name: " ".join(words.split()) for name, words in found}
    rest = re.sub(section, "", text, flags=re.MULTILINE).partition(">>> ")[0]
    return re.sub(r"\n{3,}", "\n\n", rest).strip() + "\n", entries


def _toml(value: Any) -> str:
    """A default as a recipe would write it."""
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return "unset" if value is None or value is dataclasses.MISSING else str(value)


def _argument(parameter: click.Argument) -> str:
    word = parameter.metavar or (parameter.name or "").upper()
    return word if parameter.required else f"[{word}]"


def _meaning(option: click.Option) -> str:
    """The help, then what click knows of the value."""
    words = [option.help or ""]
    if isinstance(option.type, click.Choice):
        words.append(f"One of: {', '.join(option.type.choices)}.")
    if option.show_default:
        words.append(f"Default: {option.default}.")
    return " ".join([*words, *(["Required."] if option.required else [])]).strip()


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"


def main() -> int:
    """Write every page that is stale."""
    for name, page in PAGES.items():
        path = Path(__file__).parent / name
        text = page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
