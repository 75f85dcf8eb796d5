"""The table of sensitivities: figures, units, and what it says about what is missing."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from edgepress.pipeline.sensitivity import Sensitivity
from edgepress.pipeline.sensitivity_table import show_sensitivity
from tests.pipeline.sensitivities import measured, of_cuts


def printed(found: Sensitivity, width: int = 120) -> str:
    screen = Console(width=width, file=io.StringIO(), record=True)
    show_sensitivity(found, screen)
    return screen.export_text()


def cells(text: str) -> list[list[str]]:
    """The table's lines as lists of cells, without the heading."""
    lines = (line for line in text.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_a_line_per_cut_has_its_figures() -> None:
    group = of_cuts("/head/[1]/Conv", (20.04, 2.0), (3.0, -0.123456))
    group = dataclasses.replace(
        group, cuts=[dataclasses.replace(group.cuts[0], agreement=98.44), group.cuts[1]]
    )
    text = printed(measured(group))
    assert cells(text) == [
        ["/head/[1]/Conv", "4 of 16, 25 %", "20.0 dB", "98.4 %", "10.0 %", "2", "20.0 %"],
        ["", "8 of 16, 50 %", "3.0 dB", "–", "20.0 %", "-0.123", "-1.2 %"],
    ]
    assert "ms saved" in text
    assert "cost, in float, 10 ms for native, measured on local." in text
    assert "4 samples, without recovery" in text
    assert "Sorted by the ms that the smallest cut saves, divided by its error." in text


def test_instructions_are_never_called_a_time() -> None:
    group = of_cuts("a", (20.0, 123_456.0), (3.0, -2_000_000.0))
    text = printed(dataclasses.replace(measured(group, unit="instructions"), cost=4.2e6))
    assert [row[-2:] for row in cells(text)] == [["123 k", "2.9 %"], ["-2 M", "-47.6 %"]]
    assert "instr. saved" in text
    assert "4.2 M instructions" in text
    assert " ms" not in text


def test_without_a_target_there_is_no_column_of_latency() -> None:
    text = printed(measured(of_cuts("a", (200.0, None)), unit=None))
    assert cells(text) == [["a", "4 of 16, 25 %", "no error", "–", "10.0 %"]]
    assert "No latency was measured; for that, give a target with -t." in text
    assert "Sorted by the MACs" in text


def test_what_is_not_measured_is_a_dash() -> None:
    text = printed(measured(of_cuts("a", (20.0, None), (3.0, 1.0))))
    assert [row[-2:] for row in cells(text)] == [["–", "–"], ["1", "10.0 %"]]
    nothing = dataclasses.replace(measured(unit=None), target="native", device="local")
    assert "No layer could be measured by itself." in printed(nothing)


def test_what_is_left_out_is_named() -> None:
    found = dataclasses.replace(
        measured(),
        kept=[("/out/Gemm", "y is an output of the model")],
        unknown=[("/lrn", "LRN")],
        unmeasured=[("/scores", "MatMul")],
    )
    text = printed(found)
    assert "/out/Gemm stays whole: y is an output of the model" in text
    assert "/lrn: LRN has no rule, so it keeps every channel it touches" in text
    assert "/scores: MatMul has no constant weight of its own, so it is not measured" in text
    assert "Sorted by" not in text


@pytest.mark.parametrize("width", [60, 200])
def test_long_names_are_never_cut(width: int) -> None:
    name = "/encoder/layer.11/attention/self/query/MatMul" * 2
    rows = cells(printed(measured(of_cuts(name, (20.0, 2.0))), width))
    assert "".join(row[0] for row in rows) == name
