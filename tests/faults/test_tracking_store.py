"""A process that dies while MLflow makes its tables leaves nothing that stops the next one."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from distclust.config import TrackingConfig
from distclust.training.tracking import Tracker

OPEN = """
import sys
from pathlib import Path
from distclust.config import TrackingConfig
from distclust.training.tracking import Tracker
Tracker.open(TrackingConfig(uri=sys.argv[1]), Path(sys.argv[2]), name="run").finish("FINISHED")
"""


@pytest.mark.parametrize("size", [300_000, pytest.param(450_000, marks=pytest.mark.slow)])
def test_a_store_that_was_being_made(tmp_path, size):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN, uri, str(tmp_path / "run")], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while max((f.stat().st_size for f in tmp_path.glob("*mlflow.db")), default=0) < size:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "run" / "mlflow.json").exists(), "killed too late to test anything"
    tracker = Tracker.open(TrackingConfig(uri=uri), tmp_path / "run", name="run")
    assert tracker.run_id
    tracker.finish("FINISHED")
