"""The queue between a training step and a tracking server: never raises, never blocks, sends no step twice.

Order is the whole trick. Points leave in the order in which they came (older ones from the spool file, then
memory), so of each key the server always holds a prefix, and its highest step says what is missing. That
number is asked for at the start and after every failure: a request that timed out may have been applied.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

from distclust.training.spool import MetricPoint, Spool, clean_key, redact, shorten

logger = logging.getLogger(__name__)

MAX_BATCH = 1000  # points that MLflow takes in one request
MIN_BATCH = 50  # no request gets smaller than this because others failed; a few kB pass everywhere
FIRST_DELAY_S = 0.5  # before the first repetition of a failed request; doubled for each further one
LAST_DELAY_S = 30.0
LONG_AWAY_S = 30.0  # a server that has been away for longer gets one more chance at the end, not ten seconds


class RunGoneError(Exception):
    """The run cannot take metrics and never will: deleted, or not on this server."""


class PointRefusedError(Exception):
    """The server understood the points and does not want them."""


class Server(Protocol):
    """What a queue needs of a tracking server; both methods may raise anything."""

    def last_steps(self) -> dict[str, int]:
        """The highest step of each key of the run. Raises `RunGoneError` where there is no such run."""

    def send(self, points: Sequence[MetricPoint]) -> None:
        """Store at most `MAX_BATCH` points. Raises `PointRefusedError` where it is no use to try again."""


class PointQueue:
    """Points on their way to a server, sent by a daemon thread.

    Of each key, steps must grow: a step at or below the highest one that the server has is dropped. In memory
    wait at most `memory_points` (and what arrives during one request); older ones move to the spool file, and
    back when the server answers again.

    Args:
        server: where points go; None keeps everything in the spool.
        spool: where points wait when memory is full, and where `close` leaves what could not be sent.
        header: first line of a new spool file: whose points these are.
        memory_points: the bound (a point takes about 250 bytes).
        interval_s: the longest time that a point waits for others to share its request.
    """

    def __init__(
        self,
        server: Server | None,
        spool: Path | str,
        header: Mapping[str, object] | None = None,
        *,
        memory_points: int = 100_000,
        interval_s: float = 1.0,
    ):
        self.spool = Spool(spool)
        self._header = dict(header or {})
        self._server = server
        self._memory_points = memory_points
        self._interval_s = interval_s
        self._queue: deque[MetricPoint] = deque()
        self._marks: dict[str, int] | None = None  # the server's highest step of each key; None: ask again
        self._keys: dict[str, str] = {}
        self._batch = MAX_BATCH
        self._failing_since: float | None = None
        self._delay_s = 0.0
        self._closing = False
        self._abandoned = False
        self._complained: set[str] = set()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="metric-queue", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the values of one step. Costs microseconds and never raises."""
        try:
            now = int(time.time() * 1000)
            points = []
            for key, value in metrics.items():
                name = self._keys.get(key)
                if name is None:
                    name = self._keys[key] = clean_key(key)
                points.append(MetricPoint(name, float(value), int(step), now))
            with self._changed:
                self._queue.extend(points)
        except Exception as error:  # a metric is not worth a training
            self._complain("log", f"metrics of step {step} are lost: {error!r}")

    def offer(self, points: Iterable[MetricPoint]) -> None:
        """Queue points of a checkpoint, before the first `log`; those that the server has are dropped."""
        with self._changed:
            self._queue.extend(MetricPoint(*point) for point in points)

    def pending(self) -> list[MetricPoint]:
        """The points in memory that no server has acknowledged (those in the spool file are safe there)."""
        with self._changed:
            return list(self._queue)

    def close(self, timeout_s: float = 10.0) -> Path | None:
        """Send what is left and stop.

        Returns:
            The spool file where something could not be sent within `timeout_s`, else None. A server that has
            been away for long gets one more chance only.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            self._abandoned = True  # from here on the thread touches nothing, even if its request returns
            left = list(self._queue)
            self._queue.clear()
        try:
            self._to_file(left)
            if not self.spool.has_metrics():
                return None
        except OSError as error:
            logger.warning(
                "%d metric points are lost: %s cannot be written (%s)", len(left), self.spool.path, error
            )
            return None
        logger.warning(
            "metric points that the tracking server has not taken are in %s; "
            "send them with distclust.training.tracking.replay(%r, uri), or give the same command again",
            self.spool.path,
            str(self.spool.path),
        )
        return self.spool.path

    # ---- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                closing = self._changed.wait_for(lambda: self._closing, self._delay_s or self._interval_s)
            if self._abandoned:
                return
            long_away = (
                self._failing_since is not None and time.monotonic() - self._failing_since > LONG_AWAY_S
            )
            try:
                self._drain()
            except Exception as error:  # whatever a client library can raise; the thread must outlive it
                self._marks = None
                # a request may have been too large, or the server too slow for it
                self._batch = min(self._batch, max(MIN_BATCH, self._batch // 2))
                self._failing_since = self._failing_since or time.monotonic()
                self._complain("send", f"the tracking server does not take metrics, trying again: {error}")
                self._spill(self._memory_points)
                self._delay_s = min(max(FIRST_DELAY_S, 2 * self._delay_s), LAST_DELAY_S)
                if closing and not long_away:
                    time.sleep(min(self._delay_s, 1.0))
                    continue
            else:
                self._complained.discard("send")
            if closing:
                return

    def _drain(self) -> None:
        """Send everything that waits; returns when nothing does."""
        while not self._abandoned:
            if self._server is None:
                self._spill(0)
                return
            self._spill(self._memory_points)
            if not self._queue and not self.spool.path.exists():
                return
            try:
                if self._marks is None:
                    self._marks = self._server.last_steps()
            except RunGoneError as error:
                self._complain("gone", f"metrics go to {self.spool.path} from now on: {error}")
                self._server = None
                continue
            points, position = self.spool.read_points(self._batch)
            if position is None:
                with self._changed:
                    points = list(islice(self._queue, self._batch))
                if not points:
                    return
            if self._send(points):
                self._acknowledge(len(points), position)

    def _send(self, points: list[MetricPoint]) -> bool:
        """Send what the server lacks of these points; False: try again in smaller batches."""
        assert self._server is not None
        assert self._marks is not None
        marks = dict(self._marks)
        fresh = []
        for point in points:
            if point.key not in marks or point.step > marks[point.key]:
                marks[point.key] = point.step
                fresh.append(point)
        try:
            if fresh:
                self._server.send(fresh)
        except PointRefusedError as error:
            if len(points) > 1:
                self._batch = len(points) // 2  # until the one that is refused stands alone
                self._marks = None
                return False
            self._complain(f"refused {fresh[0].key}", f"{fresh[0]} is refused: {error}")
        self._marks = marks
        self._batch = min(MAX_BATCH, self._batch + self._batch // 8 + 1)
        self._delay_s, self._failing_since = 0.0, None
        return True

    def _acknowledge(self, count: int, position: int | None) -> None:
        if position is not None:
            self.spool.advance(position)
            return
        with self._changed:
            if not self._abandoned:
                for _ in range(count):
                    self._queue.popleft()

    def _spill(self, keep: int) -> None:
        """Move the oldest points to the file until at most `keep` are in memory."""
        with self._changed:
            oldest = list(islice(self._queue, max(0, len(self._queue) - keep)))
        if not oldest or self._abandoned:
            return
        try:
            self._to_file(oldest)  # not under the lock: a slow disk must not hold up log()
        except OSError as error:
            self._complain(
                "disk", f"older metric points are lost: {self.spool.path} cannot be written ({error})"
            )
        self._acknowledge(len(oldest), None)

    def _to_file(self, points: Sequence[MetricPoint]) -> None:
        if points and self._header and not self.spool.path.exists():
            self.spool.append([{"type": "run", **self._header}])
        self.spool.append_points(points)

    def _complain(self, kind: str, message: str) -> None:
        """Warn once for each kind of trouble; a server that is away for days must not fill the log."""
        if kind not in self._complained:
            self._complained.add(kind)
            logger.warning("%s", shorten(redact(message).splitlines()[0], 500))
