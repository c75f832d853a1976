"""Which MLflow run belongs to a run folder, and what to say when it cannot be had."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distclust.errors import TrackingError
from distclust.training.reach import sqlite_file
from distclust.training.spool import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from distclust.config import TrackingConfig

logger = logging.getLogger(__name__)

IDENTITY_NAME = "mlflow.json"

# Error codes of MLflow that say nothing about the request: the server, or the way to it, is in trouble.
_AWAY_CODES = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}


def is_away(error: Exception) -> bool:
    """Whether the server, or the way to it, is in trouble; otherwise it understood and refuses."""
    code = getattr(error, "error_code", None)
    return code is None or code in _AWAY_CODES


def begin(
    client: MlflowClient, uri: str, experiment: str, run_dir: Path, name: str, start_ms: int | None = None
) -> str:
    """The id of the run that belongs to `run_dir`, made where there is none yet."""
    stored = read_identity(run_dir).get("run_id")
    asked = os.environ.get("MLFLOW_RUN_ID")
    if stored and asked and stored != asked:
        logger.warning(
            "MLFLOW_RUN_ID is %s, but %s belongs to the run %s, which goes on", asked, run_dir, stored
        )
    run_id = stored or asked
    if run_id:
        where = run_dir / IDENTITY_NAME if stored else "MLFLOW_RUN_ID"
        remedy = f"delete {where} to begin a new MLflow run" if stored else "unset MLFLOW_RUN_ID"
        expected = f"expected the run that {where} names; restore it, correct tracking.uri, or {remedy}"
        try:
            run = client.get_run(run_id)
        except Exception as error:
            if is_away(error):
                raise
            raise TrackingError(f"{redact(uri)} has no run {run_id}; {expected}") from error
        if run.info.lifecycle_stage != "active":
            raise TrackingError(f"the run {run_id} at {redact(uri)} has been deleted; {expected}")
    else:
        tags = {"mlflow.source.name": "distclust", "mlflow.source.type": "LOCAL"}
        experiment_id = _experiment(client, uri, experiment)
        run = client.create_run(experiment_id, start_time=start_ms, run_name=name, tags=tags)
        run_id = run.info.run_id
    if run_id != stored:
        identity = {"run_id": run_id, "experiment_id": run.info.experiment_id, "uri": redact(uri)}
        run_dir.mkdir(parents=True, exist_ok=True)
        whole = run_dir / (IDENTITY_NAME + ".tmp")
        whole.write_text(json.dumps(identity, indent=1) + "\n")
        os.replace(whole, run_dir / IDENTITY_NAME)
    return str(run_id)


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        file = sqlite_file(uri)
        # a bare database would put artifacts into ./mlruns of whoever comes first
        location = None if file is None else (file.absolute().parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception:
            found = client.get_experiment_by_name(name)  # another driver was faster
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} at {redact(uri)} has been deleted; expected one that takes runs. "
            "Restore it (mlflow experiments restore) or set another tracking.experiment"
        )
    return str(found.experiment_id)


def unusable(uri: str, tracking: TrackingConfig, spool: Path, error: Exception) -> str | None:
    """What to tell the user of a run that cannot begin; None where the run may go on without the server."""
    reason = (redact(str(error)).strip() or type(error).__name__).splitlines()[0]
    if not is_away(error):
        return (
            f"the tracking server {redact(uri)} refuses the run: {reason}. Expected experiment "
            f"{tracking.experiment!r} and its run to be usable; correct tracking.uri or tracking.experiment"
        )
    if tracking.on_unreachable == "fail":
        return (
            f"the tracking server {redact(uri)} does not answer ({reason}); expected an MLflow server or a "
            "SQLite file there. Start it, correct tracking.uri, or give tracking.on_unreachable=spool to go "
            f"on and keep everything in {spool}"
        )
    return None


def read_identity(run_dir: Path) -> dict[str, Any]:
    path = run_dir / IDENTITY_NAME
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise TrackingError(
            f"{path} is not JSON ({error}); expected the id of the MLflow run. Delete it to begin a new run"
        ) from error
