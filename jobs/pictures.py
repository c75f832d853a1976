"""The pictures of docs/results.md: short runs on small data, and what is drawn of them.

    python -m jobs.pictures [NAME ...] [--out docs/pictures] [--runs runs/pictures]

Every run takes less than a minute on one core, and a finished one is not run again. MNIST must be under
DISTCLUST_DATA or a connection to its server be there; all other sets are computed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distclust.config import RunConfig, resolve
from distclust.results.drawing import Labels, Panel, draw_experts, draw_panels, save_figure
from distclust.results.metrics import contingency, scores
from distclust.results.pictures import (
    FinishedRun,
    code_panels,
    expert_rows,
    latent_panel,
    predict_with,
    region_panel,
)
from distclust.run import train_run
from jobs._tables import cell_config, load_table

Recipe = Mapping[str, Any]
Draw = Callable[[str, Path, Path], list[Path]]


def finished_run(runs: Path, name: str, config: RunConfig) -> FinishedRun:
    """The run of that name, made unless it is there."""
    folder = runs / name
    config = replace(config, tracking=replace(config.tracking, enabled=False))
    summary = train_run(config, folder, baselines=False)
    _say(f"{name}: ACC {summary['acc']:.3f}, {summary['seconds'].get('train', 0.0):.0f} s of training")
    return FinishedRun(folder)


def accuracy(run: FinishedRun, clusters: Labels) -> float:
    """ACC of clusters (n,) of the rows that are drawn."""
    assert run.labels is not None
    classes = int(run.labels.max()) + 1
    return float(scores(contingency(run.labels, clusters, classes, run.config.clusters)).acc)


def matched(panel: Panel, k: int) -> Panel:
    """The panel with its clusters renumbered after the labels they fit best, so that colours compare."""
    from scipy.optimize import linear_sum_assignment

    assert panel.clusters is not None
    assert panel.labels is not None
    table = contingency(panel.labels, panel.clusters, max(k, int(panel.labels.max()) + 1), k)
    classes, clusters = linear_sum_assignment(-table)
    number = np.empty(k, np.int64)
    number[clusters] = classes
    region = panel.region
    if region is not None and region.cells is not None:
        region = region._replace(cells=number[region.cells])
    return replace(panel, clusters=number[panel.clusters], region=region)


# ---- regions in the plane (DMAE, figure 2), and the points behind DAMIC's rows (its figure 2)


def draw_plane(name: str, runs: Path, out: Path) -> list[Path]:
    """One of DMAE's sets with the regions of each row of its table."""
    loaded = load_table("dmae-synthetic")
    (section,) = (s for s in loaded.sections if s.title.lower() == name)
    panels, k = [], 0
    for row in section.rows:
        config = cell_config(loaded, section, row, "cpu", 0)
        run, k = finished_run(runs, f"{name}-{row.method}", config), config.clusters
        panel = region_panel(run, f"{row.label}\nACC {accuracy(run, run.clusters):.3f}")
        assert panel is not None
        panels.append(matched(panel, k))
    return [save_figure(draw_panels(panels, k, title=section.title, side=2.8), out / f"{name}.png")]


def draw_latent(name: str, runs: Path, out: Path) -> list[Path]:
    """DAMIC's set: the points behind the rows, by the clusters of k-means, of DAMIC's start and its end."""
    loaded = load_table("damic-synthetic")
    section = loaded.sections[0]
    rows = {row.method: row for row in section.rows}
    shallow = finished_run(runs, "sigmoid2-k-means", cell_config(loaded, section, rows["k-means"], "cpu", 0))
    run = finished_run(runs, "sigmoid2-damic", cell_config(loaded, section, rows["damic"], "cpu", 0))
    before = run.model_before()
    assert before is not None
    shown: dict[str, Labels] = {
        "k-means": shallow.clusters,
        "DAMIC before joint training": predict_with(run, before[1]),
        "DAMIC after joint training": run.clusters,
    }
    k, panels = run.config.clusters, []
    for title, clusters in shown.items():
        panel = latent_panel(run, f"{title}\nACC {accuracy(run, clusters):.3f}", clusters)
        assert panel is not None
        panels.append(matched(panel, k))
    return [
        save_figure(
            draw_panels(panels, k, title="x = sigmoid(Wv)²: the points v"), out / "damic-synthetic.png"
        )
    ]


# ---- digits: experts (DAMIC, figures 3 and 4), codes before and after

_DIGITS: Recipe = {
    "source": {"name": "mnist", "limit": 5000},
    "vocabulary": {"scale": 1.0},
    "clusters": 10,
    "shards": {"rows_per_shard": 500},
    "order": {"lanes": 4, "rows_per_lane": 32},
    "cluster": {"workers": 0},
}


def draw_experts_of_digits(name: str, runs: Path, out: Path) -> list[Path]:
    """DAMIC on digits: what each expert gives back, and the codes with the gate's clusters."""
    recipe = {
        "method": "damic",
        "model": {"image": [1, 28, 28], "hidden": [256], "code_size": 10, "expert_hidden": [64]},
        "phases": {
            "pretrain": {"epochs": 15},
            "experts": {"epochs": 6},
            "gate": {"epochs": 6},
            "joint": {"epochs": 8},
        },
    }
    run = finished_run(runs, "mnist-damic", resolve({**_DIGITS, **recipe}))
    experts = expert_rows(run)
    assert experts is not None
    figure = draw_experts(*experts, title="DAMIC on 5,000 digits: what each expert gives back")
    return [save_figure(figure, out / "damic-experts.png"), _codes(run, "DAMIC", out / "damic-codes.png")]


def draw_codes(name: str, runs: Path, out: Path) -> list[Path]:
    """DMAE on digits: joint training moves the codes."""
    recipe = {
        "method": "dmae",
        "model": {"image": [1, 28, 28], "hidden": [256, 256], "dissimilarity": "mahalanobis"},
        "phases": {"pretrain": {"epochs": 30}, "joint": {"epochs": 20, "optimizer": {"learning_rate": 1e-4}}},
    }
    run = finished_run(runs, "mnist-dmae", resolve({**_DIGITS, **recipe}))
    return [_codes(run, "DMAE", out / "dmae-codes.png")]


def _codes(run: FinishedRun, method: str, path: Path) -> Path:
    figure = draw_panels(
        code_panels(run), run.config.clusters, title=f"{method} on 5,000 digits: codes by cluster", side=4.2
    )
    return save_figure(figure, path)


PICTURES: Mapping[str, Draw] = {
    "painwheel": draw_plane,
    "toroidal": draw_plane,
    "moons": draw_plane,
    "circles": draw_plane,
    "damic-synthetic": draw_latent,
    "damic-experts": draw_experts_of_digits,
    "dmae-codes": draw_codes,
}


def main(arguments: Sequence[str]) -> int:
    """Draw the pictures that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m jobs.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="where the pictures go")
    parser.add_argument("--runs", type=Path, default=Path("runs/pictures"), help="where the runs are kept")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(PICTURES))
    if unknown:
        parser.error(f"there is no picture {', '.join(unknown)}; expected names of {', '.join(PICTURES)}")
    torch.set_num_threads(1)
    for name in options.names or PICTURES:
        for path in PICTURES[name](name, options.runs, options.out):
            sys.stdout.write(f"{path}\n")
    return 0


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
