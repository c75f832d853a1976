"""How a job goes on: who is told, and how long its parts took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distclust.config import RunConfig
from distclust.run_folder import Done


class Listener:
    """Who is told how a job goes on; this one keeps it to itself."""

    def stage(self, name: str) -> None:
        """A part of the job begins."""

    def advance(self, done: int, total: int, note: str = "") -> None:
        """It went on."""


SILENT = Listener()


_SAVED_EVERY = 15.0
"""Seconds of a phase that a killed process may lose of the times it has measured."""


class PhaseWatch:
    """Hears of the training's progress; measures each phase by this process' clock, and passes it on."""

    def __init__(self, config: RunConfig, done: Done, listener: Listener):
        self.done, self.listener = done, listener
        self.names = [phase.name for phase in config.phases]
        self.phase = -1
        self.since = time.monotonic()

    def __call__(self, progress: dict[str, Any]) -> None:
        if progress["state"] == "starting":
            self.listener.advance(0, progress["total_steps"], "starting")
            return
        self._turn_to(int(progress["phase_index"]))
        if progress["phase"]:
            loss, metrics = "", progress["metrics"]
            if "loss" in metrics:
                loss = f", loss {metrics['loss']:.4g}"
            epoch = f", epoch {min(progress['epoch'] + 1, progress['epochs'])}/{progress['epochs']}"
            note = progress["phase"] + (epoch if progress["epochs"] else "") + loss
        else:
            note = "trained"
        self.listener.advance(progress["global_step"], progress["total_steps"], note)

    def close(self) -> None:
        """The last phase that was heard of ends now."""
        self._turn_to(-1)
        self.done.save()

    def _turn_to(self, phase: int) -> None:
        now = time.monotonic()
        if phase == self.phase and now - self.since < _SAVED_EVERY:
            return
        # until the first phase is heard of, workers are being started
        name = (
            "start workers"
            if self.phase < 0
            else self.names[self.phase]
            if self.phase < len(self.names)
            else "stop"
        )
        self.done.add_seconds(name, now - self.since)
        self.done.add_seconds("train", now - self.since)
        if phase == self.phase:
            self.done.save()
        for skipped in self.names[max(self.phase, 0) : max(phase, 0)]:
            self.done.add_seconds(skipped, 0.0)  # done between two looks
        self.phase, self.since = phase, now


@contextmanager
def timed(add: Callable[[float], None]) -> Iterator[None]:
    """Tells how many seconds the block took, however it ended."""
    start = time.monotonic()
    try:
        yield
    finally:
        add(time.monotonic() - start)
