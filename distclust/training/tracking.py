"""MLflow behind a queue that never stops training.

`Tracker` is the driver's: one MLflow run for a training, made or taken up again by the id in the run folder.
`MetricSink` is rank 0's: a queue and a thread (see metric_sink.py). A server that is slow or away costs the
metrics' timeliness and nothing else; what it has not taken stays in a file that `replay` sends later.

`mlflow` is imported inside functions: that takes seconds, and a worker that starts should not wait for it.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from distclust.errors import TrackingError
from distclust.training.metric_sink import MAX_BATCH, PointQueue, PointRefusedError, RunGoneError
from distclust.training.provenance import code_version, dataset_record
from distclust.training.reach import limits, reach, sole_maker, sqlite_file
from distclust.training.records import apply, last_steps, log_points
from distclust.training.run_identity import begin, is_away, read_identity, unusable
from distclust.training.spool import (
    MAX_TAG,
    RECORDS,
    MetricPoint,
    Spool,
    clean_key,
    flatten,
    point_of,
    redact,
    shorten,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from distclust.config import TrackingConfig

__all__ = ["MetricPoint", "MetricSink", "Tracker", "code_version", "replay"]

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

SPOOL_NAME = "metrics-unsent.jsonl"
QUIET_S = 15.0  # after a failure, the driver's calls go straight to the spool for this long

_REFUSED_CODES = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"}


class MetricSink(PointQueue):
    """Rank 0's way to the run, wherever rank 0 runs; never raises, never blocks.

    Args:
        uri: the tracking server.
        run_id: the MLflow run; None (the server was away at the start) keeps everything in the spool.
        spool: the file for what cannot be sent, in the run folder.
    """

    def __init__(self, uri: str, run_id: str | None, spool: Path | str, **options: Any):
        server = _RunServer(uri, run_id) if run_id else None
        super().__init__(server, spool, {"run_id": run_id, "uri": redact(uri)}, **options)


class Tracker:
    """One MLflow run, seen from the driver.

    After `open`, nothing here raises: what the server does not take goes to the spool, with a warning. As a
    context manager it always ends the run: FINISHED, KILLED on KeyboardInterrupt and SystemExit, FAILED on
    other errors.

    Attributes:
        run_id: the MLflow run's id; None while the server has never been reached.
        uri: the tracking server.
        spool: the file that holds what the server has not taken.
    """

    def __init__(self, uri: str, run_dir: Path, client: MlflowClient | None, run_id: str | None):
        self.uri = uri
        self.run_id = run_id
        self.spool = run_dir / SPOOL_NAME
        self._client = client
        self._quiet_until = 0.0
        self._ended = False

    @classmethod
    def open(cls, tracking: TrackingConfig, run_dir: Path, *, name: str) -> Tracker:
        """Start the run of `run_dir`, or take it up again.

        The run is the one of `run_dir/mlflow.json`, else that of the environment's MLFLOW_RUN_ID, else a new
        one. What an earlier attempt left in the spool is sent first. The code's version is among the tags.

        Raises:
            TrackingError: the server does not answer and `on_unreachable` is "fail"; or it answers and the
                run or the experiment cannot be used.
        """
        run_dir = run_dir.absolute()
        uri = tracking_uri(tracking, run_dir)
        try:
            with limits(timeout_s=5, retries=0):
                reach(uri)
                with sole_maker(uri):
                    _make_store(uri)
                    client = _connect(uri)
                    run_id = begin(client, uri, tracking.experiment, run_dir, name)
                tracker = cls(uri, run_dir, client, run_id)
                tracker._send_spool()
                client.update_run(run_id, status="RUNNING")
        except TrackingError:
            raise
        except Exception as error:
            spool = Spool(run_dir / SPOOL_NAME)
            reason = unusable(uri, tracking, spool.path, error)
            if reason is not None:
                raise TrackingError(reason) from error
            stored = read_identity(run_dir).get("run_id")
            header = {"run_id": stored, "uri": redact(uri), "experiment": tracking.experiment, "name": name}
            spool.append([{"type": "run", **header, "start_ms": _now_ms()}])
            logger.warning(
                "%s does not answer; going on, and keeping everything in %s", redact(uri), spool.path
            )
            tracker = cls(uri, run_dir, None, stored)
        version = code_version()
        tracker.log_tags(
            {"distclust.version": version["version"], "distclust.modified": version.get("modified", "false")}
            | ({"mlflow.source.git.commit": version["commit"]} if "commit" in version else {})
        )
        return tracker

    @property
    def how_to_open(self) -> str:
        """One line for the user: the command or the address that shows the run."""
        if self.uri.startswith(("http://", "https://")):
            experiment_id = read_identity(self.spool.parent).get("experiment_id")
            page = f"/#/experiments/{experiment_id}/runs/{self.run_id}" if self.run_id else ""
            return redact(self.uri).rstrip("/") + page
        program = Path(sys.executable).with_name("mlflow")  # it need not be on the PATH
        shown = min(str(program), os.path.relpath(program), key=len) if program.exists() else "mlflow"
        return f"{shown} ui --backend-store-uri {redact(self.uri)}"

    def log_params(self, config: Mapping[str, Any]) -> None:
        """The configuration, nested or flat; what a resumed run changes becomes a tag `resumed.NAME`."""
        self._log({"type": "params", "params": flatten(config)})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; later ones replace earlier ones."""
        self._log(
            {
                "type": "tags",
                "tags": {clean_key(k): shorten(redact(str(v)), MAX_TAG) for k, v in tags.items()},
            }
        )

    def log_dataset(self, manifest: Mapping[str, Any], path: str, *, fingerprint: str = "") -> None:
        """The corpus as the run's input: its name, place, counts and fingerprint (the manifest's)."""
        self._log(dataset_record(manifest, path, fingerprint))

    def log_final(self, metrics: Mapping[str, float]) -> None:
        """The run's closing figures. The same value again is not logged; another one gets the next step."""
        values = {clean_key(k): v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        self._log({"type": "final", "metrics": values, "timestamp_ms": _now_ms()})

    def log_artifacts(self, path: Path, artifact_path: str | None = None) -> None:
        """A file or folder, under the run's artifact folder `artifact_path`."""
        if not path.exists():
            logger.warning("%s does not exist; the run goes without it", path)
            return
        self._log({"type": "artifacts", "path": str(path.absolute()), "artifact_path": artifact_path})

    def log_model(
        self, folder: Path, *, name: str = "model", register_as: str | None = None, alias: str | None = None
    ) -> str | None:
        """The MLflow model in `folder` (results.served_model.save_served_model), with optional registration.

        Returns:
            The model's URI (`models:/...`), or None where it waits in the spool; the folder must then stay.
        """
        path = str(folder.absolute())
        uri = self._log(
            {"type": "model", "path": path, "name": name, "register_as": register_as, "alias": alias}
        )
        return str(uri) if uri else None

    def finish(self, status: Status) -> Path | None:
        """End the run. Returns the spool where the server lacks something, else None."""
        self._ended = True
        self._send_spool()
        self._log({"type": "status", "status": status, "end_ms": _now_ms()})
        if not self.spool.exists():
            return None
        logger.warning(
            "what the tracking server has not taken is in %s; send it with: distclust replay %s URI",
            self.spool,
            self.spool.parent,
        )
        return self.spool

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not self._ended:
            killed = kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit))
            self.finish("FINISHED" if kind is None else "KILLED" if killed else "FAILED")

    def _log(self, record: dict[str, Any]) -> Any:
        """Apply a record on the server, or keep it in the spool."""
        if self._client is not None and self.run_id is not None and time.monotonic() >= self._quiet_until:
            try:
                with limits(timeout_s=120 if record["type"] in ("model", "artifacts") else 20, retries=1):
                    return apply(self._client, self.run_id, record)
            except Exception as error:
                if is_away(error):
                    self._quiet_until = time.monotonic() + QUIET_S
                logger.warning(
                    "the tracking server does not take the run's %s, which go to %s: %s",
                    record["type"],
                    self.spool,
                    redact(str(error)),
                )
        try:
            spool = Spool(self.spool)
            if not self.spool.exists():
                spool.append([{"type": "run", "run_id": self.run_id, "uri": redact(self.uri)}])
            spool.append([record])
        except OSError as error:
            logger.warning(
                "the run's %s are lost: %s cannot be written (%s)", record["type"], self.spool, error
            )
        return None

    def _send_spool(self) -> None:
        if self._client is None or self.run_id is None or not self.spool.exists():
            return
        try:
            with limits(timeout_s=20, retries=0):
                _replay_into(self._client, self.run_id, Spool(self.spool))
        except Exception as error:
            self._quiet_until = time.monotonic() + QUIET_S
            logger.warning("%s could not be sent yet: %s", self.spool, redact(str(error)))


