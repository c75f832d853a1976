from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import sparse

from distclust.corpus.vocabulary import Vocabulary, VocabularyConfig
from distclust.errors import CheckpointError, DataError
from distclust.mixture.methods import METHODS, ModelSettings
from distclust.mixture.model import MixtureModel
from distclust.results.predict import BLOCK_ROWS, Prediction, Predictor, export_model

D, K, N = 300, 7, 4096
TEXTS = ["wheat and corn", "the bank cut its rate", "", None, "corn corn wheat", "rate of the bank", "zzz"]


def small_model(method: str, n_features: int = D, n_clusters: int = K) -> MixtureModel:
    """Random weights, far enough from zero that clusters differ."""
    torch.manual_seed(0)
    row = METHODS[method]
    sizes = {
        "hidden": (32,),
        "code_size": 8,
        "expert_hidden": (16,),
        "expert_code_size": 4,
        "gate_hidden": (24,),
    }
    settings = dataclasses.replace(row.settings, **sizes)  # type: ignore[arg-type]
    model = MixtureModel(row, settings, n_features, n_clusters)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.pseudo_centroids.normal_()  # what k-means would have set
    return model


def small_vocabulary(of: str = "words") -> Vocabulary:
    terms = ("bank", "corn", "rate", "wheat") if of == "words" else ("2", "5", "11", "40")
    idf = np.array([1.0, 2.0, 1.5, 1.25])
    return Vocabulary(terms, np.array([3, 1, 2, 2]), idf, 9, VocabularyConfig(scale=3.0), of)  # type: ignore[arg-type]


def random_rows(n: int = N) -> sparse.csr_matrix:
    rng = np.random.default_rng(0)
    rows = sparse.random(n, D, 0.03, format="csr", dtype=np.float32, random_state=rng)
    rows.data += 0.5
    return rows


