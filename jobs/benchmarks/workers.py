"""Two workers of one thread under Ray Train against two processes of one thread that know nothing of each
other.

    python -m jobs.benchmarks.workers CORPUS RUN_FOLDER ROWS STEPS
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from distclust.config import RunConfig, resolve
from jobs.benchmarks.measure import Row

LANES = 8


def config(workers: int, rows_in_step: int, epochs: int) -> RunConfig:
    """The autoencoder's pretraining, some epochs, a point of the log every 2 steps, no checkpoint between."""
    return resolve(
        {
            "method": "ae-kmeans",
            "clusters": 10,
            "model": {"hidden": [500, 500, 2000], "code_size": 10, "input_dropout": 0.0},
            "phases": {"pretrain": {"epochs": epochs}},
            "order": {"lanes": LANES, "rows_per_lane": rows_in_step // LANES},
            "checkpoint": {"every_steps": 100_000},
            "tracking": {"enabled": False, "log_every": 2},
            "cluster": {"workers": workers, "cpus_per_worker": 1},
        }
    )


def speed(corpus: str, folder: str, settings: RunConfig) -> float:
    """Median rows/s over the points of the log, the first two left out; k-means is not in them."""
    from distclust.training.cluster import run_training

    found: dict[int, float] = {}

    def listen(progress: dict[str, Any]) -> None:
        if "docs_per_second" in progress["metrics"]:
            found[progress["global_step"]] = progress["metrics"]["docs_per_second"]

    run_training(settings, corpus, folder, on_progress=listen)
    return statistics.median(list(found.values())[2:])


def workers(quick: bool) -> list[Row]:
    """Rows/s of both, in turns. The step of two workers has twice the rows, so each computes as many."""
    from distclust.corpus.generate import GenerateConfig, generate_corpus

    found = []
    for rows in (512,) if quick else (1024, 4096):
        ours, peer = [], []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            corpus = str(folder / "corpus")
            generate_corpus(corpus, GenerateConfig(rows=12 * rows, terms=2000, rows_per_shard=2 * rows))
            for turn in range(1 if quick else 2):
                ours.append(speed(corpus, str(folder / f"two-{turn}"), config(2, 2 * rows, 4)))
                command = [sys.executable, "-m", __name__, corpus]
                alone = [
                    subprocess.Popen(
                        [*command, str(folder / f"alone-{turn}-{number}"), str(rows), "2"],
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                    for number in range(2)
                ]
                peer.append(sum(json.loads(one.communicate()[0].splitlines()[-1]) for one in alone))
        found.append(
            Row(
                name=f"two workers of one thread, {rows:,} rows each a step (wall time)",
                ours=statistics.median(ours),
                peer=statistics.median(peer),
                ratio=statistics.median(o / p for o, p in zip(ours, peer, strict=True)),
                unit="rows/s",
                peer_name="two unconnected processes of one thread, summed",
                note="target 0.9; Ray Train, gloo and the all-reduce of 18 MB included",
            )
        )
    return found


if __name__ == "__main__":
    root, run, of_step, epochs = sys.argv[1:]
    sys.stdout.write(json.dumps(speed(root, run, config(0, int(of_step), int(epochs)))) + "\n")
