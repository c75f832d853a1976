from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import sparse

from distclust.config import TrackingConfig
from distclust.corpus.vocabulary import Vocabulary, VocabularyConfig
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.results.predict import Predictor, export_model
from distclust.results.served_model import save_served_model
from distclust.training.tracking import Tracker
from mlflow_server import MlflowServer

REPOSITORY = Path(__file__).parents[2]
TEXTS = ["wheat and corn", "the bank cut its rate", "", None, "corn corn wheat", "rate of the bank"]

FRESH = """
import importlib.util, json, os, sys
from pathlib import Path

repository, tracking_uri = Path(sys.argv[1]), sys.argv[2]
model_uris, columns = map(json.loads, sys.argv[3:])
# as on a machine that has neither the repository nor an installed distclust
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != repository]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
assert importlib.util.find_spec("distclust") is None
sys.modules["ray"] = sys.modules["faiss"] = None

import mlflow, pandas

mlflow.set_tracking_uri(tracking_uri)
answers = [mlflow.pyfunc.load_model(uri).predict(pandas.DataFrame(columns)) for uri in model_uris]
import distclust

print("ANSWER" + json.dumps({
    "records": [found.to_dict("list") for found in answers],
    "dtypes": {name: str(kind) for name, kind in answers[0].dtypes.items()},
    "package": distclust.__file__,
}, default=lambda array: array.tolist()))
"""


def ask_afresh(
    model_uris: list[str], tracking_uri: str, columns: dict[str, Any], cwd: Path
) -> dict[str, Any]:
    """Load the models in a new process that knows nothing of this repository, and predict."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    arguments = [str(REPOSITORY), tracking_uri, json.dumps(model_uris), json.dumps(columns)]
    cwd.mkdir()
    child = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, env=environment, cwd=cwd
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.rpartition("ANSWER")[2])


def exported(folder: Path, kind: str, n_features: int = 4, method: str = "damic-text") -> Path:
    """A model folder with random weights, for texts, counts, sparse or dense rows."""
    import torch

    torch.manual_seed(0)
    model = MixtureModel(METHODS[method], METHODS[method].settings, n_features, 3)
    if kind in ("sparse", "dense"):
        return export_model(folder / "exported", model, None, {"kind": kind, "row_scale": 2.0})
    words = kind == "text"
    terms = ("bank", "corn", "rate", "wheat") if words else ("2", "5", "11", "40")
    of: Any = "words" if words else "columns"
    options = VocabularyConfig(scale=3.0, stop_words="english")
    vocabulary = Vocabulary(terms, np.array([3, 1, 2, 2]), np.array([1.0, 2.0, 1.5, 1.25]), 9, options, of)
    vocabulary.save(folder / "vocabulary.json")
    return export_model(folder / "exported", model, folder / "vocabulary.json", {})


def test_a_fresh_process_serves_texts_from_the_tracked_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model folder, MLflow model, run, registry with alias; then a machine without the repository."""
    folder = exported(tmp_path, "text")
    run_dir = tmp_path / "runs" / "demo"
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    served = save_served_model(folder, run_dir / "model")
    assert not list(served.rglob("*.pkl"))
    assert not list(served.rglob("__pycache__"))
    assert not list(served.rglob("builtin"))
    tracker = Tracker.open(TrackingConfig(), run_dir, name="demo")
    uri = tracker.log_model(served, register_as="news", alias="champion")
    assert uri is not None
    assert tracker.log_model(served, register_as="news", alias="champion") == uri  # once is enough
    tracker.finish("FINISHED")
    assert not list((tmp_path / "cwd").iterdir()), "MLflow's default store was used"
    expected = Predictor.load(folder).predict_texts(TEXTS)

    shutil.rmtree(served)  # nothing but the store is needed from here on
    shutil.rmtree(folder)
    answer = ask_afresh([uri, "models:/news@champion"], tracker.uri, {"text": TEXTS}, tmp_path / "fresh")
    best = [row[label] for row, label in zip(expected.probabilities, expected.clusters, strict=True)]
    for records in answer["records"]:
        assert records["cluster"] == expected.clusters.tolist()
        np.testing.assert_allclose(records["probabilities"], expected.probabilities, atol=1e-6)
        np.testing.assert_allclose(records["probability"], best, atol=1e-6)
    assert answer["dtypes"] == {"cluster": "int64", "probability": "float64", "probabilities": "object"}
    assert "/code/distclust/" in answer["package"]
    assert not answer["package"].startswith(str(REPOSITORY))
    assert not list((tmp_path / "fresh").iterdir())

    assert tracker._client is not None
    run = tracker._client.get_run(str(tracker.run_id))
    assert run.outputs is not None
    assert [f"models:/{output.model_id}" for output in run.outputs.model_outputs] == [uri]
    assert tracker._client.get_logged_model(uri.rpartition("/")[2]).status == "READY"
    assert len(tracker._client.search_model_versions("name = 'news'")) == 1
    version = tracker._client.get_model_version_by_alias("news", "champion")
    assert version.run_id == tracker.run_id
    location = tracker._client.get_logged_model(uri.rpartition("/")[2]).artifact_location
    info = mlflow.models.Model.load(location.removeprefix("file://"))
    assert info.run_id == tracker.run_id
    assert info.signature is not None
    assert [column.name for column in info.signature.inputs] == ["text"]
    assert [column.name for column in info.signature.outputs] == ["cluster", "probability", "probabilities"]


