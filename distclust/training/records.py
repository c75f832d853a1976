"""What a record of the spool becomes on an MLflow server; doing it twice does no harm.

`mlflow` is imported inside functions: that takes seconds, and a worker that starts should not wait for it.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distclust.training.metric_sink import MAX_BATCH
from distclust.training.spool import MAX_TAG, MetricPoint, clean_key, shorten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def last_steps(run: Run) -> dict[str, int]:
    """The highest step of each key: MLflow's latest metric is the one with the highest step."""
    return {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}


def log_points(client: MlflowClient, run_id: str, points: Sequence[MetricPoint]) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(p.key, p.value, p.timestamp_ms, p.step) for p in points]
    # synchronous: the environment may ask for another way, which acknowledges nothing
    client.log_batch(run_id, metrics=metrics, synchronous=True)


def apply(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> Any:
    """Do on the server what a record says; doing it twice does no harm."""
    kind = record["type"]
    if kind == "params":
        _apply_params(client, run_id, record["params"])
    elif kind == "tags":
        _log_tags(client, run_id, record["tags"])
    elif kind == "dataset":
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            **{key: record[key] for key in ("name", "digest", "source_type", "source", "schema", "profile")}
        )
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
    elif kind == "final":
        run = client.get_run(run_id)
        steps = last_steps(run)
        values = {key: float(value) for key, value in record["metrics"].items()}
        points = [
            MetricPoint(key, value, steps.get(key, -1) + 1, record["timestamp_ms"])
            for key, value in values.items()
            if key not in steps or not _same(run.data.metrics[key], value)
        ]
        for start in range(0, len(points), MAX_BATCH):
            log_points(client, run_id, points[start : start + MAX_BATCH])
    elif kind == "artifacts":
        log = client.log_artifacts if Path(record["path"]).is_dir() else client.log_artifact
        log(run_id, record["path"], record["artifact_path"])
    elif kind == "model":
        return _apply_model(client, run_id, record)
    elif kind == "status":
        client.set_terminated(run_id, record["status"], record["end_ms"])
    return None


def _apply_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    there = client.get_run(run_id).data.params
    new = [Param(key, value) for key, value in params.items() if key not in there]
    for start in range(0, len(new), 100):
        client.log_batch(run_id, params=new[start : start + 100], synchronous=True)
    # MLflow's parameters cannot change; a run resumed on more workers says so in a tag
    _log_tags(
        client, run_id, {clean_key(f"resumed.{k}"): v for k, v in params.items() if there.get(k, v) != v}
    )


def _log_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    items = [RunTag(key, shorten(value, MAX_TAG)) for key, value in tags.items()]
    for start in range(0, len(items), 100):
        client.log_batch(run_id, tags=items[start : start + 100], synchronous=True)


def _apply_model(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> str:
    from mlflow.models import Model

    folder = Path(record["path"])
    described = Model.load(str(folder))
    if described.run_id == run_id and described.model_id:  # an earlier attempt brought it there
        model_id = described.model_id
    else:
        model_id = _upload_model(client, run_id, folder, record["name"])
    if record["register_as"]:
        _register(client, run_id, model_id, record["register_as"], record["alias"])
    return f"models:/{model_id}"


def _upload_model(client: MlflowClient, run_id: str, folder: Path, name: str) -> str:
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment_id, name, source_run_id=run_id, model_type="distclust")
    try:
        described = Model.load(str(folder))
        described.run_id, described.model_id, described.model_uuid = run_id, logged.model_id, logged.model_id
        described.artifact_path = logged.artifact_location
        with tempfile.TemporaryDirectory() as scratch:
            # the folder's own MLmodel is written last: it says that the upload is whole
            described.save(str(Path(scratch) / "MLmodel"))
            client.log_model_artifacts(logged.model_id, str(folder))
            client.log_model_artifacts(logged.model_id, scratch)
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
            client.finalize_logged_model(logged.model_id, "READY")
            os.replace(shutil.copy(Path(scratch) / "MLmodel", folder / "MLmodel.tmp"), folder / "MLmodel")
    except Exception:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    return str(logged.model_id)


def _register(client: MlflowClient, run_id: str, model_id: str, name: str, alias: str | None) -> None:
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", None) not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise
    # without a server in between, MLflow looks models:/... up in the process's default store, not in ours
    remote = client.tracking_uri.startswith(("http", "databricks"))
    source = f"models:/{model_id}" if remote else client.get_logged_model(model_id).artifact_location
    there = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = next((version for version in there if version.source == source), None)
    if version is None:
        version = client.create_model_version(name, source, run_id, model_id=model_id)
    if alias:
        client.set_registered_model_alias(name, alias, version.version)


def _same(stored: float, value: float) -> bool:
    """Whether the server's value is this one; it keeps an infinity as the largest number."""
    if math.isnan(stored) or math.isnan(value):
        return math.isnan(stored) and math.isnan(value)
    return stored == max(-sys.float_info.max, min(sys.float_info.max, value))