def replay(spool: Path | str, uri: str) -> str:
    """Send a spool, or the spool of a run folder, to a tracking server; remove the file when all is there.

    Points that the run has are not sent again, so a replay that was cut off can be given again.

    Returns:
        The MLflow run's id.

    Raises:
        TrackingError: no such file, the server does not answer, or it refuses something; the file stays.
    """
    path = Path(spool) / SPOOL_NAME if Path(spool).is_dir() else Path(spool)
    if not path.exists():
        raise TrackingError(
            f"{path} does not exist; expected a spool of unsent metrics. Name the file or its run folder"
        )
    file = Spool(path)
    header: dict[str, Any] = {}
    kinds: set[str] = set()
    for record in file.records():
        kinds.add(record["type"])
        if record["type"] == "run":
            header.update({key: value for key, value in record.items() if value is not None})
    if not kinds or not kinds <= RECORDS:
        found = f"records of {', '.join(sorted(kinds - RECORDS))}" if kinds else "no record"
        raise TrackingError(
            f"{path} is no spool of unsent metrics: it has {found}; expected the file {SPOOL_NAME} of a run "
            "folder; nothing was sent or removed"
        )
    run_id = read_identity(path.parent).get("run_id") or header.get("run_id")
    try:
        with limits(timeout_s=60, retries=2):
            reach(uri)
            client = _connect(uri)
            if run_id is None:
                experiment, name = header.get("experiment", "distclust"), header.get("name", path.parent.name)
                run_id = begin(client, uri, experiment, path.parent, name, header.get("start_ms"))
            _replay_into(client, run_id, file)
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(
            f"{path} could not be sent to {redact(uri)} ({redact(str(error))}); expected a server that has "
            f"or takes the run {run_id}. Nothing is lost: correct it and give the same again"
        ) from error
    return str(run_id)


