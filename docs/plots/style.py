"""How figures look, and how they are saved: two themes, one axis of differences, one kind of file.

A module beside this one reads results and returns a :class:`Drawing`. Whatever is drawn is also
there as text: in the file, so that a test can tell an old figure, and as the alternative text of
the pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from docs.plots.results import Difference

ROOT = Path(__file__).parent.parent.parent
FIGURES = ROOT / "docs" / "figures"


@dataclass(frozen=True)
class Theme:
    """The colors of a figure for a light or a dark page. The background is the page's own."""

    name: str
    ink: str
    """Texts and axes."""
    gray: str
    """Dense models, and lines to compare with."""
    blue: str
    """What the figure is about."""
    orange: str
    green: str
    violet: str


THEMES = (
    Theme("light", "#24292f", "#6e7781", "#0969da", "#bc4c00", "#1a7f37", "#8250df"),
    Theme("dark", "#e6edf3", "#8b949e", "#58a6ff", "#f0883e", "#3fb950", "#bc8cff"),
)


@dataclass(frozen=True)
class Drawing:
    """One figure."""

    name: str
    numbers: str
    """All that is drawn, as text, which the files hold as their description."""
    alt: str
    """What the figure shows, in a sentence or two."""
    draw: Callable[[Theme], Figure]
    is_wide: bool = False
    """True if a phone has to scroll it to read its letters."""


def save(drawing: Drawing, folder: Path) -> None:
    """A file for light pages and one for dark pages."""
    for theme in THEMES:
        inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        settings: dict[Any, Any] = dict.fromkeys(inks, theme.ink)
        # Pages show a figure as wide as their text, phones at half its size: no letter below 9.
        settings |= {"font.size": 10, "legend.frameon": False, "legend.handletextpad": 0.3}
        settings |= {"axes.spines.top": False, "axes.spines.right": False}
        with rc_context(settings):
            drawing.draw(theme).savefig(
                folder / f"{drawing.name}-{theme.name}.png",
                dpi=200,
                transparent=True,
                metadata={"Description": drawing.numbers},
            )


def difference_axis(axis: Axes, theme: Theme, label: str, linear_to: float = 1) -> None:
    """An x-axis of points above 0: linear up to one point, or as told, and logarithmic beyond.

    Gains on planted graphs are ten times those on others, and both have to be read.
    """
    axis.axvline(0, color=theme.gray, linewidth=1.2, zorder=0)
    axis.set_xscale("symlog", linthresh=linear_to, linscale=0.9)
    axis.autoscale(axis="x")
    axis.margins(x=0.04)
    ticks = [tick for tick in (-10, -3, -1, 0, 1, 3, 10) if _is_inside(tick, axis.get_xlim())]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axis.xaxis.set_minor_locator(FixedLocator([]))
    axis.grid(axis="x", color=theme.gray, alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel(label)


def _is_inside(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def dot(axis: Axes, place: float, gain: Difference, color: str, marker: str, **more: Any) -> Any:
    """A mean and its interval, at a place from the top."""
    return axis.errorbar(
        gain.mean,
        place,
        xerr=[[gain.mean - gain.low], [gain.high - gain.mean]],
        fmt=marker,
        color=color,
        markersize=6,
        elinewidth=1.6,
        **more,
    )


def rows(axis: Axes, names: Sequence[str]) -> None:
    """A y-axis of names, the first on top."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def legend_above(figure: Figure, *axes: Axes, columns: int) -> None:
    """The names of what is drawn, each once, above everything."""
    known: dict[str, Any] = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        known |= dict(zip(names, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="upper center", ncols=columns)


def by_verdict(gains: dict[str, Difference]) -> str:
    """Which are above 0, which below, and which are level with it, as words."""
    said = []
    for verdict in ("above", "below", "level"):
        names = [name for name, gain in gains.items() if gain.side == verdict]
        if names:
            said.append(f"{verdict} on {_listed(names)}")
    return ", ".join(said)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1])] * bool(names[1:]) + [names[-1]])