def predict(predictor: Predictor, rows: sparse.csr_matrix | NDArray[np.float32]) -> Prediction:
    if sparse.issparse(rows):
        return predictor.predict_rows(rows.indptr, rows.indices, rows.data)
    return predictor.predict_dense(rows)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_labels_do_not_depend_on_the_batch(method: str, kind: str, tmp_path: Path) -> None:
    export_model(tmp_path / "model", small_model(method), None, {"kind": kind, "row_scale": 1.0})
    predictor = Predictor.load(tmp_path / "model")
    csr = random_rows()
    rows = csr if kind == "sparse" else csr.toarray()
    whole = predict(predictor, rows)
    assert len(np.unique(whole.clusters)) > 1, "one cluster for all would show nothing"
    assert whole.probabilities.shape == (N, K)
    np.testing.assert_allclose(whole.probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(whole.probabilities.argmax(1), whole.clusters)
    safe = ~whole.ambiguous
    assert safe.mean() > 0.9
    order = np.random.default_rng(1).permutation(N)
    shuffled = predict(predictor, rows[order])
    np.testing.assert_array_equal(shuffled.clusters[safe[order]], whole.clusters[order][safe[order]])
    np.testing.assert_allclose(shuffled.probabilities, whole.probabilities[order], atol=1e-4)
    for size, upto in ((7, 210), (1, 40)):
        for start in range(0, upto, size):
            part = predict(predictor, rows[start : start + size])
            inside = slice(start, start + size)
            np.testing.assert_array_equal(part.clusters[safe[inside]], whole.clusters[inside][safe[inside]])
            np.testing.assert_allclose(part.probabilities, whole.probabilities[inside], atol=1e-4)


def test_every_block_has_the_same_shape() -> None:
    model = small_model("dmae-text")
    predictor = Predictor(model, {"kind": "dense", "row_scale": 1.0})
    seen = []
    encode = model.network.encode_with_layers
    model.network.encode_with_layers = lambda x, *noise: (seen.append(x.shape[0]), encode(x, *noise))[1]
    for n in (1, 7, BLOCK_ROWS, BLOCK_ROWS + 1):
        assert len(predictor.predict_dense(np.ones((n, D), np.float32)).clusters) == n
    assert set(seen) == {BLOCK_ROWS}


def test_prediction_equals_the_models_own_scores(tmp_path: Path) -> None:
    model = small_model("damic")
    export_model(tmp_path / "model", model, None, {"kind": "sparse", "row_scale": 1.0, "note": "ü"})
    rows = random_rows(100)
    loaded = Predictor.load(tmp_path / "model")
    found = predict(loaded, rows)
    scores = model.predict(torch.from_numpy(rows.toarray()))
    np.testing.assert_allclose(found.probabilities, scores.exp().numpy(), atol=1e-5)
    assert loaded.about["note"] == "ü"
    assert loaded.about["method"] == "damic"
    assert loaded.model.settings == model.settings
    assert (loaded.about["n_features"], loaded.about["n_clusters"], loaded.input) == (D, K, "sparse")
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["model", "model.json", "model.safetensors"]


def test_texts_go_through_the_vocabulary(tmp_path: Path) -> None:
    vocabulary = small_vocabulary()
    vocabulary.save(tmp_path / "vocabulary.json")
    model = small_model("damic-text", n_features=4)
    export_model(tmp_path / "model", model, tmp_path / "vocabulary.json", {})
    predictor = Predictor.load(tmp_path / "model")
    assert predictor.input == "text"
    found = predictor.predict_texts(TEXTS)
    rows = vocabulary.transform(TEXTS)
    assert rows.nnz == 8
    np.testing.assert_array_equal(found.probabilities, predict(predictor, rows).probabilities)
    np.testing.assert_array_equal(found.clusters[[2, 3]], found.clusters[[6, 6]])  # rows of zeros
    assert np.isfinite(found.probabilities).all()
    with pytest.raises(DataError, match="a matrix were given to a model that was trained on texts"):
        predictor.predict_matrix(rows)


def test_counts_are_weighed_with_the_inputs_own_column_numbers(tmp_path: Path) -> None:
    vocabulary = small_vocabulary("columns")
    vocabulary.save(tmp_path / "vocabulary.json")
    export_model(tmp_path / "model", small_model("damic", n_features=4), tmp_path / "vocabulary.json", {})
    predictor = Predictor.load(tmp_path / "model")
    counts = sparse.random(50, 60, 0.2, format="csr", random_state=np.random.default_rng(0))
    counts.data = np.ceil(counts.data * 5)
    found = predictor.predict_matrix(counts)
    rows = vocabulary.weigh(sparse.csr_matrix(counts[:, [2, 5, 11, 40]]))
    assert rows.nnz > 20
    np.testing.assert_array_equal(found.probabilities, predict(predictor, rows).probabilities)
    with pytest.raises(DataError, match="texts were given"):
        predictor.predict_texts(["corn"])


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_raw_weights_get_the_row_scale(kind: str, tmp_path: Path) -> None:
    export_model(tmp_path / "model", small_model("damic"), None, {"kind": kind, "row_scale": 3.0})
    predictor = Predictor.load(tmp_path / "model")
    rows = random_rows(20) if kind == "sparse" else random_rows(20).toarray()
    found, scaled = predictor.predict_matrix(rows), predict(predictor, rows * np.float32(3))
    np.testing.assert_array_equal(found.probabilities, scaled.probabilities)
    assert len(predictor.predict_matrix(rows[:0]).clusters) == 0


def test_two_equal_scores_are_ambiguous() -> None:
    model = small_model("damic", n_clusters=2)
    with torch.no_grad():
        for parameter in model.gate.parameters():
            parameter.zero_()
    found = predict(Predictor(model, {"kind": "sparse", "row_scale": 1.0}), random_rows(5))
    assert found.ambiguous.all()


def test_the_nearest_centroid_far_from_nought_and_in_any_batch() -> None:
    model = small_model("dmm", n_features=6, n_clusters=3)  # without a network: codes are the rows
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(3, 6)) + 10_000.0
    rows = torch.from_numpy(centroids[rng.integers(3, size=2000)] + rng.normal(size=(2000, 6)))
    with torch.no_grad():
        model.pseudo_centroids.copy_(torch.from_numpy(centroids))
    rows = rows.float()
    centres = model.pseudo_centroids.double()
    expected = (rows.double()[:, None] - centres).square().sum(2).argmin(1)
    assert torch.equal(model.pseudo_labels(rows), expected)
    few = torch.cat([model.pseudo_labels(part) for part in rows.split(5)])
    assert torch.equal(few, expected)


@pytest.mark.parametrize("method", ["dmm", "bregman", "vade", "k-dae"])
def test_a_row_without_a_finite_score_has_no_label(method: str) -> None:
    """The argmax of NaN is a cluster, too."""
    rows = np.random.default_rng(0).standard_normal((700, 6)).astype(np.float32)
    predictor = Predictor(small_model(method, 6), {"kind": "dense", "row_scale": 1.0})
    predictor.predict_dense(rows)
    rows[613] = 1e25
    with pytest.raises(DataError, match="row 613 of those given has no finite score; expected"):
        predictor.predict_dense(rows)
    with torch.no_grad():
        for parameter in predictor.model.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(DataError, match="the model holds weights that are not finite; expected"):
        predictor.predict_dense(rows[:5])


