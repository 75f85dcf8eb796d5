"""The chart of sensitivities: written, readable, reproducible, and refused in time."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image

from edgepress.pipeline import sensitivity_plot
from edgepress.pipeline.output import OutputError
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.sensitivity import Sensitivity
from edgepress.pipeline.sensitivity_plot import NAMED, check_plot, plot_sensitivity
from tests.pipeline.sensitivities import measured, of_cuts


def many(count: int = 100) -> Sensitivity:
    rng = np.random.default_rng(0)
    groups = []
    for index in range(count):
        decibels, saved = rng.uniform(5, 40), rng.uniform(0.01, 1)
        figures = [(decibels / share, saved * share) for share in (1, 2, 3)]
        groups.append(of_cuts(f"/layer.{index}/Conv", *figures))
    return measured(*groups)


def texts(found: Sensitivity, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything that the chart says, as the SVG with text instead of outlines has it."""
    monkeypatch.setitem(sensitivity_plot.STYLE, "svg.fonttype", "none")
    root = ElementTree.fromstring(plot_sensitivity(found, "net", ".svg"))
    return "\n".join(
        "".join(element.itertext()) for element in root.iter() if "text" in element.tag
    )


def test_a_picture_shows_coloured_lines_on_white() -> None:
    data = plot_sensitivity(measured(of_cuts("a", (20.0, 2.0), (3.0, 4.0))), "net", ".png")
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).reshape(-1, 3).astype(int)
    assert len(pixels) > 500_000
    white = (pixels == 255).all(axis=1).mean()
    assert 0.8 < white < 0.99
    blue = (np.abs(pixels - [0, 0x72, 0xB2]) < 8).all(axis=1)
    assert blue.sum() > 1000


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".png", b"\x89PNG"), (".PNG", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")],
)
def test_the_suffix_is_the_format_and_the_bytes_are_reproducible(suffix: str, start: bytes) -> None:
    data = plot_sensitivity(many(12), "net", suffix)
    assert data.startswith(start)
    assert len(data) > 5000
    assert plot_sensitivity(many(12), "net", suffix) == data


def test_the_best_groups_are_named_the_others_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = many(100)
    said = texts(found, monkeypatch)
    assert "Sensitivity of net for native, on local" in said
    for rank, group in enumerate(found.groups[:NAMED], 1):
        assert f"{rank}  {group.name}" in said
    assert "/layer.8/" not in said
    assert f"{100 - NAMED} more groups" in said
    order = [said.index(f"/layer.{index}/") for index in range(NAMED)]
    assert order == sorted(order)
    assert said.index("more groups") > order[-1]


@pytest.mark.parametrize(
    ("unit", "words"),
    [("ms", "layers' time saved"), ("instructions", "instructions saved"), (None, "MACs saved")],
)
def test_the_axis_says_what_is_saved(
    monkeypatch: pytest.MonkeyPatch, unit: str | None, words: str
) -> None:
    said = texts(measured(of_cuts("a", (20.0, 2.0)), unit=unit), monkeypatch)
    assert words in said
    assert ("layers' time" in said) == (unit == "ms")


def test_points_lie_where_the_figures_are() -> None:
    axes = Figure().add_subplot()
    found = measured(
        of_cuts("a", (20.0, 2.0), (200.0, 4.0), (-200.0, None)), of_cuts("b", (9.0, -1.0))
    )
    sensitivity_plot._draw(axes, found, "title")
    drawn = {tuple(map(tuple, np.asarray(line.get_xydata()))) for line in axes.lines}
    assert ((20.0, 20.0), (80.0, 40.0)) in drawn  # no error is at the edge; unmeasured is absent
    assert ((9.0, -10.0),) in drawn
    best = axes.collections[-1]  # the best group is drawn last
    assert isinstance(best, PathCollection)
    areas = best.get_sizes()
    np.testing.assert_allclose(areas[1] / areas[0], 2)


def test_names_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "/encoder" + "/x" * 40 + "/MatMul"
    said = texts(
        measured(*(of_cuts(n, (9.0, 1.0)) for n in ("_hidden", "$a_b$", long))), monkeypatch
    )
    assert "_hidden" in said
    assert "$a_b$" in said
    assert re.search(r"/encoder[/x]+…[/x]+/MatMul", said)


def test_a_model_without_cuts_is_an_empty_chart() -> None:
    assert plot_sensitivity(measured(), "net", ".svg").startswith(b"<?xml")


def test_the_users_own_style_is_neither_used_nor_changed() -> None:
    expected = plot_sensitivity(many(3), "net", ".svg")
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 30.0}):
        assert plot_sensitivity(many(3), "net", ".svg") == expected
        assert mpl.rcParams["font.size"] == 30.0


def test_bad_places_are_refused(tmp_path: Path) -> None:
    there = tmp_path / "there.png"
    there.write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        check_plot(there, overwrite=False)
    check_plot(there, overwrite=True)
    check_plot(tmp_path / "new.SVG", overwrite=False)
    for name in ("chart", "chart.gif", "chart.png.txt"):
        with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
            check_plot(tmp_path / name, overwrite=False)


def test_a_missing_matplotlib_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'edgepress\[plots\]'"):
        check_plot(tmp_path / "chart.png", overwrite=False)
