"""For all tests: a real MLflow server where one is asked for, one torch thread, Ray's workers as important as
the tests that wait for them.

Some tests fork. A forked child hangs in the first operation that torch shares out over threads which only
its parent has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mlflow_server import MlflowServer

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")
torch.set_num_threads(1)


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path)
    running.start()
    yield running
    running.kill()
