"""The baselines beside every table: they find what is there, repeat, and hold for every shape of corpus."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from distclust.config import resolve
from distclust.corpus.shards import Corpus, ShardWriter
from distclust.mixture.methods import METHODS
from distclust.results import baselines
from distclust.results.baselines import code_baselines, corpus_baselines
from distclust.run import train_run
from stories import records, tiny_recipe, write_jsonl

NAMES = ["k-means", "LSA + k-means"]


def topics(rows: int, features: int, clusters: int, seed: int) -> tuple[csr_matrix, np.ndarray]:
    """Sparse unit rows of which each topic prefers its own terms, sorted by topic."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, clusters, rows))
    preferred = (np.arange(features) % clusters)[None, :] == labels[:, None]
    counts = rng.poisson(np.where(preferred, 8.0 * clusters, 2.0) / features * 3)
    weights = np.sqrt(counts)
    weights /= np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)
    return csr_matrix(weights.astype(np.float32)), labels


def write(root: Path, rows: csr_matrix | np.ndarray, rows_per_shard: int) -> Corpus:
    n_rows, features = rows.shape
    columns = {"id": [str(i) for i in range(n_rows)], "labels": [[]] * n_rows, "title": [None] * n_rows}
    if isinstance(rows, np.ndarray):
        flat = pa.array(rows.ravel().astype(np.float32))
        values = {"values": pa.FixedSizeListArray.from_arrays(flat, features)}
    else:
        offsets = pa.array(rows.indptr.astype(np.int32))
        values = {
            "indices": pa.ListArray.from_arrays(offsets, pa.array(rows.indices.astype(np.int32))),
            "values": pa.ListArray.from_arrays(offsets, pa.array(rows.data.astype(np.float32))),
        }
    writer = ShardWriter(
        str(root), "dense" if isinstance(rows, np.ndarray) else "sparse", features, rows_per_shard
    )
    writer.write(pa.table({**columns, **values}))
    writer.finish()
    return Corpus.open(str(root))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, np.ndarray]:
    rows, labels = topics(1_200, 120, 4, seed=0)
    return write(tmp_path_factory.mktemp("sparse") / "corpus", rows, rows_per_shard=500), labels


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_topics_are_found_in_one_shard_or_many(tmp_path: Path, kind: str) -> None:
    rows, labels = topics(600, 120, 4, seed=1)
    rows = rows if kind == "sparse" else rows.toarray()
    one, many = (corpus_baselines(write(tmp_path / str(size), rows, size), 4, seed=0) for size in (600, 77))
    assert list(one) == NAMES
    for name in NAMES:
        assert one[name].dtype == np.int64
        assert one[name].shape == (600,)
        assert adjusted_rand_score(labels, one[name]) > 0.95
        assert np.array_equal(one[name], many[name])


def test_k_means_is_sklearns(sparse: tuple[Corpus, np.ndarray]) -> None:
    corpus, _ = sparse
    shards = [corpus.shard(number) for number in range(len(corpus.shard_rows))]
    rows = np.zeros((corpus.n_rows, corpus.n_features), dtype=np.float32)
    for start, shard in zip(corpus.shard_starts, shards, strict=False):
        for row in range(shard.n_rows):
            inside = slice(shard.offsets[row], shard.offsets[row + 1])
            rows[start + row, shard.indices[inside]] = shard.values[inside]
    with threadpool_limits(limits=1):
        reference = KMeans(4, n_init=10, random_state=3).fit(csr_matrix(rows)).labels_
    assert np.array_equal(corpus_baselines(corpus, 4, seed=3)["k-means"], reference)


