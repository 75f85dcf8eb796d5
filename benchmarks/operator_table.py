"""docs/operators.md: what edgepress makes of each ONNX operator, from the node tests."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import onnx

from edgepress.targets.lowering.operators import REFUSED
from tests.targets.conformance import NodeTest

_HEAD = """# ONNX operators

What edgepress makes of each operator of ONNX, measured: the onnx package's own node tests
(onnx {version}), compiled for `{target}`, run, and compared with the answers that come with them.
`python -m benchmarks.operator_conformance --write` writes this page.

Of the {total} node tests of the default domain whose tensors are dense, of fixed shape and of type
{dtypes}, and which hold no subgraph, **{right} are right**, {refused} are refused by name when the
model is compiled, {wrong} are wrong, and {crashed} crash. All inputs but the first of type float32
are constants in these models, as weights, axes and shapes are in real ones.

A test counts for the operators it is made of when it tests one operator, and for its operator's
definition by simpler ones ("as defined") when the test is that definition. Everything that is not
listed is refused.

| operator | opsets | right | as defined | refused, and why |
|---|---|---|---|---|
"""


def table(
    cases: Mapping[str, NodeTest], results: Mapping[str, tuple[str, str]], target: str
) -> str:
    """Write the page."""
    from edgepress.targets.program import DTYPES

    count = Counter(status for status, _ in results.values())
    head = _HEAD.format(
        version=onnx.__version__,
        target=target,
        total=len(cases),
        dtypes=", ".join(DTYPES),
        right=count["right"],
        refused=count["refused"],
        wrong=count["wrong"],
        crashed=count["crashed"],
    )
    return head + "".join(f"{row}\n" for row in _rows(cases, results))


def _rows(
    cases: Mapping[str, NodeTest], results: Mapping[str, tuple[str, str]]
) -> list[str]:
    """One row per operator, by name."""
    plain: dict[str, list[str]] = defaultdict(list)
    defined: dict[str, list[str]] = defaultdict(list)
    for name, case in cases.items():
        operator, is_definition = _subject(case)
        (defined if is_definition else plain)[operator].append(name)
    rows = []
    for operator in sorted({*plain, *defined, *REFUSED}):
        opsets = sorted({cases[name].opset for name in plain[operator]})
        reasons = Counter(
            why for status, why in (results[n] for n in plain[operator]) if status == "refused"
        )
        whys = "; ".join(f"{why} ({n})" for why, n in reasons.items())
        whys = whys or (REFUSED.get(operator, "") if not plain[operator] else "")
        cells = [
            operator,
            _span(opsets),
            _share(plain[operator], results),
            _share(defined[operator], results),
            whys.replace("|", "\\|").replace("\n", " "),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _subject(case: NodeTest) -> tuple[str, bool]:
    """The operator that a test is about, and whether the test holds its definition instead."""
    if "_expanded" not in case.name:
        return max(case.operators, key=lambda o: o != "Constant"), False
    name = case.model.graph.node[0].name or case.name
    prefix = case.model.graph.node[-1].output[0]
    for node in case.model.graph.node:
        for text in (*node.input, *node.output, node.name):
            if "_function_" in text:
                return text.split("_", 1)[0], True
    return name or prefix, True


def _share(names: list[str], results: Mapping[str, tuple[str, str]]) -> str:
    right = sum(results[name][0] == "right" for name in names)
    return f"{right} of {len(names)}" if names else ""


def _span(opsets: list[int]) -> str:
    return ", ".join(map(str, opsets))
