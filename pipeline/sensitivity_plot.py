"""The sensitivity of channel groups as a chart: what every cut saves against what it spoils.

A line per group, a point per cut; the upper right is where to prune. The groups that are best to
cut have colours and names, all others are grey. matplotlib is an extra and imported only here.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgepress.pipeline.output import refuse_existing
from edgepress.pipeline.prepare import UsageError
from edgepress.pipeline.sensitivity import GroupSensitivity, Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 8  # as many as there are colours
NAME_LENGTH = 44
DPI = 150
# Okabe and Ito, "Color Universal Design", 2008: told apart with every kind of colour vision
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#44AA99",
)  # fmt: skip
GREY, GRID, INK = "#c4c4c4", "#ebebeb", "#333333"
# beyond these a cut is as good as free, or as good as all
LEAST_DB, MOST_DB = -10.0, 80.0
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it, so charts look alike everywhere
    "font.size": 10.0,
    "svg.hashsalt": "edgepress",
    "text.parse_math": False,  # a name may hold dollars
}
# by suffix; no dates, so that the same figures give the same bytes
METADATA: dict[str, dict[str, str | None]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


class Point(NamedTuple):
    """Where a cut lies in the chart.

    Attributes:
        sqnr_db: error of the outputs, clipped to what the chart shows.
        saved_percent: of the cost of all layers, or of the MACs without a measurement.
        cut_share: of the channels.
    """

    sqnr_db: float
    saved_percent: float
    cut_share: float


def check_plot(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, what could not be drawn or written in the end.

    Raises:
        UsageError: the suffix is none that is drawn, or matplotlib is not installed.
        OutputError: the file exists, and `overwrite` is not given.
    """
    if path.suffix.lower() not in METADATA:
        raise UsageError(f"{path}: a plot is a .png, .svg or .pdf file; give it such a name.")
    refuse_existing(path, overwrite=overwrite)
    try:
        import matplotlib.figure  # noqa: F401 - whether it is there
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install 'edgepress[plots]'."
        ) from error


def plot_sensitivity(found: Sensitivity, name: str, suffix: str) -> bytes:
    """Draw the chart of a model of this name as PNG, SVG or PDF, by suffix.

    The same figures give the same bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user has set
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        where = f" for {found.target}, on {found.device}" if found.target else ""
        _draw(figure.add_subplot(), found, f"Sensitivity of {name}{where}")
        stream = io.BytesIO()
        suffix = suffix.lower()
        figure.savefig(stream, format=suffix[1:], dpi=DPI, metadata=METADATA[suffix])
    return stream.getvalue()


def _draw(axes: Axes, found: Sensitivity, title: str) -> None:
    lines = [(group.name, points) for group in found.groups if (points := _points(found, group))]
    named, others = lines[:NAMED], lines[NAMED:]
    for index, (_, points) in enumerate(others):
        _line(axes, points, GREY, "" if index else f"{len(others)} more groups", bold=False)
    # the last one drawn lies on top, which shall be the best
    for rank, (name, points) in reversed(list(enumerate(named, 1))):
        _line(axes, points, COLOURS[rank - 1], f"{rank}  {_short(name)}", bold=True)
    axes.axhline(0, color=INK, linewidth=0.8, zorder=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    what = {None: "MACs", "ms": "layers' time"}.get(found.unit, found.unit)
    axes.set_ylabel(f"{what} saved (%)", color=INK)
    axes.set_xlabel("output SQNR (dB), the further right the less error", color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=22)
    note = f"one group cut at a time, larger dots cut more; {found.samples} samples, no recovery"
    axes.text(0, 1.02, note, transform=axes.transAxes, color=INK, fontsize=9)
    if lines:
        _legend(axes, len(named))


def _legend(axes: Axes, named: int) -> None:
    """List the named groups, the best first, beside the axes, and the others below them."""
    handles, labels = axes.get_legend_handles_labels()
    first = len(handles) - named
    order = [*reversed(range(first, len(handles))), *range(first)]
    legend = axes.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        title="best to cut first",
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        alignment="left",
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        markerscale=1.5,
    )
    legend.get_title().set_color(INK)


def _points(found: Sensitivity, group: GroupSensitivity) -> list[Point]:
    """Return where the cuts of a group lie; none that were not measured."""
    return [
        Point(
            sqnr_db=min(max(cut.sqnr_db, LEAST_DB), MOST_DB),
            saved_percent=100 * share,
            cut_share=cut.channels / group.channels,
        )
        for cut in group.cuts
        if (share := found.share(cut)) is not None
    ]


def _line(axes: Axes, points: list[Point], colour: str, label: str, *, bold: bool) -> None:
    """Draw a group; an empty label keeps it out of the legend."""
    x, y = [p.sqnr_db for p in points], [p.saved_percent for p in points]
    width, area, layer = (1.8, 60, 3) if bold else (1.0, 20, 1)
    axes.plot(x, y, color=colour, linewidth=width, zorder=layer)
    areas = [area * point.cut_share for point in points]
    axes.scatter(
        x, y, areas, colour, label=label, edgecolors="white", linewidths=0.6, zorder=layer + 1
    )


def _short(name: str) -> str:
    """Cut the middle out of a long name; the ends tell layers apart."""
    if len(name) <= NAME_LENGTH:
        return name
    half = (NAME_LENGTH - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
