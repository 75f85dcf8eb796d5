"""Options that choose nodes by regular expressions; each has to match a node's whole name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from edgepress.passes.base import PassRefused


def demand_regular_expressions(pass_name: str, option: str, patterns: Iterable[str]) -> None:
    """Refuse a pattern that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            why = f"not a regular expression: {error}."
            raise PassRefused(pass_name, f"{option} {pattern!r}", why) from error


def demand_match(
    pass_name: str,
    option: str,
    pattern: str,
    names: Iterable[str],
    *,
    what: str = "layer",
    hint: str = "`edgepress inspect` lists the names.",
) -> list[str]:
    """Return the names that a pattern matches as a whole; refuse one that matches none.

    Args:
        pass_name: for the refusal.
        option: the pass's option that holds the pattern.
        pattern: a regular expression.
        names: all that it may match.
        what: what has these names.
        hint: where the user finds them.
    """
    names = list(names)
    matched = [name for name in names if re.fullmatch(pattern, name)]
    if not matched:
        near = difflib.get_close_matches(pattern, names, 3, 0.4)
        like = f" Near it: {', '.join(near)}." if near else ""
        why = f"it matches no {what}'s whole name.{like} {hint}"
        raise PassRefused(pass_name, f"{option} {pattern!r}", why)
    return matched


def chosen_nodes(
    pass_name: str,
    option: str,
    patterns: Iterable[str],
    nodes: Sequence[ir.Node],
    what: str = "node",
) -> dict[ir.Node, str]:
    """Return the nodes that an option names, each with the pattern that does.

    Args:
        pass_name: for refusals.
        option: the pass's option that holds the patterns.
        patterns: regular expressions, each of which must match a node's whole name.
        nodes: all that they may match.
        what: what these nodes are, for refusals.
    """
    patterns = list(patterns)
    demand_regular_expressions(pass_name, option, patterns)
    names = [node.name or "" for node in nodes]
    found: dict[ir.Node, str] = {}
    for pattern in patterns:
        matched = set(demand_match(pass_name, option, pattern, names, what=what))
        found |= {node: pattern for node in nodes if (node.name or "") in matched}
    return found
