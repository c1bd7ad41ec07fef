"""Charts as SVG that stands in the page: its colours are those of the page, light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 26, 44  # margins
FEW = 40  # points, up to which each is marked


@dataclass
class Curve:
    """One curve; the first is drawn boldest, and each has a colour and a dash of its own (see style.css)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass
class Chart:
    """A chart and what is said of it.

    Args:
        title: above it.
        words: what it shows, for those who do not see it.
        growths: (x, words) of vertical lines.
        x_range, y_range: where they do not follow from the curves.
        bars: width of the bars that begin at the points; 0 draws curves.
        diagonal: whether the line of equal x and y is drawn.
        counts: whether x counts something, such as epochs, and has whole numbers alone.
        note: below it.
    """

    title: str
    words: str
    x_label: str
    curves: list[Curve]
    growths: list[tuple[float, str]] = field(default_factory=list)
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    bars: float = 0.0
    diagonal: bool = False
    counts: bool = False
    note: str = ""

    def svg(self) -> Markup:
        """Return the drawing."""
        plane = _Plane(_range(self.x_range, [curve.x for curve in self.curves]),
                       _range(self.y_range, [curve.y for curve in self.curves]))
        parts = [*_axes(plane, self.x_label, self.counts)]
        for i, (at, words) in enumerate(self.growths):
            x, y = plane.x(at), TOP - 5 - 11 * (i % 2)
            parts.append(f'<line class="growth" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 14}" y2="{HEIGHT - BOTTOM}"/>'
                         f'<text class="growth-label" x="{x + 3:.1f}" y="{y}">{escape(words)}</text>')
        if self.diagonal:
            ends = [(plane.x(v), plane.y(v)) for v in (0, 1)]
            parts.append('<line class="diagonal" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(
                *ends[0], *ends[1]))
        for i, curve in enumerate(self.curves):
            parts.append(_bars(plane, curve, self.bars) if self.bars else _line(plane, curve, i))
        return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}'
                      f'{"" if self.title.endswith("?") else "."} {escape(self.words)}">{"".join(parts)}</svg>')


class _Plane:
    """Map values to places on the drawing."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]):
        self.x_range, self.y_range = x_range, y_range

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (min(max(value, low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _range(given: tuple[float, float] | None, values: list[Sequence[float]]) -> tuple[float, float]:
    if given:
        return given
    found = [v for part in values for v in part if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(found), max(found)
    margin = 0.04 * (high - low) or 0.5
    return (0.0 if 0 <= low < high / 3 else low - margin), high + margin


def _axes(plane: _Plane, x_label: str, counts: bool) -> list[str]:
    bottom, parts = HEIGHT - BOTTOM, []
    for value in _ticks(*plane.y_range, 5):
        y = plane.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(*plane.x_range, 6, counts):
        x = plane.x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                     f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
                 f'{escape(x_label)}</text>')
    return parts


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    values = MaxNLocator(count, steps=[1, 2, 4 if whole else 2.5, 5, 10], integer=whole).tick_values(low, high)
    return [round(float(v), 10) for v in values if low - 1e-9 <= v <= high + 1e-9]


def _line(plane: _Plane, curve: Curve, number: int) -> str:
    """Return the curve; where a value is missing it has a gap."""
    path, pen_down, points = [], False, []
    for x, y in zip(curve.x, curve.y, strict=True):
        if not math.isfinite(x) or not math.isfinite(y):
            pen_down = False
            continue
        points.append((plane.x(x), plane.y(y)))
        path.append(f"{'L' if pen_down else 'M'}{points[-1][0]:.1f} {points[-1][1]:.1f}")
        pen_down = True
    dots = "".join(f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points) \
        if len(points) <= FEW else ""
    return f'<path class="curve c{number}" d="{"".join(path)}"/>{dots}'


def _bars(plane: _Plane, curve: Curve, width: float) -> str:
    floor = HEIGHT - BOTTOM
    return "".join(
        f'<rect class="bar" x="{plane.x(x) + 0.8:.1f}" width="{plane.x(x + width) - plane.x(x) - 1.6:.1f}" '
        f'y="{plane.y(y):.1f}" height="{floor - plane.y(y):.1f}"/>' for x, y in zip(curve.x, curve.y, strict=True) if y)


def histogram(values: Sequence[float], title: str, words: str, x_label: str, bins: int = 20) -> Chart:
    """Return bars of how many values lie in each of `bins` parts of [0, 1]."""
    counts, edges = np.histogram(np.clip(values, 0, 1), bins, (0, 1))
    return Chart(title, words, x_label, [Curve("", edges[:-1].tolist(), counts.tolist())], x_range=(0, 1),
                 y_range=(0, max(counts.max() * 1.08, 1)), bars=1 / bins)
