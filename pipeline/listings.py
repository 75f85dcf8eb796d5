"""What there is: passes, targets, and the state of this machine."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgepress.pipeline.json_document import print_json


def passes(*, as_json: bool) -> int:
    """List every pass with its options; those that run on every model first."""
    from edgepress.passes.base import pass_class, pass_names
    from edgepress.pipeline.driver import CANONICAL

    rows: list[dict[str, Any]] = []
    for name in [*CANONICAL, *(n for n in pass_names() if n not in CANONICAL)]:
        cls = pass_class(name)
        options = {
            field.name: {
                "type": str(field.type),
                "default": None if field.default is dataclasses.MISSING else field.default,
            }
            for field in dataclasses.fields(cls)
        }
        summary = (cls.__doc__ or "").partition("\n")[0]
        always = name in CANONICAL
        rows.append({"name": name, "summary": summary, "always": always, "options": options})
    if as_json:
        print_json({"passes": rows})
        return 0
    table = _table("pass", "what it does", "options")
    for row in rows:
        listed = [f"{key} = {option['default']!r}" for key, option in row["options"].items()]
        kind = "always" if row["always"] else "\n".join(listed)
        table.add_row(row["name"], Text(row["summary"]), Text(kind))
    Console().print(table)
    return 0


def targets(*, as_json: bool) -> int:
    """List every target; one that does not fit this machine (`native`) says why."""
    from edgepress.targets.base import TargetError
    from edgepress.targets.load import load_target, target_names

    rows: list[dict[str, Any]] = []
    for name in target_names():
        try:
            rows.append(dataclasses.asdict(load_target(name)))
        except TargetError as error:
            rows.append({"name": name, "description": str(error), "cpu": None, "isa": None})
    if as_json:
        print_json({"targets": rows})
        return 0
    table = _table("target", "cpu", "instructions", "what it is")
    for row in rows:
        instructions = " ".join(filter(None, (row["isa"], row.get("gpu_arch"))))
        table.add_row(row["name"], row["cpu"], instructions, Text(row["description"]))
    Console().print(table)
    return 0


def doctor(*, as_json: bool) -> int:
    """Check this machine. Exit code 0 where what every build needs is there, else 4."""
    from edgepress.pipeline.doctor import examine

    findings = examine()
    if as_json:
        print_json({"checks": [dataclasses.asdict(finding) for finding in findings]})
    else:
        table = _table("", "what", "found", "what to do")
        for finding in findings:
            mark = "ok" if finding.ok else "needed" if finding.needed else "missing"
            style = "green" if finding.ok else "red" if finding.needed else "yellow"
            fix = "" if finding.ok else finding.fix
            table.add_row(Text(mark, style=style), finding.what, Text(finding.found), Text(fix))
        Console().print(table)
    return 0 if all(finding.ok or not finding.needed for finding in findings) else 4


def _table(*headings: str) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading)
    return table
