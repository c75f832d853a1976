"""Figures of clusters, with matplotlib: scatters with their regions, and the images that experts give.

Drawn on the Agg canvas, without pyplot: no window, no state that outlives a figure. Colours stand for
clusters, in sequences made for colour-blind readers, and markers for given labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = NDArray[np.floating[Any]]
Labels = NDArray[np.integer[Any]]

_MARKERS = "os^DvPX*<>"
# Petroff 2021 (arXiv 2107.02270): sequences that were optimised for colour-blind readers
_SIX = ("#5790fc", "#f89c20", "#e42536", "#964a8b", "#9c9ca1", "#7a21dd")
_TEN = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
_INK, _QUIET = "#222222", "#b8b8b8"


class Region(NamedTuple):
    """A rectangle of the plane, and the cluster that each cell's centre belongs to."""

    cells: Labels | None
    """(S, S), the lowest row first; None where a method says nothing of the plane."""
    extent: tuple[float, float, float, float]
    """Left, right, bottom, top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One scatter of n points."""

    title: str
    points: Points
    """(n, 2)"""
    clusters: Labels | None
    """(n,) from 0; None: not clustered yet, all in one grey."""
    labels: Labels | None = None
    """(n,) class numbers, -1 for none; their markers. None: no difference is made."""
    region: Region | None = None
    named: bool = False
    """Whether the cluster's number is written at its median."""
    note: str = ""
    """Below the panel: what the axes are."""


# ---- drawing


def palette(n_clusters: int) -> list[str]:
    """K colours; beyond ten they come round again, and numbers tell clusters apart."""
    colours = _SIX if n_clusters <= len(_SIX) else _TEN
    return [colours[k % len(colours)] for k in range(n_clusters)]


def draw_panels(
    panels: Sequence[Panel], n_clusters: int, *, title: str = "", columns: int = 0, side: float = 3.2
) -> Figure:
    """Scatters side by side, their markers explained below where they stand for labels.

    Args:
        panels: what to draw.
        n_clusters: K; colours are those of `palette`.
        title: of the figure.
        columns: panels in a row; all of them unless given.
        side: of a panel, in inches.
    """
    columns = min(columns or len(panels), len(panels))
    rows = -(-len(panels) // columns)
    kinds = _marked(panels)
    words = max(1 + p.title.count("\n") for p in panels) + any(p.note for p in panels)
    extra = 0.4 * bool(title) + 0.3 * bool(kinds)
    figure = _figure(columns * side, rows * (side + 0.18 * words) + extra)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw_panel(axes, panel, palette(n_clusters), bool(kinds))
    if title:
        figure.suptitle(title, fontsize=12, color=_INK)
    if kinds:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color="none", marker=_MARKERS[k], mfc="white", mec=_INK, markersize=5)
            for k in range(kinds)
        ]
        figure.legend(
            [Line2D([], [], color="none"), *handles],
            ["given label:", *(str(k) for k in range(kinds))],
            loc="outside lower center",
            ncols=kinds + 1,
            frameon=False,
            fontsize=9,
            handletextpad=0.1,
            columnspacing=1.0,
        )
    return figure


def _marked(panels: Sequence[Panel]) -> int:
    """How many labels get a marker of their own; 0 where they are too many."""
    kinds = max((int(p.labels.max(initial=-1)) + 1 for p in panels if p.labels is not None), default=0)
    return kinds if kinds <= len(_MARKERS) else 0


def _draw_panel(axes: Axes, panel: Panel, colours: Sequence[str], marked: bool) -> None:
    from matplotlib.colors import to_rgb

    rgb = np.array([to_rgb(c) for c in colours])
    n = len(panel.points)
    size = float(np.clip(12_000 / max(n, 1), 4, 16))
    fill = np.tile(to_rgb(_QUIET), (n, 1)) if panel.clusters is None else rgb[panel.clusters]
    edge = 0.55 * fill
    if panel.region is not None and panel.region.cells is not None:
        pale = 0.35 * rgb + 0.65
        axes.imshow(
            pale[panel.region.cells],
            extent=panel.region.extent,
            origin="lower",
            interpolation="nearest",
            aspect="auto",
        )
    labels = panel.labels if marked and panel.labels is not None else np.zeros(n, np.int64)
    for kind in np.unique(labels):
        own = labels == kind
        axes.scatter(
            panel.points[own, 0],
            panel.points[own, 1],
            s=size,
            marker=_MARKERS[kind] if kind >= 0 else ".",
            c=fill[own],
            edgecolors=edge[own],
            linewidths=0.3,
        )
    if panel.named and panel.clusters is not None:
        _write_numbers(axes, panel)
    if panel.region is not None:
        left, right, bottom, top = panel.region.extent
        axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_title(panel.title, fontsize=10, color=_INK)
    axes.set_xlabel(panel.note, fontsize=8, color="#555555")
    axes.set(xticks=[], yticks=[])
    axes.set_box_aspect(1)
    for spine in axes.spines.values():
        spine.set(color=_QUIET, linewidth=0.8)


def _write_numbers(axes: Axes, panel: Panel) -> None:
    from matplotlib.patheffects import withStroke

    assert panel.clusters is not None
    for k in np.unique(panel.clusters):
        x, y = np.median(panel.points[panel.clusters == k], axis=0)
        around = [withStroke(linewidth=2.5, foreground="white")]
        axes.text(
            x, y, str(k), ha="center", va="center", fontsize=9, fontweight="bold", color=_INK,
            path_effects=around,
        )  # fmt: skip


def draw_experts(
    rows: Sequence[tuple[str, Points, Points, Points]], names: Sequence[str], *, title: str = ""
) -> Figure:
    """Each expert's reconstruction of each input, as images.

    Args:
        rows: (name, the input (H, W) or (H, W, C), its reconstructions (K, H, W[, C]), the gate's p (K,)).
        names: (K,) written above the experts.
        title: of the figure.
    """
    k = len(names)
    figure = _figure(0.95 * (k + 1), 1.15 * len(rows) + 0.35 + 0.3 * bool(title))
    for r, (name, given, found, p) in enumerate(rows):
        for c in range(k + 1):
            axes = figure.add_subplot(len(rows), k + 1, r * (k + 1) + c + 1)
            image = np.clip(given if c == 0 else found[c - 1], 0.0, 1.0)
            axes.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            best = c > 0 and c - 1 == int(p.argmax())
            for spine in axes.spines.values():
                spine.set(color=_TEN[1] if best else _QUIET, linewidth=2.5 if best else 0.8)
            if r == 0 or c == 0:
                axes.set_title(name if c == 0 else names[c - 1], fontsize=8, color=_INK)
            if c:
                axes.set_xlabel(f"p = {p[c - 1]:.2f}", fontsize=7, color="#555555", labelpad=2)
    if title:
        figure.suptitle(title, fontsize=12, color=_INK)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, *, dpi: int = 110) -> Path:
    """Write a PNG file of at most 256 colours: a quarter of the bytes, and nothing is missed."""
    from PIL import Image

    figure.set_dpi(dpi)
    canvas: Any = figure.canvas
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
