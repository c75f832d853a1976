"""Top-m experts against all experts, K = 20, 100 and 500: one thread, CPU time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from distclust.mixture.diagnostics import diagnostics
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.mixture.noise import Noise
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import SparseRows
from jobs.benchmarks.measure import Row, batch, interleaved, spread

TERMS = 2000
SPACES: dict[str, tuple[int, ModelSettings]] = {
    "rows": (1024, ModelSettings(expert_hidden=(64,))),
    "codes": (4096, ModelSettings(expert_hidden=(32,), expert_code_size=8, expert_space="codes")),
}
"""Batch and sizes of experts that reconstruct the rows, and of those that reconstruct their codes (64)."""
ASKED = 3.0
"""Experts a row: what the gate's last layer is scaled to, since a gate without training is soft."""


def topm(quick: bool) -> list[Row]:
    """Forward and backward pass of the joint phase with and without leaving experts out; the optimiser, which
    visits every weight, in rows of its own."""
    torch.set_num_threads(1)
    found: list[Row] = []
    for space, (rows, settings) in SPACES.items():
        x = batch(rows, TERMS)
        for clusters in (20, 100) if quick else (20, 100, 500):
            found += _compare(
                x, clusters, settings, f"top-m, experts on {space}, batch {rows:,}, K {clusters}"
            )
    return found


def _compare(x: SparseRows, clusters: int, settings: ModelSettings, name: str) -> list[Row]:
    top, every = (_model(method, clusters, settings) for method in ("damic-topm", "damic"))
    asked = _sharpen(top, x)
    every.load_state_dict(top.state_dict())
    optimizer = torch.optim.Adam(top.parameters(), fused=True)
    seconds = interleaved({"ours": _pass(top, x), "peer": _pass(every, x)}, 3, time.thread_time)
    update = interleaved({"ours": optimizer.step}, 3, time.thread_time)["ours"]
    ours, peer = (1e6 * statistics.median(seconds[who]) / x.n_rows for who in ("ours", "peer"))
    return [
        Row(
            name=f"{name}: forward and backward",
            ours=ours,
            peer=peer,
            ratio=statistics.median(b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True)),
            unit="us/row",
            peer_name="all experts",
            spread=spread(seconds["ours"]),
            note=f"{asked:.1f} experts a row",
        ),
        Row(
            name=f"{name}: optimiser",
            ours=1e6 * statistics.median(update) / x.n_rows,
            unit="us/row",
            spread=spread(update),
            note="the same with all experts",
        ),
    ]


def _model(method: str, clusters: int, settings: ModelSettings) -> MixtureModel:
    torch.manual_seed(0)
    threshold = METHODS[method].settings.expert_threshold
    settings = replace(settings, norm="layer", tau=100.0, expert_threshold=threshold)
    row = replace(METHODS[method], settings=settings)
    model = MixtureModel(row, settings, TERMS, clusters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in ("experts", "gate"))
    return model


def _pass(model: MixtureModel, x: SparseRows) -> Callable[[], None]:
    phase = next(p for p in model.method.phases if p.name == "joint")

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        scene = model.scene(x, phase, {}, Noise(0, 1, [0], [x.n_rows], "cpu"))
        (model.term_values(scene, phase)["lse"].sum() / x.n_rows).backward()

    return run


@torch.no_grad()
def _sharpen(model: MixtureModel, x: SparseRows) -> float:
    """Scale the gate's last layer until a row asks `ASKED` experts; how many it asks."""
    phase = next(p for p in model.method.phases if p.name == "joint")
    weight = [p for p in model.gate.parameters() if p.dim() == 2][-1]
    asked = 0.0
    for _ in range(40):
        scene = model.scene(x, phase, {}, Noise(0, 1, [0], [x.n_rows], "cpu"))
        asked = float(diagnostics(scene, 1)["topm/experts_asked"]) / x.n_rows
        certainty = float(scene.view.log_p.exp().amax(1).mean()) if scene.view.log_p is not None else 1.0
        if certainty > 0.5 and asked <= ASKED:
            break
        weight.mul_(1.3)
    return asked
