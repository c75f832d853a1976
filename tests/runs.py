"""Helpers for tests that train: tiny configurations, and jobs for workers.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from distclust.config import RunConfig, resolve, to_dict

SHARD_ROWS = (11, 1, 20, 0, 17, 12)
"""61 rows in shards of awkward sizes: 4 steps an epoch of 6 lanes x 3 rows, the last one short."""
TINY_MODEL: dict[str, Any] = {
    "hidden": [8],
    "code_size": 4,
    "expert_hidden": [6],
    "expert_code_size": 3,
    "gate_hidden": [7],
}


def tiny_config(method: str, **changes: Any) -> RunConfig:
    """A run of a few steps a phase."""
    from distclust.mixture.methods import find_method

    row = find_method(method)
    rate = changes.pop("learning_rate", 0.01)
    phases = {p.name: {"epochs": 2, "optimizer": {"learning_rate": rate}} for p in row.phases if p.epochs}
    data: dict[str, Any] = {
        "method": method,
        "clusters": 3,
        "model": {**TINY_MODEL, **changes.pop("model", {})},
        "phases": changes.pop("phases", phases),
        "order": {"lanes": 6, "rows_per_lane": 3, "window": 2},
        "checkpoint": {"every_steps": 3, "keep": 2},
        "tracking": {"log_every": 1},
    }
    return resolve(data | changes)


def job(
    config: RunConfig, corpus: str | Path, run: str | Path, world: int = 1, **more: Any
) -> dict[str, Any]:
    """A job for workers.py."""
    run = Path(run)
    return {
        "config": to_dict(config),
        "corpus": str(corpus),
        "run": str(run),
        "world": world,
        "out": str(run) + ".jsonl",
        **more,
    }


def run_jobs(
    jobs: list[dict[str, Any]], folder: Path, name: str = "jobs", expect_success: bool = True
) -> None:
    """Run the jobs in one process tree; by default every worker must end well."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(jobs))
    script = Path(__file__).parent / "workers.py"
    done = subprocess.run(
        [sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    if expect_success:
        for one in jobs:
            assert set(exit_codes(one)) == {0}, f"{one['run']}: {exit_codes(one)}\n{done.stderr[-4000:]}"


def exit_codes(one: dict[str, Any]) -> list[int]:
    """How the job's workers ended."""
    codes: list[int] = json.loads(Path(f"{one['out']}.exit").read_text())
    return codes


def losses(one: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Metrics by global step; the last line for a step counts."""
    lines = [json.loads(line) for line in Path(one["out"]).read_text().splitlines()]
    return {step: metrics for step, _, metrics in lines}


def row_sequence(one: dict[str, Any]) -> dict[tuple[int, int], list[int]]:
    """Row numbers by (global step, lane), over all workers."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank in range(one["world"]):
        for line in Path(f"{one['out']}.rows-{rank}").read_text().splitlines():
            step, lane, numbers = json.loads(line)
            found[step, lane] = numbers
    return found


def final_weights(one: dict[str, Any]) -> dict[str, Tensor]:
    """The model of the newest checkpoint."""
    folders = sorted(p for p in Path(one["run"], "checkpoints").iterdir() if (p / "COMMIT").exists())
    return load_file(folders[-1] / "model.safetensors")
