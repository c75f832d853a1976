"""Peak memory of whole runs over RCV1's full vocabulary: every phase of a row, in a process of its own.

    python -m jobs.benchmarks.memory METHOD CORPUS RUN_FOLDER EPOCHS

The process trains without Ray (`cluster.workers=0`): it is the driver and the only worker, and writes its
checkpoints.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from distclust.config import RunConfig, resolve
from distclust.corpus.generate import RCV1_TERMS, GenerateConfig, generate_corpus
from jobs.benchmarks.measure import Row, in_a_process, peak_memory

CLUSTERS = 20
LIMIT = 4e9
"""Bytes that a run may take."""
RUNS: dict[str, dict[str, Any]] = {
    "dmae": {},
    "idec": {},
    # 20 experts of the row's own width, 256, have 484 million parameters: 7.7 GB with gradients and Adam
    "damic": {"expert_hidden": [64]},
}
"""Rows of the table, and the settings that are not their own."""


def config(method: str, epochs: int, clusters: int = CLUSTERS) -> RunConfig:
    """The row with so many epochs in each phase that has any, 1,024 rows a step, its own sizes but for
    `RUNS`."""
    data: dict[str, Any] = {
        "method": method,
        "clusters": clusters,
        "model": RUNS[method],
        "order": {"lanes": 8, "rows_per_lane": 128},
        # one in the middle of each phase, too: it holds the optimiser's moments, those at the end do not
        "checkpoint": {"every_steps": 10},
        "tracking": {"enabled": False},
        "cluster": {"workers": 0},
    }
    trained = {phase.name: {"epochs": epochs} for phase in resolve(data).phases if phase.epochs}
    return resolve(data | {"phases": trained})


def memory(quick: bool) -> list[Row]:
    """Megabytes at the highest point, and what parameters, gradients and Adam's moments are of them."""
    documents, epochs = 4_096 if quick else 20_000, 1
    found = []
    with tempfile.TemporaryDirectory() as name:
        corpus = f"{name}/corpus"
        generate_corpus(corpus, GenerateConfig(rows=documents, terms=RCV1_TERMS))
        for method, settings in RUNS.items():
            run = in_a_process(__name__, method, corpus, f"{name}/{method}", epochs)
            frozen = run["parameters"] - run["trained"]
            state = 4 * frozen + 16 * run["trained"]
            sizes = "".join(f", {key}={value}" for key, value in settings.items())
            found.append(
                Row(
                    name=f"peak memory, {method}, {RCV1_TERMS:,} terms, K {CLUSTERS}",
                    ours=run["peak"] / 1e6,
                    unit="MB",
                    note=f"limit {LIMIT / 1e6:,.0f}; {run['parameters'] / 1e6:.1f} million parameters"
                    f"{f', {frozen / 1e6:.1f} of them frozen' if frozen else ''}, {state / 1e6:,.0f} MB with "
                    f"gradients and Adam; phases {run['phases']}, {documents:,} documents, "
                    f"{run['steps']} steps, {run['seconds']:.0f} s{sizes}",
                )
            )
    return found


def main(method: str, corpus: str, folder: str, epochs: int) -> None:
    """One run in this process; the high-water mark is the system's own (`VmHWM`)."""
    from distclust.corpus.shards import Manifest
    from distclust.mixture.model import MixtureModel
    from distclust.training.cluster import run_training

    settings, started = config(method, epochs), time.perf_counter()
    outcome = run_training(settings, corpus, Path(folder))
    found = {
        "peak": peak_memory(),
        "seconds": time.perf_counter() - started,
        "steps": outcome.global_steps,
        "phases": ", ".join(outcome.phase_checkpoints),
    }
    # after the peak was read, since counting builds a model once more
    features = Manifest.load(corpus).n_features
    model = MixtureModel(settings.row, settings.model, features, settings.clusters)
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    found["trained"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    row, root, run, of_phase = sys.argv[1:]
    main(row, root, run, int(of_phase))
