"""What a running training tells the processes around it, in files under `RUN/training/`.

::

    workers.json    who works since the last start (rank, pid, host, node), and how often workers were started
    progress.json   where rank 0 stands, renewed while it lives
    error.json      an error that starting again cannot mend
    workers.log     what workers have to say: warnings of all, and more of rank 0

Files, because they need no open port, outlive whoever wrote them, and are on the storage that every node
shares anyway. Each is replaced as a whole, so a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distclust import errors
from distclust.config import RunConfig
from distclust.errors import DistclustError
from distclust.training.hooks import NoHooks, Position
from distclust.training.tracking import MetricPoint, MetricSink

log = logging.getLogger(__name__)

FOLDER = "training"
RENEW_S = 0.3
"""Least seconds between two versions of progress.json while steps go by."""
BEAT_S = 5.0
"""Seconds between two signs of life, steps or not."""
GRACE_S = 15.0
"""Seconds in which a worker should notice an error of another one by itself."""

Tell = Callable[[dict[str, Any]], None]


class RunState:
    """The files of one command (one call of `run_training`) on one run.

    Args:
        run_dir: the run folder, which exists.
        command: what tells this command's files from those of an earlier one.
    """

    def __init__(self, run_dir: str | Path, command: str):
        self.folder = Path(run_dir) / FOLDER
        self.command = command

    def clear(self) -> None:
        """Make the folder and remove what an earlier command left to say."""
        self.folder.mkdir(exist_ok=True)
        for name in ("error.json", "progress.json"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def log_file(self) -> Path:
        return self.folder / "workers.log"

    def progress(self) -> dict[str, Any]:
        """Where rank 0 stands; empty before it does anything."""
        return self._read("progress.json")

    def workers(self) -> dict[str, Any]:
        """`{"starts": 1, "start": ..., "workers": [{"rank": 0, "pid": ...}]}`, or empty before a start."""
        return self._read("workers.json")

    def superseded(self, start: str) -> bool:
        """Whether other workers than those of `start` belong to the run by now."""
        found = self._raw("workers.json")
        return bool(found) and (found.get("command"), found.get("start")) != (self.command, start)

    def error(self) -> dict[str, str] | None:
        """The error that ends this command, if a worker met one."""
        found = self._read("error.json")
        return found or None

    def write_progress(self, content: dict[str, Any]) -> None:
        self._write("progress.json", content)

    def write_workers(self, start: str, workers: list[dict[str, Any]]) -> None:
        """A new start: these workers, and no others, belong to the run."""
        before = self.workers().get("starts", 0)
        self._write("workers.json", {"starts": before + 1, "start": start, "workers": workers})

    def write_error(self, error: BaseException | dict[str, str]) -> None:
        """The first error stays; one that only echoes another worker's waits for that one's own words."""
        if type(error) is DistclustError:
            self.wait_for_error(3.0)
        content = error if isinstance(error, dict) else describe(error)
        if self.error() is None:
            with contextlib.suppress(OSError):  # a node that does not see the folder; its answer tells
                self._write("error.json", content)

    def wait_for_error(self, seconds: float) -> dict[str, str] | None:
        """The error, as soon as some worker has written it."""
        until = time.monotonic() + seconds
        while (found := self.error()) is None and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def _read(self, name: str) -> dict[str, Any]:
        found = self._raw(name)
        return found if found.get("command") == self.command else {}

    def _raw(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, name: str, content: dict[str, Any]) -> None:
        part = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        try:
            part.write_text(json.dumps({"command": self.command, **content}, indent=1) + "\n")
            os.replace(part, self.folder / name)
        finally:
            part.unlink(missing_ok=True)


def describe(error: BaseException) -> dict[str, str]:
    """An error as text, for `revive`."""
    return {"type": type(error).__name__, "message": str(error)}


def revive(found: dict[str, str]) -> DistclustError:
    """The error that `describe` wrote down: the same class of ours, the same words."""
    kind = getattr(errors, found["type"], None)
    if isinstance(kind, type) and issubclass(kind, DistclustError):
        return kind(found["message"])
    return DistclustError(f"{found['type']}: {found['message']}")


class RunHooks(NoHooks):
    """Rank 0's hooks: metrics go to the sink, the position to `tell`.

    Args:
        config: the run's, for the names and lengths of its phases.
        steps_per_epoch: of the run's order.
        sink: where metrics go; None where nothing is tracked.
        tell: called with the progress (see `content`) every `RENEW_S` seconds at most, and at checkpoints.
    """

    def __init__(self, config: RunConfig, steps_per_epoch: int, sink: MetricSink | None, tell: Tell):
        self._phases, self._steps_per_epoch = config.phases, steps_per_epoch
        self._sink, self._tell = sink, tell
        self._position: Position | None = None
        self._metrics: dict[str, float] = {}
        self._checkpoint = ""
        self._told = float("-inf")
        self._beats = 0
        self._lock = threading.Lock()

    def log(self, position: Position, phase: str, metrics: dict[str, float]) -> None:
        self._metrics = metrics
        if self._sink is not None:
            self._sink.log(position.global_step, metrics)

    def pending(self) -> list[list[Any]]:
        return [list(point) for point in self._sink.pending()] if self._sink is not None else []

    def offer(self, points: list[list[Any]]) -> None:
        if self._sink is not None:
            self._sink.offer([MetricPoint(*point) for point in points])

    def after_step(self, position: Position) -> None:
        self._position = position
        if time.monotonic() - self._told >= RENEW_S:
            self.tell()

    def saved(self, checkpoint: str, position: Position) -> None:
        self._position, self._checkpoint = position, checkpoint
        self.tell()

    def tell(self) -> None:
        """Say where the run stands, and that it lives."""
        with self._lock:
            self._told = time.monotonic()
            self._beats += 1
            try:
                self._tell(self.content())
            except OSError as error:  # a full disk stops the run at its next checkpoint, not here
                log.warning("progress cannot be written: %s", error)

    def content(self) -> dict[str, Any]:
        """The progress, as progress.json and `on_progress` have it."""
        position = self._position or Position()
        done = position.phase >= len(self._phases)
        phase = None if done else self._phases[position.phase]
        return {
            "state": "starting" if self._position is None else "finished" if done else "training",
            "phase": "" if phase is None else phase.name,
            "phase_index": position.phase,
            "phases": len(self._phases),
            "epoch": position.epoch,
            "epochs": 0 if phase is None else phase.epochs,
            "step": position.step,
            "steps_per_epoch": self._steps_per_epoch,
            "global_step": position.global_step,
            "total_steps": sum(
                p.epochs * (1 if p.by_sweeps else self._steps_per_epoch) for p in self._phases
            ),
            "metrics": dict(self._metrics),
            "checkpoint": self._checkpoint,
            "beat": self._beats,
        }


@contextmanager
def beating(hooks: RunHooks) -> Iterator[None]:
    """Signs of life while nothing else is to be said (k-means, a pass over the data)."""
    stop = threading.Event()

    def beat() -> None:
        hooks.tell()
        while not stop.wait(BEAT_S):
            hooks.tell()

    thread = threading.Thread(target=beat, name="distclust-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        hooks.tell()


@contextmanager
def watching(state: RunState, start: str) -> Iterator[None]:
    """End this process when it should not go on and cannot know.

    It waits for a worker that met an error, or the driver gave up, or other workers have taken over the run.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(BEAT_S):
            found = state.error()
            if found is not None and (found.get("by") == "driver" or not over.wait(GRACE_S)):
                os._exit(3)
            if state.superseded(start):
                os._exit(4)

    threading.Thread(target=watch, name="distclust-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def log_to_file(file: Path, rank: int) -> None:
    """Write what this worker logs to workers.log: warnings, and of rank 0 more."""
    handler = logging.FileHandler(file)
    line = f"%(asctime)s worker {rank} %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(line))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    ours = logging.getLogger("distclust")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)


def pass_warnings_on(file: Path, position: int) -> int:
    """Log what workers.log has from `position` on, warnings and worse only; returns how far it was read."""
    try:
        with file.open("rb") as lines:
            lines.seek(position)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                text = line.decode(errors="replace").rstrip()
                if " WARNING " in text or " ERROR " in text:
                    log.warning("%s", text)
    except OSError:
        pass
    return position
