"""The driver dies with SIGKILL, and the same command goes on: the same run, no step logged twice."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from distclust.config import RunConfig, TrackingConfig, to_dict
from distclust.training.tracking import Tracker

pytestmark = pytest.mark.slow

DRIVER = """
import json, sys
from distclust.config import from_dict
from distclust.training.cluster import run_training

job = json.loads(open(sys.argv[1]).read())
config = from_dict(job["config"])
print(run_training(config, job["corpus"], job["run"], tracking=tuple(job["tracking"])).global_steps)
"""


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def logged(tracker: Tracker) -> list[int]:
    """Steps of the loss that MLflow has."""
    client, run_id = tracker._client, tracker.run_id
    assert client is not None
    assert run_id is not None
    return [point.step for point in client.get_metric_history(run_id, "loss")]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_driver_is_followed_by_one_that_goes_on(
    config: Callable[..., RunConfig], corpus: Path, tmp_path: Path
) -> None:
    # checkpoints at the ends of phases only: many steps are done again, and their points are on the server
    # already
    asked = config(1, epochs=150, checkpoint={"every_steps": 10_000, "keep": 2})
    whole = runs.job(asked, corpus, tmp_path / "whole", 1)
    runs.run_jobs([whole], tmp_path)
    run = tmp_path / "run"
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    tracker = Tracker.open(tracking, run, name="killed")
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps(
            {
                "config": to_dict(asked),
                "corpus": str(corpus),
                "run": str(run),
                "tracking": [tracker.uri, tracker.run_id],
            }
        )
    )
    command = [sys.executable, "-c", DRIVER, str(job)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE)
    progress = run / "training" / "progress.json"
    while True:
        assert first.poll() is None
        where = read(progress)
        if where.get("phase_index") == 2 and max(logged(tracker), default=0) > 620:
            break
        assert where.get("phase_index", 0) <= 2
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before = read(progress)
    workers = [worker["pid"] for worker in read(run / "training" / "workers.json")["workers"]]
    until = time.monotonic() + 60
    while any(lives(pid) for pid in workers):  # nobody goes on working on the run
        assert time.monotonic() < until, workers
        time.sleep(0.2)
    assert before["phase_index"] <= 2  # it died in mid-phase

    assert max(logged(tracker)) < 1200

    second = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert second.stdout.split() == ["2400"]
    log = (run / "training" / "workers.log").read_text()
    assert re.search(r"resuming from \S+/0000000600-02-after-initialise ", log)
    one, other = runs.final_weights(whole), runs.final_weights({"run": str(run)})
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(logged(tracker)) == list(range(1, 2401))  # each step once, none missing
    tracker.finish("FINISHED")
