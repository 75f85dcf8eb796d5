"""How a latency changed while it was measured, drawn as SVG for the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP, _BELOW = 420, 130, 70, 8, 22
_MEDIAN, _TAIL, _THROTTLED = "#3b6ea5", "#b8b8b8", "#b00020"

_Points = Sequence[tuple[float, float]]


def windows_picture(latency: Mapping[str, Any]) -> str:
    """Draw the medians of the ten consecutive tenths of the runs; nothing where there are none."""
    windows = latency["windows_ms"]
    if not windows:
        return ""
    medians = [(float(number), ms) for number, ms in enumerate(windows, 1)]
    return _chart([(_MEDIAN, medians)], medians, _MEDIAN, "first tenth of the runs", "last")


def sustained_picture(latency: Mapping[str, Any]) -> str:
    """Draw median and 90th percentile over the minutes, with dots where the board was throttled."""
    points = latency["sustained"]
    if not points:
        return ""
    medians = [(point["at_s"] / 60, point["p50_ms"]) for point in points]
    tails = [(p["at_s"] / 60, p["p90_ms"]) for p in points if _is_number(p.get("p90_ms"))]
    throttled = [at for at, point in zip(medians, points, strict=True) if point.get("throttled")]
    lines = [(_TAIL, tails), (_MEDIAN, medians)]
    first, last = (f"{medians[end][0]:.3g} min" for end in (0, -1))
    return _chart(lines, throttled, _THROTTLED, first, last)


def _chart(
    lines: Sequence[tuple[str, _Points]], dots: _Points, dot: str, first: str, last: str
) -> str:
    """Draw lines of `(x, ms)` above zero; labels of the axes are the extremes.

    Args:
        lines: a colour and points for each.
        dots: points to mark.
        dot: their colour.
        first: label of the least x.
        last: label of the greatest.
    """
    every = [point for _, points in lines for point in points]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    highest = max(y for _, y in every) or 1.0

    def at(point: tuple[float, float]) -> str:
        x = _LEFT + _WIDTH * (point[0] - left) / ((right - left) or 1.0)
        return f"{x:.1f},{_TOP + _HEIGHT * (1 - point[1] / highest):.1f}"

    bottom = _TOP + _HEIGHT
    marks = [
        f'<path d="M{_LEFT},{_TOP}V{bottom}H{_LEFT + _WIDTH}" fill="none" stroke="#999"/>',
        f'<text x="0" y="{_TOP + 10}">{highest:.3g} ms</text><text x="0" y="{bottom}">0</text>',
        f'<text x="{_LEFT}" y="{bottom + 16}">{first}</text>',
        f'<text x="{_LEFT + _WIDTH}" y="{bottom + 16}" text-anchor="end">{last}</text>',
    ]
    for colour, points in lines:
        path = " ".join(map(at, points))
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for point in dots:
        x, y = at(point).split(",")
        marks.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{dot}"/>')
    width, height = _LEFT + _WIDTH + 8, bottom + _BELOW
    return f'<svg width="{width}" height="{height}" role="img">{"".join(marks)}</svg>'


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))