def test_an_export_replaces_a_model_and_a_failed_one_leaves_it(tmp_path: Path) -> None:
    info = {"kind": "sparse", "row_scale": 1.0}
    folder = tmp_path / "model"
    export_model(folder, small_model("damic"), None, info)
    export_model(folder, small_model("dmae"), None, info)
    assert Predictor.load(folder).about["method"] == "dmae"
    with pytest.raises(TypeError):
        export_model(folder, small_model("damic"), None, info | {"not json": object()})
    with pytest.raises(ValueError, match="row_scale"):
        export_model(folder, small_model("damic"), None, {"kind": "sparse"})
    small_vocabulary().save(tmp_path / "vocabulary.json")
    with pytest.raises(ValueError, match="4 terms and the model 300 features"):
        export_model(folder, small_model("damic"), tmp_path / "vocabulary.json", {})
    assert Predictor.load(folder).about["method"] == "dmae"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "vocabulary.json"]


def test_a_damaged_or_foreign_model_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(CheckpointError, match=r"model\.json does not exist"):
        Predictor.load(folder)
    small_vocabulary().save(tmp_path / "vocabulary.json")
    export_model(folder, small_model("damic", n_features=4), tmp_path / "vocabulary.json", {})
    for name in ("model.safetensors", "vocabulary.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
            Predictor.load(folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
            Predictor.load(folder)
        (folder / name).write_bytes(whole)
    about = json.loads((folder / "model.json").read_text())
    outside = {"files": {"../vocabulary.json": "0"}}
    for change, message in (
        ({"version": 9}, "format 9"),
        ({"method": "new"}, "'new'"),
        (outside, "lists the file"),
    ):
        (folder / "model.json").write_text(json.dumps(about | change))
        with pytest.raises(CheckpointError, match=message):
            Predictor.load(folder)


def test_rows_that_do_not_fit_are_refused() -> None:
    sparse_model = Predictor(small_model("damic"), {"kind": "sparse", "row_scale": 1.0})
    dense_model = Predictor(small_model("damic"), {"kind": "dense", "row_scale": 1.0})
    one = np.ones(1, np.float32)
    for index in (-1, D):
        with pytest.raises(DataError, match=f"expected 0 to {D - 1}"):
            sparse_model.predict_rows(np.array([0, 1]), np.array([index]), one)
    with pytest.raises(DataError, match="NaN or infinity"):
        sparse_model.predict_rows(np.array([0, 1]), np.array([0]), one * np.nan)
    with pytest.raises(DataError, match="expected .n, 300."):
        dense_model.predict_dense(np.ones((2, 4), np.float32))
    with pytest.raises(DataError, match="NaN or infinity"):
        dense_model.predict_dense(np.full((1, D), np.inf, np.float32))
    with pytest.raises(DataError, match="trained on dense rows"):
        dense_model.predict_rows(np.array([0, 1]), np.array([0]), one)
    with pytest.raises(DataError, match="trained on sparse weights"):
        sparse_model.predict_dense(np.ones((1, D), np.float32))


def test_every_setting_survives_the_folder(tmp_path: Path) -> None:
    """A setting that JSON changes (a tuple that comes back as a list) would build another model."""
    changed = {}
    for field in dataclasses.fields(ModelSettings):
        value = getattr(METHODS["dmae"].settings, field.name)
        changed[field.name] = (9, 5) if isinstance(value, tuple) and value else value
    layers = {"image": (1, 20, D // 20), "conv": ((4, 3, 2, 1), (6, 3, 2, 1))}
    model = MixtureModel(
        METHODS["dmae"], ModelSettings(**{**changed, **layers, "expert_conv": ((2, 3, 1, 1),)}), D, K
    )
    export_model(tmp_path / "model", model, None, {"kind": "sparse", "row_scale": 1.0})
    assert Predictor.load(tmp_path / "model").model.settings == model.settings


def test_a_model_trained_by_phases_of_ones_own_is_read_without_them(tmp_path: Path) -> None:
    row = METHODS["damic"]
    settings = dataclasses.replace(row.settings, expert_hidden=(16,), tau_spread=0.5)
    joint = dataclasses.replace(row.phases[-1], begin=("temperature",))  # the row's own measures nothing
    made = dataclasses.replace(row, settings=settings, phases=(*row.phases[:-1], joint))
    export_model(
        tmp_path / "model", MixtureModel(made, settings, D, K), None, {"kind": "sparse", "row_scale": 1.0}
    )
    assert Predictor.load(tmp_path / "model").model.settings == settings


def test_prediction_imports_neither_ray_nor_mlflow_nor_faiss() -> None:
    heavy = {"ray", "mlflow", "faiss", "pydantic", "sklearn"}
    code = f"import sys, distclust.results.predict; print({heavy} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert found.stdout.strip() == "set()"
