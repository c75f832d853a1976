"""Where a run stands, and what it tells the world outside."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: the next step to compute."""

    phase: int = 0
    epoch: int = 0
    """Within the phase."""
    step: int = 0
    """Within the epoch."""
    global_step: int = 0


class Hooks(Protocol):
    """What a run tells the world outside; only rank 0 logs."""

    def log(self, position: Position, phase: str, metrics: dict[str, float]) -> None: ...

    def pending(self) -> list[list[Any]]:
        """Metric points that nobody has acknowledged; they travel in the checkpoint."""
        ...

    def offer(self, points: list[list[Any]]) -> None:
        """Points from a checkpoint, to be logged unless they already are."""
        ...

    def after_step(self, position: Position) -> None: ...

    def saved(self, checkpoint: str, position: Position) -> None: ...


class NoHooks:
    """A run that tells nobody."""

    def log(self, position: Position, phase: str, metrics: dict[str, float]) -> None:
        log.info("step %d %s %s", position.global_step, phase, metrics)

    def pending(self) -> list[list[Any]]:
        return []

    def offer(self, points: list[list[Any]]) -> None:
        pass

    def after_step(self, position: Position) -> None:
        pass

    def saved(self, checkpoint: str, position: Position) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run leaves."""

    checkpoint: str
    """The last checkpoint, as `CheckpointStore.load` takes it."""
    phase_checkpoints: dict[str, str]
    """The checkpoint at the end of each phase, likewise."""
    global_steps: int