def test_the_seed_decides(sparse: tuple[Corpus, np.ndarray]) -> None:
    corpus, _ = sparse
    first, again, other = (corpus_baselines(corpus, 7, seed=seed) for seed in (1, 1, 2))
    for name in NAMES:
        assert np.array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_above_max_rows_a_sample_is_fitted_and_all_are_assigned(
    sparse: tuple[Corpus, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, labels = sparse
    fitted = []
    gather = baselines.gather
    monkeypatch.setattr(baselines, "gather", lambda *given: fitted.append(gather(*given)) or fitted[0])
    found = corpus_baselines(corpus, 4, seed=0, max_rows=300)
    assert fitted[0].shape == (300, corpus.n_features)
    for name in NAMES:
        assert found[name].shape == (corpus.n_rows,)
        assert adjusted_rand_score(labels, found[name]) > 0.9


def test_with_many_clusters_k_means_is_fitted_on_fewer_rows(
    sparse: tuple[Corpus, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, labels = sparse
    fitted = []
    fit_rows = baselines._fit_rows
    monkeypatch.setattr(
        baselines, "_fit_rows", lambda rows, *given: fitted.append(rows.shape[0]) or fit_rows(rows, *given)
    )
    whole = corpus_baselines(corpus, 4, seed=0)
    monkeypatch.setattr(baselines, "_ROWS_TIMES_CLUSTERS", 4 * 250)
    found = corpus_baselines(corpus, 4, seed=0)
    assert fitted == [corpus.n_rows, 250]
    assert np.array_equal(found["LSA + k-means"], whole["LSA + k-means"])
    assert found["k-means"].shape == (corpus.n_rows,)
    assert adjusted_rand_score(labels, found["k-means"]) > 0.9


def test_the_sample_is_even_and_without_repeats() -> None:
    drawn = baselines.evenly_drawn(10_007, 1_000, seed=0)
    assert len(np.unique(drawn)) == 1_000
    assert (np.diff(drawn) > 0).all()
    # a file sorted by class gives each tenth of it a tenth of the sample
    assert np.abs(np.bincount(drawn * 10 // 10_007, minlength=10) - 100).max() <= 1
    assert not np.array_equal(drawn, baselines.evenly_drawn(10_007, 1_000, seed=1))
    assert np.array_equal(baselines.evenly_drawn(5, 5, seed=0), np.arange(5))
    assert (baselines.evenly_drawn(6, 5, seed=0) < 6).all()


def test_gathered_rows_are_the_rows(sparse: tuple[Corpus, np.ndarray]) -> None:
    corpus, _ = sparse
    whole = baselines.gather(corpus, np.arange(corpus.n_rows)).toarray()
    some = np.array([0, 3, 499, 500, 501, 1_199])
    assert np.array_equal(baselines.gather(corpus, some).toarray(), whole[some])
    assert np.array_equal(baselines.gather(corpus, some[4:5]).toarray(), whole[some[4:5]])
    expected, _ = topics(1_200, 120, 4, seed=0)
    assert np.array_equal(whole, expected.toarray())


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_empty_documents_are_assigned_too(tmp_path: Path, kind: str) -> None:
    rows = topics(300, 60, 3, seed=4)[0].toarray()
    rows[::10] = 0
    corpus = write(tmp_path / "corpus", csr_matrix(rows) if kind == "sparse" else rows, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = corpus_baselines(corpus, 3, seed=0)
    for name in NAMES:
        assert set(np.unique(found[name])) == {0, 1, 2}
        assert len(np.unique(found[name][::10])) == 1


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_poor_corpora_end_no_run(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = np.repeat(np.eye(3, 5, dtype=np.float32), [1, 2, 1], axis=0)
    corpus = write(tmp_path / "corpus", csr_matrix(rows) if kind == "sparse" else rows, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = corpus_baselines(corpus, 6, seed=0)
    for name in NAMES:
        assert len(np.unique(found[name])) == 3
        assert found[name][1] == found[name][2]
    assert "makes 3 clusters, not 6" in caplog.text


def test_one_feature_has_no_lsa(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = np.array([[0.0], [0.1], [5.0], [5.1]])
    found = corpus_baselines(write(tmp_path / "corpus", rows, 10), 2, seed=0)
    assert list(found) == ["k-means"]
    assert found["k-means"][0] == found["k-means"][1] != found["k-means"][2] == found["k-means"][3]
    assert "no LSA baseline" in caplog.text


def test_codes_as_they_are_and_on_the_sphere() -> None:
    rng = np.random.default_rng(5)
    # two directions, each at two lengths: length tells more than direction unless it is taken out
    directions, lengths = rng.integers(0, 2, 400), rng.integers(0, 2, 400)
    codes = np.eye(2)[directions] * np.where(lengths, 50.0, 1.0)[:, None] + 0.01 * rng.normal(size=(400, 2))
    found = code_baselines(codes.astype(np.float32), 2, seed=0)
    assert list(found) == ["AE + k-means", "AE (l2) + k-means"]
    assert adjusted_rand_score(directions, found["AE (l2) + k-means"]) == 1.0
    assert adjusted_rand_score(directions, found["AE + k-means"]) < 0.9
    sampled = code_baselines(codes.astype(np.float32), 2, seed=0, max_rows=50)
    assert adjusted_rand_score(found["AE (l2) + k-means"], sampled["AE (l2) + k-means"]) == 1.0
    assert {len(labels) for labels in sampled.values()} == {400}


def test_collapsed_codes_end_no_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = code_baselines(np.zeros((100, 4), dtype=np.float32), 9, seed=0)
    assert all((labels == 0).all() for labels in found.values())
    assert "makes 1 clusters, not 9" in caplog.text


# ---- beside a run of any row


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("stories") / "stories.jsonl", records(60))


@pytest.mark.parametrize(
    ("method", "beside"),
    [
        ("damic", ["AE + k-means", "AE (l2) + k-means", "gate after warm start"]),
        ("damic-joint", []),
        ("dmm", ["before joint training"]),
        ("bregman", ["before joint training"]),
        ("ae-kmeans", ["AE (l2) + k-means"]),
        ("ae-cm-random", []),
    ],
)
def test_a_run_gets_the_baselines_that_make_sense(
    stories: Path, tmp_path: Path, method: str, beside: list[str]
) -> None:
    small = {"hidden": [8], "code_size": 4, "expert_hidden": [8], "gate_hidden": [8], "expert_code_size": 3}
    phases = {phase.name: {"epochs": 1} for phase in METHODS[method].phases if phase.epochs}
    recipe = {**tiny_recipe(stories), "method": method, "model": small, "phases": phases}
    summary = train_run(resolve(recipe), tmp_path / "run")
    assert list(summary["baselines"]) == [*NAMES, *beside]


def test_one_of_the_two_may_be_left_out(sparse: tuple[Corpus, np.ndarray]) -> None:
    corpus, _ = sparse
    both = corpus_baselines(corpus, 4, seed=0)
    for wanted, other in (NAMES, NAMES[::-1]):
        found = corpus_baselines(corpus, 4, seed=0, leave_out=other)
        assert list(found) == [wanted]
        assert np.array_equal(found[wanted], both[wanted])
