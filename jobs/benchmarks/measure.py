"""What the parts share: a row of the table, interleaved timing, generated batches, memory of a process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distclust.corpus.generate import GenerateConfig, generate_shard
from distclust.mixture.sparse import SparseRows

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. `ratio` says how many times better ours is than the peer; None without one."""

    name: str
    ours: float | None
    unit: str
    peer: float | None = None
    ratio: float | None = None
    peer_name: str = ""
    """What the peer is, or why there is none ("not installed")."""
    spread: float | None = None
    """Half the range between the quartiles of the repetitions of ours, as a share of their median."""
    note: str = ""
    """The target, and what the arithmetic allows."""


def interleaved(
    functions: Mapping[str, Callable[[], Any]], repetitions: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each repetition: one round warms up, then each round runs every function once."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            started = clock()
            function()
            if repetition:
                seconds[name].append(clock() - started)
    return seconds


def spread(values: list[float]) -> float:
    """Half the interquartile range as a share of the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / statistics.median(values)


def paired_ratio(peer: list[float], ours: list[float]) -> float:
    """The median over rounds of peer's time to ours: a load that comes and goes falls on both."""
    return statistics.median(p / o for p, o in zip(peer, ours, strict=True))


def step_clock(threads: int) -> Clock:
    """The clock for a computation on so many threads.

    On one thread the CPU's time: what other processes take does not count. On several the wall's, since the
    threads of OpenMP use CPU time while they wait for each other.
    """
    return time.thread_time if threads == 1 else time.perf_counter


def batch(rows: int, terms: int, seed: int = 0) -> SparseRows:
    """RCV1-shaped rows: 77 non-zeros in the mean, Zipf frequencies."""
    table = generate_shard(GenerateConfig(rows=rows, terms=terms, rows_per_shard=rows, seed=seed), 0)
    indices = table.column("indices").combine_chunks()
    values = table.column("values").combine_chunks().values.to_numpy()
    parts = [np.array(part) for part in (indices.offsets.to_numpy(), indices.values.to_numpy(), values)]
    offsets, places, weights = map(torch.from_numpy, parts)
    return SparseRows(offsets, places, weights, terms)


def in_a_process(module: str, *arguments: object) -> dict[str, Any]:
    """What `python -m module arguments` prints as its last line, parsed as JSON."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def peak_memory() -> int:
    """The most bytes of memory that this process has had, pages of mapped files among them; 0 if unknown.

    Not `ru_maxrss`: a process that was forked and executed starts with its parent's.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0
