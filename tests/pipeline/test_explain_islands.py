"""Float islands: which layers, why, and the conversions around them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgepress.passes.base import refresh_shapes
from edgepress.pipeline._explain_islands import Island, find_islands
from edgepress.pipeline._explain_rows import Row, find_rows
from edgepress.pipeline.bundle import Bundle
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from tests.graphs import net, random
from tests.pipeline.bundles import manifest

PAIR = "{0}_q = QuantizeLinear({1}, s, z) {0} = DequantizeLinear({0}_q, s, z)"


def model() -> ir.Model:
    """Integers, then a Sin and a product in float, integers, and a Sin in float again."""
    return net(
        "(float[1,64] x) => (float[1,64] y)",
        f"""{PAIR.format("a", "x")}
            wd = DequantizeLinear(w, s)
            g = MatMul(a, wd)
            {PAIR.format("b", "g")}
            t = Sin(b)
            u = MatMul(t, wf)
            {PAIR.format("c", "u")}
            h = MatMul(c, wd)
            {PAIR.format("d", "h")}
            y = Sin(d)""",
        {
            "w": np.clip(random(64, 64) * 20, -127, 127).astype(np.int8),
            "wf": random(64, 64) / 8,
            "s": np.array(0.05, np.float32),
            "z": np.array(120, np.uint8),
        },
    )


def found(skipped: list[tuple[str, str]]) -> tuple[list[Island], list[Row]]:
    graph = model()
    refresh_shapes(graph, "test")
    program = lower(graph, load_target("x86-64-v3"))
    rows = find_rows(program, graph)
    steps = [{"pass_name": "quantize-int8", "skipped": skipped, "options": {}}]
    bundle = Bundle(
        folder=Path(), manifest=dataclasses.replace(manifest(), steps=steps), manifest_bytes=b""
    )
    return find_islands(rows, program, graph, bundle), rows


def test_what_passes_floats_on_is_one_island() -> None:
    islands, rows = found([])
    assert [[rows[index].nodes for index in island.rows] for island in islands] == [
        [["Sin_6"], ["MatMul_7"]],
        [["Sin_13"]],
    ]
    around = [[(rows[i].operator, rows[i].name) for i in island.around] for island in islands]
    assert around == [[("Dequantize", "g"), ("Quantize", "u")], [("Dequantize", "h")]]
    assert [island.conversions for island in islands] == [2, 1]


def test_the_pass_says_why_or_else_the_graph_does() -> None:
    islands, _ = found([("Sin_6", "it has no 8-bit form")])
    assert islands[0].why == "it has no 8-bit form"
    assert "nothing quantizes" in islands[1].why


def test_shares_are_those_of_the_members() -> None:
    islands, rows = found([])

    @dataclasses.dataclass(frozen=True)
    class Costed:
        cost_share: float | None

    layers = [Costed(2.0**-index) for index in range(len(rows))]
    for island in (one.with_shares(layers) for one in islands):
        assert island.cost_share == sum(2.0**-index for index in island.rows)
        assert island.conversion_share == sum(2.0**-index for index in island.around)
    unknown = islands[0].with_shares([Costed(None)] * len(rows))
    assert (unknown.cost_share, unknown.conversion_share) == (None, None)
