"""The clock of a job's parts: every start of a run adds to it, however the one before ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distclust import progress
from distclust.config import resolve
from distclust.progress import SILENT, PhaseWatch
from distclust.run_folder import Done


def heard(phase: int) -> dict[str, Any]:
    """What the training says once in a while."""
    return {
        "state": "running",
        "phase_index": phase,
        "phase": "a phase",
        "metrics": {},
        "epoch": 0,
        "epochs": 1,
        "global_step": 1,
        "total_steps": 9,
    }


def test_a_killed_process_leaves_the_times_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    config = resolve({"method": "dmae", "clusters": 3})
    names = [phase.name for phase in config.phases]

    killed = PhaseWatch(config, Done(tmp_path / "done.json"), SILENT)
    for clock[0], phase in ((102.0, 0), (110.0, 0), (130.0, 0), (139.0, 0)):  # and no word any more
        killed(heard(phase))
    seconds = Done(tmp_path / "done.json").seconds
    assert seconds == {"start workers": 2.0, names[0]: 28.0, "train": 30.0}

    clock[0] = 500.0
    again = PhaseWatch(config, Done(tmp_path / "done.json"), SILENT)
    for clock[0], phase in ((501.0, 0), (505.0, 1), (506.0, 2)):
        again(heard(phase))
    clock[0] = 516.0
    again.close()
    seconds = Done(tmp_path / "done.json").seconds
    assert seconds["start workers"] == 3.0 and seconds[names[0]] == 32.0
    assert seconds[names[2]] == 10.0 and seconds["train"] == 46.0
