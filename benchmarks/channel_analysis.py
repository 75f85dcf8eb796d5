"""Time the analysis and the ranking of a net of 100 channel groups and 400 nodes.

python benchmarks/channel_analysis.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgepress.passes._channel_axes import Axes, Group
from edgepress.passes._channel_choice import candidates, ranked_macs
from edgepress.passes._channels import analyse
from edgepress.passes._macs import macs_after
from edgepress.passes.base import refresh_shapes

BLOCKS, WIDTH, WIDE, VECTOR = 66, 64, 256, 16


def network() -> ir.Model:
    """Build inverted residual blocks: each has a group, and every second starts a residual one."""
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def node(operator: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{operator}_{len(nodes)}"
        nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def conv(x: str, i: int, o: int, size: int = 1, group: int = 1) -> str:
        array = np.zeros((o, i // group, size, size), np.float32)
        weights.append(numpy_helper.from_array(array, f"w{len(weights)}"))
        return node("Conv", [x, weights[-1].name], group=group, pads=[size // 2] * 4)

    x = conv("x", 3, WIDTH, 3)
    for block in range(BLOCKS):
        y = node("Relu", [conv(x, WIDTH, WIDE)])
        y = node("Relu", [conv(y, WIDE, WIDE, 3, group=WIDE)])
        y = conv(y, WIDE, WIDTH)
        x = node("Relu", [node("Add", [x, y]) if block % 2 else y])
    x = node("Flatten", [node("GlobalAveragePool", [x])])
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)],
        weights,
    )
    opset = helper.make_opsetid("", 17)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[opset], ir_version=8))
    refresh_shapes(model, "benchmark")
    return model


def measure(work: Callable[[], object], runs: int) -> str:
    """Run it once to warm up, then `runs` times; return the median and the range."""
    work()
    times_ms = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times_ms.append(1000 * (time.perf_counter() - start))
    return f"{statistics.median(times_ms):.2f} ms ({min(times_ms):.2f}–{max(times_ms):.2f})"


def analysed(model: ir.Model) -> tuple[Axes, list[Group]]:
    """Analyse to the end: channels, frozen ones and parts are computed when first asked for."""
    axes = analyse(model)
    assert axes.parts
    return axes, axes.groups()


@click.command(help="Time the analysis and the ranking of a net of 100 channel groups.")
@click.option("--runs", default=15, show_default=True, type=click.IntRange(min=1))
def main(runs: int) -> None:
    """Print the figures."""
    model = network()
    axes, groups = analysed(model)
    groups = [group for group in groups if len(group.free)]
    cuts = np.concatenate([group.free[: len(group.free) // 3] for group in groups])
    count = macs_after(model, axes)
    scores = [np.random.default_rng(0).random(len(group.channels)) for group in groups]

    def rank() -> None:
        ranked_macs(candidates(groups, scores, axes.parts, VECTOR, 1), 0.5, count)

    channels = sum(len(group.channels) for group in groups)
    click.echo(f"{len(list(model.graph))} nodes, {len(groups)} free groups, {channels} channels")
    click.echo(f"median (range) of {runs} runs, after one to warm up")
    click.echo(f"analysis         {measure(lambda: analysed(model), runs)}")
    click.echo(f"MACs after a cut {measure(lambda: count(cuts), runs)}")
    click.echo(f"ranking by MACs  {measure(rank, runs)}")


if __name__ == "__main__":
    main()
