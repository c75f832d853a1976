"""The model folder, and prediction from it: no Ray, no MLflow, no FAISS.

A row's label does not depend on what else is in the batch: rows go through the model in blocks of one fixed
size, padded with zero rows, so one document runs through the same kernels, on the same shapes, as a million.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy import sparse

from distclust.corpus.vocabulary import VOCABULARY_FILE, Vocabulary, remap
from distclust.errors import CheckpointError, DataError
from distclust.mixture.imports import is_import_path
from distclust.mixture.methods import METHODS, ModelSettings, find_method
from distclust.mixture.model import MixtureModel, without_training
from distclust.mixture.sparse import SparseRows
from distclust.training.provenance import code_version

FORMAT_VERSION = 1
MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
BLOCK_ROWS = 512
"""Rows that go through the model at once."""
AMBIGUOUS = 1e-5
"""Two best log-probabilities closer than this may change places with the batch."""


class Prediction(NamedTuple):
    """What the model says of n rows."""

    clusters: NDArray[np.int64]
    """(n,) the most probable cluster of each."""
    probabilities: NDArray[np.float32]
    """(n, K), each row adding up to 1."""
    ambiguous: NDArray[np.bool_]
    """(n,) whether the two best log-probabilities differ by less than 1e-5."""


def export_model(
    folder: Path | str, model: MixtureModel, vocabulary_path: Path | str | None, info: Mapping[str, Any]
) -> Path:
    """Write a model folder: `model.safetensors`, `model.json` and, for texts and counts, `vocabulary.json`.

    Args:
        folder: where; a model that is there already is replaced, in one rename.
        model: the trained model.
        vocabulary_path: the corpus's `vocabulary.json`; None for documents that came as weights or dense
            rows.
        info: what else `model.json` is to say. Without a vocabulary it must have `kind` ("sparse" or "dense")
            and `row_scale`, as the corpus's manifest has them.

    Raises:
        ValueError: `kind` or `row_scale` is missing, or the vocabulary is not this model's.
        OSError: the folder cannot be written; nothing half-made is left.
    """
    folder = Path(folder).absolute()
    vocabulary = None if vocabulary_path is None else Vocabulary.load(vocabulary_path)
    about = dict(info)
    if vocabulary is not None:
        about |= {"kind": "sparse", "row_scale": vocabulary.config.scale}
        if vocabulary.n_features != model.n_features:
            raise ValueError(
                f"{vocabulary_path} has {vocabulary.n_features} terms and the model {model.n_features} "
                "features; expected the vocabulary that the model was trained with"
            )
    if about.get("kind") not in ("sparse", "dense") or "row_scale" not in about:
        raise ValueError(f"model info is {dict(info)}; expected `kind` (sparse or dense) and `row_scale`")
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in model.prediction_state().items()
        }
        save_file(tensors, whole / WEIGHTS_FILE)
        files = [WEIGHTS_FILE]
        if vocabulary is not None:
            vocabulary.save(whole / VOCABULARY_FILE)
            files.append(VOCABULARY_FILE)
        described = {
            **about,
            "version": FORMAT_VERSION,
            "method": model.method.name,
            "settings": dataclasses.asdict(model.settings),
            "n_features": model.n_features,
            "n_clusters": model.n_clusters,
            "code": code_version(),
            "files": {name: _sha256(whole / name) for name in files},
        }
        (whole / MODEL_FILE).write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
        whole.chmod(0o755)
        _put_in_place(whole, folder)
    except BaseException:
        shutil.rmtree(whole, ignore_errors=True)
        raise
    return folder


class Predictor:
    """A model folder, loaded.

    Attributes:
        input: what raw documents are: "text", "counts" (of numbered words), "sparse" or "dense" (weights).
        about: the content of `model.json`.
        model: the model, in evaluation mode.
        vocabulary: for texts and counts, else None.
    """

    def __init__(
        self,
        model: MixtureModel,
        about: Mapping[str, Any],
        vocabulary: Vocabulary | None = None,
        device: str | torch.device = "cpu",
    ):
        self.model = model.eval().to(device)
        self.about = dict(about)
        self.vocabulary = vocabulary
        self._device = torch.device(device)
        given = "text" if vocabulary is not None and vocabulary.of == "words" else "counts"
        self.input = cast(
            Literal["text", "counts", "sparse", "dense"], given if vocabulary is not None else about["kind"]
        )

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> Predictor:
        """Read what `export_model` wrote; hashes are compared before anything is parsed.

        Raises:
            CheckpointError: no model there, a damaged file (named), a model of another version, or an import
                path in it whose module was not allowed.
        """
        folder = Path(folder)
        path = folder / MODEL_FILE
        advice = "expected a folder that distclust exported; export the model again or restore the file"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            version, method, settings = about["version"], str(about["method"]), about["settings"]
            hashes = dict(about["files"])
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; {advice}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error!r}); {advice}") from error
        known = {field.name for field in dataclasses.fields(ModelSettings)}
        unknown = method not in METHODS and not is_import_path(method)
        if version != FORMAT_VERSION or unknown or set(settings) - known:
            raise CheckpointError(
                f"{path} is of format {version} with method {about['method']!r} and settings "
                f"{sorted(set(settings) - known) or 'that are known'}; expected format {FORMAT_VERSION}, a "
                f"method of {', '.join(METHODS)} and known settings. Use the distclust that wrote it: "
                f"{about.get('code')}"
            )
        for name in hashes:
            if name not in (WEIGHTS_FILE, VOCABULARY_FILE):
                raise CheckpointError(f"{path} lists the file {name!r}; {advice}")
            try:
                found = _sha256(folder / name)
            except OSError as error:
                raise CheckpointError(f"{folder / name} cannot be read ({error}); {advice}") from error
            if found != hashes[name]:
                raise CheckpointError(f"{folder / name} is damaged (its sha256 is {found[:12]}...); {advice}")
        made: dict[str, Any] = {key: _as_tuple(value) for key, value in settings.items()}
        try:
            row = dataclasses.replace(find_method(method), settings=ModelSettings(**made))
            model = MixtureModel(
                row, row.settings, about["n_features"], about["n_clusters"], for_training=False
            )
        except ValueError as error:  # an import path that was not allowed, above all
            raise CheckpointError(f"{path}: {error}") from error
        # files of earlier versions have Fourier features, which only training needs
        model.load_state_dict(without_training(load_file(folder / WEIGHTS_FILE)))
        vocabulary = Vocabulary.load(folder / VOCABULARY_FILE) if VOCABULARY_FILE in hashes else None
        return cls(model, about, vocabulary, device)

    def predict_texts(self, texts: Sequence[str | None]) -> Prediction:
        """Clusters of raw texts; null and empty ones are rows of zeros.

        Raises:
            DataError: the model was not trained on texts.
        """
        if self.input != "text":
            raise self._refusal("texts")
        assert self.vocabulary is not None
        rows = self.vocabulary.transform(texts)
        return self.predict_rows(rows.indptr, rows.indices, rows.data)

    def predict_matrix(self, matrix: sparse.csr_matrix | NDArray[Any]) -> Prediction:
        """Clusters of raw counts or weights (n, columns), as the documents of the training had them.

        Raises:
            DataError: another width or kind than the model's, or a value that is not finite.
        """
        if self.input == "dense":
            if sparse.issparse(matrix):
                raise self._refusal("a sparse matrix")
            return self.predict_dense(np.asarray(matrix, np.float32) * np.float32(self.about["row_scale"]))
        if self.input == "text" or not sparse.issparse(matrix):
            raise self._refusal("a matrix" if self.input == "text" else "dense rows")
        rows = sparse.csr_matrix(matrix, copy=True)
        rows.sum_duplicates()
        if self.vocabulary is not None:
            columns = self.vocabulary.places(str(column) for column in range(rows.shape[1]))
            counts = remap(rows.indptr, rows.indices, rows.data, columns, self.vocabulary.n_features)
            weighed = self.vocabulary.weigh(counts)
            return self.predict_rows(weighed.indptr, weighed.indices, weighed.data)
        values = rows.data.astype(np.float32) * np.float32(self.about["row_scale"])
        return self.predict_rows(rows.indptr, rows.indices, values)

    def predict_rows(self, offsets: NDArray[Any], indices: NDArray[Any], values: NDArray[Any]) -> Prediction:
        """Clusters of rows as a corpus holds them: weighed, and the row scale applied.

        Args:
            offsets: (n + 1,) row bounds, from 0.
            indices: (nnz,) columns below `n_features`, distinct within a row.
            values: (nnz,) finite.

        Raises:
            DataError: the model was trained on dense rows, an index is out of range or a value not finite.
        """
        d = self.model.n_features
        if self.about["kind"] != "sparse":
            raise self._refusal("sparse rows")
        offsets = np.asarray(offsets, np.int64)
        indices = np.asarray(indices, np.int64)
        values = np.asarray(values, np.float32)
        if len(indices) and (indices.min() < 0 or indices.max() >= d):
            raise DataError(
                f"columns go from {indices.min()} to {indices.max()}; expected 0 to {d - 1}: prepare the "
                "rows with the model's own vocabulary"
            )
        self._check_finite(values)

        def block(start: int, stop: int) -> SparseRows:
            bounds = np.full(BLOCK_ROWS + 1, offsets[stop])
            bounds[: stop - start + 1] = offsets[start : stop + 1]
            inside = slice(offsets[start], offsets[stop])
            parts = (bounds - offsets[start], indices[inside], values[inside])
            tensors = [torch.from_numpy(part).to(self._device) for part in parts]
            return SparseRows(tensors[0], tensors[1], tensors[2], d)

        return self._predict(len(offsets) - 1, block)

    def predict_dense(self, values: NDArray[Any]) -> Prediction:
        """Clusters of dense rows (n, D) as a corpus holds them, the row scale applied.

        Raises:
            DataError: the model was trained on sparse rows, another width, or a value that is not finite.
        """
        if self.about["kind"] != "dense":
            raise self._refusal("dense rows")
        rows = np.asarray(values, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.model.n_features:
            raise DataError(
                f"rows have shape {rows.shape}; expected (n, {self.model.n_features}): correct the rows"
            )
        self._check_finite(rows)

        def block(start: int, stop: int) -> torch.Tensor:
            padded = np.zeros((BLOCK_ROWS, rows.shape[1]), np.float32)
            padded[: stop - start] = rows[start:stop]
            return torch.from_numpy(padded).to(self._device)

        return self._predict(len(rows), block)

    def _predict(self, n: int, block: Callable[[int, int], SparseRows | torch.Tensor]) -> Prediction:
        k = self.model.n_clusters
        clusters, probabilities = np.empty(n, np.int64), np.empty((n, k), np.float32)
        ambiguous = np.zeros(n, np.bool_)
        for start in range(0, n, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, n)
            scores = self.model.predict(block(start, stop))[: stop - start].float().cpu()  # (b, K)
            best = scores.amax(1)  # (b,), NaN where there is one
            if not bool(torch.isfinite(best).all()):
                raise self._no_score(start + int((~torch.isfinite(best)).nonzero()[0]))
            clusters[start:stop] = scores.argmax(1).numpy()
            probabilities[start:stop] = scores.exp().numpy()
            if k > 1:
                two = scores.topk(2, dim=1).values
                ambiguous[start:stop] = (two[:, 0] - two[:, 1] < AMBIGUOUS).numpy()
        return Prediction(clusters, probabilities, ambiguous)

    def _no_score(self, row: int) -> DataError:
        """Of a row whose scores are not finite: NaN would be as good a label as any."""
        weights = self.model.prediction_state().values()
        if not all(bool(torch.isfinite(w).all()) for w in weights):
            return DataError(
                "the model holds weights that are not finite; expected finite ones: train it again"
            )
        return DataError(
            f"row {row} of those given has no finite score; expected rows like those of the training: its "
            "values are so large that their squares leave float32. Correct or drop the row"
        )

    def _check_finite(self, values: NDArray[np.float32]) -> None:
        if not np.isfinite(values).all():
            raise DataError("a row holds NaN or infinity; expected finite values: correct or drop the row")

    def _refusal(self, found: str) -> DataError:
        expected = {"text": "texts", "counts": "counts", "sparse": "sparse weights", "dense": "dense rows"}
        return DataError(
            f"{found} were given to a model that was trained on {expected[self.input]}; give it those"
        )


def _as_tuple(value: Any) -> Any:
    """Lists, in lists too, as the tuples that they were."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def _put_in_place(whole: Path, folder: Path) -> None:
    """Rename, with the old folder out of the way first: a folder cannot be renamed over a full one."""
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.rename(folder, old / "model")
    os.rename(whole, folder)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
