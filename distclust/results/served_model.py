"""The model as MLflow serves it: this file itself is the model (models-from-code), beside a model folder.

Nothing in a served model is pickled. MLflow runs this file, which is why it ends with a call, and gives it
the model folder and a copy of the package.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel
from scipy import sparse

import distclust
from distclust.errors import DataError
from distclust.results.predict import Prediction, Predictor

REQUIREMENTS = ("mlflow", "torch", "numpy", "scipy", "scikit-learn", "pandas", "pyarrow", "safetensors")


class ServedModel(PythonModel):
    """Documents in; cluster, its probability and all probabilities out."""

    def load_context(self, context: Any) -> None:
        """Read the model folder."""
        self._predictor = Predictor.load(context.artifacts["model"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Clusters of the documents in `model_input`.

        Args:
            context: MLflow's, unused.
            model_input: a `text` column; or lists in `indices` and `values`; or lists in `values` (dense).
            params: unused.

        Returns:
            One row a document: `cluster` (int), `probability` (of that cluster), `probabilities` (list of K).

        Raises:
            DataError: other columns than the model's, or lists that are no rows.
        """
        found = _predict(self._predictor, model_input)
        best = found.probabilities[np.arange(len(found.clusters)), found.clusters]
        return pd.DataFrame(
            {
                "cluster": found.clusters,
                "probability": best.astype(np.float64),
                "probabilities": list(found.probabilities.astype(np.float64)),
            },
            index=model_input.index,
        )


def save_served_model(model_folder: Path | str, path: Path | str) -> Path:
    """Make an MLflow model of a model folder (`predict.export_model`), with signature and input example.

    Args:
        model_folder: where the model is.
        path: where the MLflow model goes; `Tracker.log_model` takes it from there. Replaced if it exists.
    """
    path = Path(path)
    predictor = Predictor.load(model_folder)
    signature, example = _interface(predictor)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        package = Path(distclust.__file__).parent
        copied = Path(scratch) / "code" / package.name
        shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__", "builtin"))
        whole = Path(scratch) / "model"
        mlflow.pyfunc.save_model(
            path=str(whole),
            python_model=str(copied / "results" / Path(__file__).name),
            artifacts={"model": str(Path(model_folder).absolute())},
            code_paths=[str(copied)],
            signature=signature,
            input_example=example,
            pip_requirements=[f"{name}=={_installed(name)}" for name in REQUIREMENTS],
        )
        described = mlflow.models.Model.load(str(whole))
        # MLflow looks for the file's name in the model, and would keep the path of this machine
        described.flavors["python_function"]["model_code_path"] = Path(__file__).name
        described.save(str(whole / "MLmodel"))
        for cache in whole.rglob("__pycache__"):
            shutil.rmtree(cache)
        if path.exists():
            shutil.rmtree(path)
        whole.rename(path)
    return path


def _predict(predictor: Predictor, documents: pd.DataFrame) -> Prediction:
    wanted = {"text": ["text"], "dense": ["values"]}.get(predictor.input, ["indices", "values"])
    if missing := [name for name in wanted if name not in documents]:
        raise DataError(f"columns are {list(documents.columns)}; expected {wanted}: add {missing}")
    if predictor.input == "text":
        texts = documents["text"]
        return predictor.predict_texts(texts.astype(object).where(texts.notna(), None).tolist())
    values = [np.asarray(row, np.float32) for row in documents["values"]]
    d = predictor.model.n_features
    if predictor.input == "dense":
        if bad := [len(row) for row in values if row.shape != (d,)]:
            raise DataError(f"a row of `values` has {bad[0]} entries; expected {d}: correct the rows")
        return predictor.predict_matrix(np.stack(values) if values else np.empty((0, d), np.float32))
    indices = [np.asarray(row, np.int64) for row in documents["indices"]]
    lengths = [len(row) for row in indices]
    if lengths != [len(row) for row in values]:
        raise DataError(
            "`indices` and `values` have lists of different lengths; expected one value for each index"
        )
    columns = np.concatenate([*indices, np.empty(0, np.int64)])
    if len(columns) and columns.min() < 0:
        raise DataError(f"`indices` holds {columns.min()}; expected column numbers from 0 on")
    # counts keep the numbering of the input, of which the vocabulary chose some columns
    width = d if predictor.input == "sparse" else max(int(columns.max(initial=-1)) + 1, 1)
    if len(columns) and columns.max() >= width:
        raise DataError(f"`indices` holds {columns.max()}; expected column numbers below {width}")
    numbers = np.concatenate([*values, np.empty(0, np.float32)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return predictor.predict_matrix(sparse.csr_matrix((numbers, columns, offsets), (len(values), width)))


def _interface(predictor: Predictor) -> tuple[mlflow.models.ModelSignature, pd.DataFrame]:
    """The signature, and an example that fits it."""
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    columns: list[ColSpec | TensorSpec]
    outputs: list[ColSpec | TensorSpec]
    numbers = ColSpec(Array(DataType.double), "values")
    if predictor.input == "text":
        columns = [ColSpec(DataType.string, "text")]
        example = pd.DataFrame({"text": ["Wheat exports rose in March.", "The bank cut its rate."]})
    elif predictor.input == "dense":
        columns = [numbers]
        example = pd.DataFrame({"values": [[0.0] * predictor.model.n_features]})
    else:
        columns = [ColSpec(Array(DataType.long), "indices"), numbers]
        example = pd.DataFrame({"indices": [[0]], "values": [[1.0]]})
    outputs = [
        ColSpec(DataType.long, "cluster"),
        ColSpec(DataType.double, "probability"),
        ColSpec(Array(DataType.double), "probabilities"),
    ]
    return mlflow.models.ModelSignature(inputs=Schema(columns), outputs=Schema(outputs)), example


def _installed(name: str) -> str:
    """The installed version, without a build's own mark (2.13.0+cpu): registries do not have those."""
    return importlib.metadata.version(name).partition("+")[0]


mlflow.models.set_model(ServedModel())