def test_a_model_whose_server_is_away_waits_in_the_spool(tmp_path: Path) -> None:
    served = save_served_model(exported(tmp_path, "dense"), tmp_path / "served")
    run_dir = tmp_path / "runs" / "demo"
    away = TrackingConfig(uri="http://127.0.0.1:9", on_unreachable="spool")
    tracker = Tracker.open(away, run_dir, name="demo")
    assert tracker.log_model(served, register_as="rows") is None
    tracker.finish("FINISHED")
    later = Tracker.open(TrackingConfig(), run_dir, name="demo")
    assert not later.spool.exists()
    assert later._client is not None
    [version] = later._client.search_model_versions("name = 'rows'")
    assert version.run_id == later.run_id


@pytest.mark.parametrize("kind", ["text", "counts", "sparse", "dense"])
def test_every_kind_of_document(kind: str, tmp_path: Path) -> None:
    folder = exported(tmp_path, kind)
    served = save_served_model(folder, tmp_path / "served")
    save_served_model(folder, served)  # again, over the first
    model = mlflow.pyfunc.load_model(str(served))
    predictor = Predictor.load(folder)
    if kind == "text":
        documents = pd.DataFrame({"text": TEXTS}, index=range(10, 16))
        expected = predictor.predict_texts(TEXTS)
    elif kind == "dense":
        rows = np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32)
        documents = pd.DataFrame({"values": list(rows)}, index=[10, 11])
        expected = predictor.predict_matrix(rows)
    else:
        last = 40 if kind == "counts" else 3
        documents = pd.DataFrame(
            {"indices": [[2, last], [], [2]], "values": [[1.0, 2.0], [], [5.0]]}, index=[5, 6, 7]
        )
        matrix = sparse.csr_matrix(([1, 2, 5.0], [2, last, 2], [0, 2, 2, 3]), (3, last + 1))
        expected = predictor.predict_matrix(matrix)
    found = model.predict(documents)
    np.testing.assert_array_equal(found["cluster"], expected.clusters)
    np.testing.assert_allclose(np.stack(list(found["probabilities"])), expected.probabilities, atol=1e-7)
    assert list(found.index) == list(documents.index)
    example = model.input_example
    assert len(model.predict(example)) == len(example)
    assert math.isclose(sum(found["probabilities"].iloc[0]), 1, abs_tol=1e-5)
    assert len(model.predict(documents[:0])) == 0


def test_requirements_are_few_pinned_and_installable(tmp_path: Path) -> None:
    served = save_served_model(exported(tmp_path, "text"), tmp_path / "served")
    lines = (served / "requirements.txt").read_text().split()
    names = {line.partition("==")[0] for line in lines}
    assert names == {"mlflow", "torch", "numpy", "scipy", "scikit-learn", "pandas", "pyarrow", "safetensors"}
    assert all("==" in line and "+" not in line for line in lines)
    flavor = yaml.safe_load((served / "MLmodel").read_text())["flavors"]["python_function"]
    assert flavor["model_code_path"] == "served_model.py"
    assert "python_model" not in flavor, "a pickled model"


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("text", {"words": ["a"]}, "text"),
        ("dense", {"values": [[1.0, 2.0]]}, "expected 4"),
        ("sparse", {"indices": [[0, 1]], "values": [[1.0]]}, "one value for each index"),
        ("sparse", {"indices": [[4]], "values": [[1.0]]}, "below 4"),
        ("counts", {"indices": [[-1]], "values": [[1.0]]}, "from 0 on"),
        ("sparse", {"indices": [[0]], "values": [[math.nan]]}, "NaN or infinity"),
    ],
)
def test_bad_requests_are_answered(kind: str, columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = mlflow.pyfunc.load_model(str(save_served_model(exported(tmp_path, kind), tmp_path / "served")))
    with pytest.raises(Exception, match=message):
        model.predict(pd.DataFrame(columns))


@pytest.mark.slow
def test_a_real_server_keeps_the_model(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    """Artifacts go through the server; the registry is the server's."""
    folder = exported(tmp_path, "text")
    served = save_served_model(folder, tmp_path / "served")
    tracker = Tracker.open(TrackingConfig(uri=mlflow_server.uri), tmp_path / "runs" / "demo", name="demo")
    uri = tracker.log_model(served, register_as="news", alias="champion")
    assert uri is not None
    assert tracker.log_model(served, register_as="news", alias="champion") == uri
    (tmp_path / "report.html").write_text("<p>")
    tracker.log_artifacts(tmp_path / "report.html")
    assert tracker.finish("FINISHED") is None
    expected = Predictor.load(folder).predict_texts(TEXTS)
    answer = ask_afresh([uri, "models:/news@champion"], tracker.uri, {"text": TEXTS}, tmp_path / "fresh")
    for records in answer["records"]:
        assert records["cluster"] == expected.clusters.tolist()
    assert tracker._client is not None
    assert len(tracker._client.search_model_versions("name = 'news'")) == 1
    assert [file.path for file in tracker._client.list_artifacts(str(tracker.run_id))] == ["report.html"]
