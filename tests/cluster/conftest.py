"""What the cluster tests share: a corpus, runs that last long enough to be hit, and somebody who hits."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import runs
from corpora import make_corpus
from distclust.config import RunConfig
from distclust.mixture.methods import METHODS

if "ray" not in sys.modules:  # it reads this once; clusters of these tests are on the loopback only
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, shard_rows=runs.SHARD_ROWS, n_features=30)
    return folder


@pytest.fixture(scope="session")
def config() -> Callable[..., RunConfig]:
    """A DAMIC run of `epochs` epochs (4 steps each) a phase."""

    def make(workers: Any, epochs: int = 2, **more: Any) -> RunConfig:
        cluster = {"workers": workers, "start_timeout_s": 90.0, **more.pop("cluster", {})}
        phases = {
            p.name: {"epochs": epochs, "optimizer": {"learning_rate": 0.001}}
            for p in METHODS["damic"].phases
            if p.epochs
        }
        return runs.tiny_config("damic", cluster=cluster, phases=phases, **more)

    return make


class Killer(threading.Thread):
    """SIGKILL for one worker in the middle of each phase, told by what the run folder says, from outside.

    Args:
        run: the run folder.
        plan: (phase, rank) in the order of the phases.
        after_epoch: which epoch of the phase must be over.
    """

    def __init__(self, run: Path, plan: list[tuple[int, int]], after_epoch: int):
        super().__init__(daemon=True)
        self.after_epoch = after_epoch
        self.folder = run / "training"
        self.plan = plan
        self.kills: list[dict[str, Any]] = []
        self.start()

    def run(self) -> None:
        for number, (phase, rank) in enumerate(self.plan):
            while True:
                time.sleep(0.02)
                where, who = self._read("progress.json"), self._read("workers.json")
                if who.get("starts") != number + 1 or where.get("state") != "training":
                    continue
                if where["phase_index"] == phase and (
                    where["epochs"] == 0 or where["epoch"] > self.after_epoch
                ):
                    break
                if where["phase_index"] > phase:
                    return  # too late: the test sees that a kill is missing
            pid = who["workers"][rank]["pid"]
            os.kill(pid, signal.SIGKILL)
            while _lives(pid):
                time.sleep(0.02)
            self.kills.append({"phase": phase, "rank": rank, "pid": pid, "step": where["global_step"]})

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            return {}
        return found


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def killer() -> Iterator[Callable[..., Killer]]:
    return Killer