def tracking_uri(tracking: TrackingConfig, run_dir: Path) -> str:
    """The configured server, else the environment's MLFLOW_TRACKING_URI, else `mlflow.db` beside the run."""
    default = f"sqlite:///{run_dir.absolute().parent / 'mlflow.db'}"
    return tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


# ---- MLflow's client ---------------------------------------------------------------------------------------


def _connect(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _make_store(uri: str) -> None:
    """Make a new SQLite store beside its place, then rename it.

    MLflow makes the tables in some fifty steps; a death in between leaves a file that nothing opens again.
    """
    file = sqlite_file(uri)
    if file is None or (file.exists() and file.stat().st_size) or file.name not in uri:
        return
    new = file.with_name(f".new-{file.name}")
    new.unlink(missing_ok=True)
    before, _, after = uri.rpartition(file.name)
    _connect(f"{before}{new.name}{after}").search_experiments(max_results=1)
    new.replace(file)


class _RunServer:
    """One run of a tracking server, as the queue's thread sees it."""

    def __init__(self, uri: str, run_id: str):
        self._uri = uri
        self._run_id = run_id
        self._client: MlflowClient | None = None

    def last_steps(self) -> dict[str, int]:
        if self._client is None:
            file = sqlite_file(self._uri)
            # on another node than the driver's, the client would make an empty database
            if file is not None and not file.exists():
                raise RunGoneError(f"{file} does not exist on {socket.gethostname()}")
            self._client = _connect(self._uri)
        try:
            with limits(timeout_s=20, retries=0):
                run = self._client.get_run(self._run_id)
        except Exception as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                raise RunGoneError(f"{redact(self._uri)} has no run {self._run_id}") from error
            raise
        if run.info.lifecycle_stage != "active":
            raise RunGoneError(f"run {self._run_id} has been deleted")
        return last_steps(run)

    def send(self, points: Sequence[MetricPoint]) -> None:
        assert self._client is not None
        try:
            with limits(timeout_s=20, retries=0):
                log_points(self._client, self._run_id, points)
        except Exception as error:
            if getattr(error, "error_code", None) in _REFUSED_CODES:
                raise PointRefusedError(str(error)) from error
            raise


def _replay_into(client: MlflowClient, run_id: str, spool: Spool) -> None:
    """Send everything in the spool, then remove it. Points are compared one by one, not by the highest step:
    a run that went on after the spool was written has later steps than those."""
    points: dict[tuple[str, int], MetricPoint] = {}
    for record in spool.records():
        if record["type"] == "metric":
            point = point_of(record)
            points.setdefault((point.key, point.step), point)
    there = {
        (key, m.step)
        for key in sorted({k for k, _ in points})
        for m in client.get_metric_history(run_id, key)
    }
    missing = [point for place, point in points.items() if place not in there]
    for start in range(0, len(missing), MAX_BATCH):
        log_points(client, run_id, missing[start : start + MAX_BATCH])
    gone = []
    for record in spool.records():
        if "path" in record:
            # the run folder may have been moved or copied since
            here = spool.path.parent / Path(record["path"]).name
            record |= {"path": str(here)} if here.exists() else {}
            if not Path(record["path"]).exists():
                gone.append(record["path"])
                continue
        apply(client, run_id, record)
    if gone:
        raise TrackingError(
            f"{' and '.join(gone)} cannot be sent: not there, nor beside {spool.path}; expected what the run "
            f"left. All else was sent. Put it there and give the command again, or remove {spool.path.name} "
            "to go without"
        )
    spool.remove()


def _now_ms() -> int:
    return int(time.time() * 1000)
