"""The paper model of `distclust estimate` against measured steps: one thread, CPU time."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch

from distclust.config import RunConfig, resolve
from distclust.mixture.method import Method
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.mixture.noise import Noise
from distclust.mixture.statistics import STATISTICS
from distclust.mixture.terms import Scene, Stats
from distclust.results.estimate import Machine, estimate
from distclust.training.engine import StepLoss
from jobs.benchmarks.measure import Row, batch, interleaved, spread

CASES = (
    ("ae-kmeans", "pretrain", 2000, 1024, 10),
    ("ae-kmeans", "pretrain", 2000, 256, 10),
    ("idec", "joint", 2000, 1024, 10),
    ("ae-kmeans", "pretrain", 8000, 1024, 10),
    ("ae-kmeans", "pretrain", 47236, 1024, 10),
    ("damic", "joint", 2000, 256, 5),
    ("damic", "joint", 2000, 256, 20),
    ("damic-text", "joint", 2000, 1024, 20),
)
"""Method, phase, terms, batch and clusters; the first one calibrates the rate."""


def model(quick: bool) -> list[Row]:
    """Predicted and measured milliseconds of a step."""
    torch.set_num_threads(1)
    found: list[Row] = []
    rate = 50e9
    for place, (method, phase, terms, rows, clusters) in enumerate(CASES[:4] if quick else CASES):
        config = resolve(
            {
                "method": method,
                "clusters": clusters,
                "model": {"hidden": [500, 500, 2000], "code_size": 10, "input_dropout": 0.0},
                "vocabulary": {"max_features": terms},
                "order": {"lanes": 1, "rows_per_lane": rows},
            }
        )
        seconds = _measured(config.row, phase, terms, rows, clusters)
        measured = statistics.median(seconds)

        if place == 0:
            for _ in range(20):  # the rate at which the model agrees with this first step
                rate *= _predicted(config, phase, rate) / measured
        said = _predicted(config, phase, rate)
        found.append(
            Row(
                name=f"estimate: step of {method} ({phase}), {terms:,} terms, batch {rows:,}, K {clusters}",
                ours=1e3 * said,
                peer=1e3 * measured,
                ratio=said / measured,
                unit="ms",
                peer_name="measured (CPU time)",
                spread=spread(seconds),
                note=f"calibrates: {rate / 1e9:.0f} GFLOP/s" if place == 0 else "",
            )
        )
    return found


def _predicted(config: RunConfig, phase: str, rate: float) -> float:
    """Seconds of one step."""
    rows = config.order.rows_per_lane
    paper = estimate(config, rows, replace(Machine.cpu(1), flops=rate))
    return next(p for p in paper.phases if p.name == phase).step_s["compute"]


def _measured(row: Method, phase_name: str, terms: int, rows: int, clusters: int) -> list[float]:
    x = batch(rows, terms)
    settings = row.settings
    if METHODS[row.name].energy == "experts":
        settings = replace(settings, tau=1000.0)
    model = MixtureModel(row, settings, terms, clusters)
    phase = next(p for p in row.phases if p.name == phase_name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in phase.trains)
    loss = StepLoss(model, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, fused=True)
    totals: Stats = {}
    with torch.no_grad():
        for name in row.statistics_of(phase):
            scene = Scene(model, x, model.view(x, STATISTICS[name].needs), totals)
            totals |= STATISTICS[name].collect(scene)
            STATISTICS[name].apply(model, totals)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        value, _ = loss(x, Noise(0, 0, [0], [rows], "cpu"), phase, totals, rows)
        value.backward()
        optimizer.step()

    return interleaved({"ours": step}, 3, time.thread_time)["ours"]
