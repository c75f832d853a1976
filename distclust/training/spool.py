"""The file in which tracking waits for its server, and the text rules of what goes into a run.

A spool is JSON lines, append-only, readable by a person: what MLflow has not taken yet, oldest first.
Nothing here knows MLflow; `tracking.replay` sends a spool.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

MAX_KEY = 250  # characters of a parameter, metric or tag name that MLflow takes
MAX_PARAM = 6000  # characters of a parameter's value
MAX_TAG = 8000  # characters of a tag's value

RECORDS = frozenset({"run", "metric", "params", "tags", "dataset", "final", "artifacts", "model", "status"})
"""What a record of a spool can be."""

_NOT_IN_A_KEY = re.compile(r"[^/\w.\- :]")
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)(?:[^/\s@]*@)?(?P<rest>[^\s?#'\"]*)(?:\?[^\s'\"]*)?"
)


class MetricPoint(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    step: int
    timestamp_ms: int


class Spool:
    """The JSON lines that still have to be sent.

    Records other than metrics (parameters, tags, the final status) are kept until `tracking.replay`; metrics
    are also read back by the sink itself, in the order in which they were written. The driver may append
    while the sink's process reads; within a process, every method may be called from any thread.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._lock = threading.RLock()
        self._offset = 0  # bytes of the file that the sink has read and the server has taken

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records at the end.

        Raises:
            OSError: the disk does not take them.
        """
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        if not text:
            return
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                end = file.seek(0, os.SEEK_END)
                if end:
                    file.seek(end - 1)
                    if file.read(1) != b"\n":  # a process died in mid-line: keep its fragment off our line
                        file.write(b"\n")
                file.write(text.encode())

    def append_points(self, points: Iterable[MetricPoint]) -> None:
        """Write metric points at the end (see `append`)."""
        self.append(metric_record(point) for point in points)

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, oldest first; what a killed process left half-written is skipped with a warning."""
        for record, _ in self._read(0):
            if record["type"] != "torn":
                yield record

    def read_points(self, limit: int) -> tuple[list[MetricPoint], int | None]:
        """Up to `limit` points after the last `advance`, and the position behind them (None: no more)."""
        points: list[MetricPoint] = []
        position = None
        with self._lock:
            for record, end in self._read(self._offset):
                position = end
                if record["type"] == "metric":
                    points.append(point_of(record))
                    if len(points) == limit:
                        break
        return points, position

    def advance(self, position: int) -> None:
        """The server has taken the points before `position`; a file with nothing left in it is removed."""
        with self._lock:
            self._offset = position
            if self.path.exists() and position >= self.path.stat().st_size:
                self._drop_metrics()

    def has_metrics(self) -> bool:
        """Whether a metric point is waiting in the file."""
        with self._lock:
            return any(record["type"] == "metric" for record, _ in self._read(self._offset))

    def remove(self) -> None:
        """Delete the file: everything in it has been sent."""
        with self._lock:
            self._offset = 0
            self.path.unlink(missing_ok=True)

    def _drop_metrics(self) -> None:
        taken = self.path.with_name(self.path.name + ".sent")
        os.replace(self.path, taken)  # first out of the driver's way, which may append at any time
        self._offset = 0
        kept = [record for record, _ in _records(taken, 0) if record["type"] not in ("metric", "torn")]
        if any(record["type"] != "run" for record in kept):
            self.append(kept)
            self._offset = self.path.stat().st_size
        taken.unlink()

    def _read(self, start: int) -> Iterator[tuple[dict[str, Any], int]]:
        return _records(self.path, start)


def _records(path: Path, start: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The lines of a file from byte `start` on, each with the position behind it; a fragment is "torn"."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        position = file.seek(start)
        for line in file:
            position += len(line)
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("type"), str):
                    raise ValueError("no record")
            except (ValueError, TypeError):
                if line.strip():
                    logger.warning("%s: a half-written line ending at byte %d is skipped", path, position)
                record = {"type": "torn"}
            yield record, position


def metric_record(point: MetricPoint) -> dict[str, Any]:
    """The spool's form of a point; NaN and infinities as text, which plain JSON can hold."""
    value = point.value if math.isfinite(point.value) else str(point.value)
    return {
        "type": "metric",
        "key": point.key,
        "value": value,
        "step": point.step,
        "timestamp_ms": point.timestamp_ms,
    }


def point_of(record: Mapping[str, Any]) -> MetricPoint:
    """The inverse of `metric_record`."""
    return MetricPoint(
        record["key"], float(record["value"]), int(record["step"]), int(record["timestamp_ms"])
    )


def clean_key(key: str) -> str:
    """A name that MLflow takes: its characters, at most 250 of them, and no path that leaves its folder."""
    key = _NOT_IN_A_KEY.sub("_", str(key)).strip("/ ")
    key = re.sub(r"/+", "/", key)
    key = "/".join("_" if part in (".", "..") else part for part in key.split("/"))
    return shorten(key or "_", MAX_KEY)


def shorten(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters with `...` at the end where it is longer."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def redact(text: str) -> str:
    """`text` without the passwords and signed queries of the URLs in it."""
    return _URL.sub(lambda match: match["scheme"] + match["rest"], text)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as MLflow parameters: dotted names, short values, no secrets of URLs.

    >>> flatten({"model": {"hidden": [500, 10]}, "seed": 0})
    {'model.hidden': '[500, 10]', 'seed': '0'}
    """
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[clean_key(f"{prefix}{name}")] = shorten(redact(text), MAX_PARAM)
    return flat
