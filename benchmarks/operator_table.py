"""docs/operators.md: what edgepress makes of each ONNX operator, from the node tests."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import onnx

from edgepress.targets.lowering.operators import REFUSED
from edgepress.targets.program import DTYPES
from tests.targets.conformance import NodeTest

_HEAD = """# ONNX operators

What edgepress makes of each operator of ONNX, measured: the onnx package's own node tests
(onnx {version}) lowered, compiled for `{target}`, run, and compared with the answers that come with
them. `python -m benchmarks.operator_conformance --write` writes this page.

| node tests | right | refused by name | wrong | crashed |
|---|---|---|---|---|
| {total} | {right} | {refused} | {wrong} | {crashed} |

Selected is every node test of the default domain whose tensors are dense and of fixed shape, and
which holds no subgraph, with elements of type
{dtypes}. The first float32 input stays an input; the others
become constants, as weights, axes and shapes are in real models. With `--variant live` every
float32 input stays one; with `--variant inside` the node stands between others.

"As defined" counts the tests that hold onnx's definition of the operator by simpler ones in its
place. What is not listed is refused.

| operator | opsets | right | as defined | refused, and why |
|---|---|---|---|---|
"""


def table(
    cases: Mapping[str, NodeTest], results: Mapping[str, tuple[str, str]], target: str
) -> str:
    """Write the page."""
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


def _rows(cases: Mapping[str, NodeTest], results: Mapping[str, tuple[str, str]]) -> list[str]:
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
            ", ".join(map(str, opsets)),
            _share(plain[operator], results),
            _share(defined[operator], results),
            whys.replace("|", "\\|").replace("\n", " "),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _subject(case: NodeTest) -> tuple[str, bool]:
    """The operator that a test is about, and whether the test holds its definition instead."""
    texts = [
        text
        for node in case.model.graph.node
        for text in (*node.input, *node.output)
        if "_function_" in text
    ]
    if texts:
        return texts[0].partition("_")[0], True
    return next((o for o in case.operators if o != "Constant"), "Constant"), False


def _share(names: list[str], results: Mapping[str, tuple[str, str]]) -> str:
    right = sum(results[name][0] == "right" for name in names)
    return f"{right} of {len(names)}" if names else ""
