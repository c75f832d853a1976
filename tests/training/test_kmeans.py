"""k-means as initialiser: as good as scikit-learn's, repeatable, no empty clusters, no silent subsample."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from distclust.errors import DataError
from distclust.mixture.energies import DISSIMILARITIES, DissimilarityOptions, init_plus_plus
from distclust.training import kmeans
from distclust.training.kmeans import assign_to_centroids, count_distinct, fit_kmeans


def blobs(rows: int, dimensions: int, clusters: int, spread: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = spread * rng.normal(size=(clusters, dimensions))
    share = rng.dirichlet(np.full(clusters, 2.0))
    return (centres[rng.choice(clusters, rows, p=share)] + rng.normal(size=(rows, dimensions))).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("rows", "dimensions", "clusters", "spread"),
    [(5_000, 10, 9, 1.0), (8_000, 10, 20, 1.0), (2_000, 50, 12, 0.5)],
)
def test_objective_is_within_one_percent_of_sklearn(
    rows: int, dimensions: int, clusters: int, spread: float
) -> None:
    codes = blobs(rows, dimensions, clusters, spread, seed=clusters)
    # which optimum a run ends in is chance: compare three of them
    found = [fit_kmeans(codes, clusters, seed=seed, restarts=4) for seed in range(3)]
    with threadpool_limits(limits=1):
        reference = [KMeans(clusters, n_init=4, random_state=seed).fit(codes).inertia_ for seed in range(3)]
    assert sum(result.objective for result in found) <= 1.01 * sum(reference)
    labels, distances = assign_to_centroids(codes, found[0].centroids)
    assert found[0].objective == pytest.approx(distances.sum(), rel=1e-12)
    assert found[0].centroids.shape == (clusters, dimensions)
    assert found[0].centroids.dtype == np.float32
    assert np.bincount(labels, minlength=clusters).all()
    assert (found[0].n_sample, found[0].n_repaired, found[0].backend) == (rows, 0, "faiss-cpu")


def test_every_row_counts() -> None:
    codes = blobs(20_000, 4, 3, spread=4.0, seed=0)
    found = fit_kmeans(codes, 3, seed=0, restarts=2)
    labels, _ = assign_to_centroids(codes, found.centroids)
    means = np.stack([codes[labels == k].mean(axis=0, dtype=np.float64) for k in range(3)])
    # the mean of FAISS's default subsample of 256 rows a cluster is off by some hundredths
    np.testing.assert_allclose(found.centroids, means, atol=2e-3)


def test_the_seed_decides() -> None:
    codes = blobs(3_000, 10, 9, spread=0.5, seed=3)
    first, again, other = (fit_kmeans(codes, 9, seed=seed, restarts=2) for seed in (5, 5, 6))
    assert np.array_equal(first.centroids, again.centroids)
    assert first.objective == again.objective
    assert not np.array_equal(first.centroids, other.centroids)


def test_more_restarts_are_never_worse() -> None:
    codes = blobs(1_000, 10, 20, spread=1.5, seed=4)
    objectives = [fit_kmeans(codes, 20, seed=5, restarts=restarts).objective for restarts in range(1, 7)]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < objectives[0]


def test_a_common_offset_costs_no_digits() -> None:
    codes = blobs(3_000, 10, 9, spread=2.0, seed=6)
    plain = fit_kmeans(codes, 9, seed=0, restarts=3)
    moved = fit_kmeans(codes + np.float32(100_000), 9, seed=0, restarts=3)
    assert moved.objective == pytest.approx(plain.objective, rel=1e-3)


def test_as_many_clusters_as_distinct_rows_gives_each_its_own() -> None:
    distinct = np.random.default_rng(7).normal(size=(12, 3)).astype(np.float32)
    codes = np.repeat(distinct, [1, 1, 1, 2, 3, 5, 500, 1, 1, 900, 1, 1], axis=0)
    found = fit_kmeans(codes, 12, seed=0)
    assert found.objective == pytest.approx(0, abs=1e-6)
    assert len(np.unique(assign_to_centroids(codes, found.centroids)[0])) == 12


@pytest.mark.parametrize("seed", range(20))
def test_empty_clusters_are_given_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    distinct = int(rng.integers(2, 12))
    codes = rng.normal(size=(distinct, 2)).astype(np.float32)[rng.integers(0, distinct, 200)]
    n_clusters = count_distinct(codes, 200)
    # all centroids in one place or far from everything: all clusters but one are empty
    start = np.zeros((n_clusters, 2), dtype=np.float32)
    start[1::2] = 1e6
    before = assign_to_centroids(codes, start)[1].sum()
    centroids, objective, moved = kmeans._repair(codes, start)
    labels, distances = assign_to_centroids(codes, centroids)
    assert np.bincount(labels, minlength=n_clusters).all()
    assert moved >= n_clusters - 1
    assert objective == pytest.approx(distances.sum())
    assert objective <= before


def from_start(monkeypatch: pytest.MonkeyPatch, codes: np.ndarray, start: np.ndarray) -> kmeans.KMeansResult:
    monkeypatch.setattr(
        kmeans, "_start", lambda rows, n_clusters, state: (start - codes.mean(0)).astype(np.float32)
    )
    return fit_kmeans(codes, len(start), seed=0, restarts=1)


def test_repairs_of_faiss_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.concatenate([blobs(200, 2, 1, 0.0, seed) + 30 * np.eye(2)[seed] for seed in (0, 1)])
    # two centroids where the rows are, two out of reach: FAISS gives them half of the big clusters as it goes
    start = np.array([[30.0, 0.0], [0.0, 30.0], [1e4, 0.0], [1e4, 1e4]])
    monkeypatch.setattr(
        kmeans, "_repair", lambda rows, found: (found, assign_to_centroids(rows, found)[1].sum(), 0)
    )
    found = from_start(monkeypatch, codes, start)
    assert found.n_repaired >= 2
    assert np.bincount(assign_to_centroids(codes, found.centroids)[0], minlength=4).all()


def test_repairs_after_faiss_are_counted_and_iterated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = blobs(500, 2, 4, spread=5.0, seed=8)
    # one centroid in the middle, three out of reach: the halves that FAISS makes of it stay where they are
    start = codes.mean(0) + np.array([[0, 0], [1e4, 0], [0, 1e4], [1e4, 1e4]])
    lloyd, splits = kmeans._lloyd_faiss, []
    monkeypatch.setattr(kmeans, "_lloyd_faiss", lambda *given: splits.append(lloyd(*given)) or splits[-1])
    found = from_start(monkeypatch, codes, start)
    assert found.n_repaired > sum(count for _, count in splits)
    assert np.bincount(assign_to_centroids(codes, found.centroids)[0], minlength=4).all()
    monkeypatch.undo()
    assert found.objective <= 1.05 * fit_kmeans(codes, 4, seed=0).objective


def test_more_clusters_than_distinct_rows_is_refused_with_both_figures() -> None:
    codes = np.repeat(np.eye(5, dtype=np.float32), 100, axis=0)
    with pytest.raises(DataError, match=r"7 clusters asked, but the 500 rows hold only 5 distinct"):
        fit_kmeans(codes, 7, seed=0)
    with pytest.raises(DataError, match="0 rows hold only 0 distinct"):
        fit_kmeans(codes[:0], 1, seed=0)
    assert fit_kmeans(codes, 5, seed=0).objective == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_codes_that_are_not_finite_are_refused(bad: float) -> None:
    codes = np.zeros((50, 3), dtype=np.float32)
    codes[17, 1] = codes[30, 0] = bad
    with pytest.raises(DataError, match=r"2 of 50 rows .*first: row 17"):
        fit_kmeans(codes, 1, seed=0)


@pytest.mark.parametrize("codes", [np.zeros(5, dtype=np.float32), np.zeros((5, 2), dtype=np.int64)])
def test_what_is_no_table_of_floats_is_refused(codes: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"expected \(rows, dimensions\) floats"):
        fit_kmeans(codes, 1, seed=0)


def test_distinct_rows_are_counted_no_further_than_needed() -> None:
    codes = np.random.default_rng(9).integers(0, 3, (5_000, 2)).astype(np.float32)
    assert count_distinct(codes, 100) == 9
    assert count_distinct(codes, 9) == 9
    assert count_distinct(codes, 2) >= 2
    assert count_distinct(codes[:0], 1) == 0
    # the second kind of row comes last
    late = np.zeros((5_000, 2), dtype=np.float32)
    late[-1] = 1
    assert count_distinct(late, 2) == 2


def test_without_a_gpu_it_runs_on_the_cpu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    codes = blobs(300, 3, 2, spread=3.0, seed=10)
    with caplog.at_level(logging.INFO, logger="distclust"):
        found = fit_kmeans(codes, 2, seed=0, gpu=True)
    if found.backend == "faiss-gpu":
        pytest.skip("this FAISS has a GPU")
    assert found.backend == "faiss-cpu"
    assert sum("it runs on the CPU" in record.message for record in caplog.records) == 1
    assert "300 rows x 3, 2 clusters" in caplog.text


WITHOUT_FAISS = """
import logging, sys
sys.modules["faiss"] = None
import numpy as np
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
from distclust.training.kmeans import fit_kmeans
codes = np.load(sys.argv[1])
first, again = (fit_kmeans(codes, 9, seed=1, restarts=3, gpu=True) for _ in range(2))
assert np.array_equal(first.centroids, again.centroids)
print(first.backend, repr(first.objective))
"""

WITH_FAISS = """
import sys
import numpy as np
from distclust.training import kmeans
kmeans._PARALLEL_FROM = 0  # several threads, small as it is
found = kmeans.fit_kmeans(np.load(sys.argv[1]), 9, seed=1, restarts=1, iterations=10)
print(found.backend, repr(found.objective), found.centroids.tobytes().hex())
"""


def run_python(code: str, *arguments: str, threads: int = 1) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_faiss_sklearn_does_it_with_one_warning(tmp_path) -> None:
    codes = blobs(5_000, 10, 9, spread=1.0, seed=11)
    np.save(tmp_path / "codes.npy", codes)
    printed = run_python(WITHOUT_FAISS, str(tmp_path / "codes.npy"))
    assert printed.count("WARNING") == 1
    assert "FAISS is not installed" in printed
    backend, objective = printed.split("\n")[-2].split()
    assert backend == "scikit-learn"
    assert float(objective) == pytest.approx(fit_kmeans(codes, 9, seed=1, restarts=3).objective, rel=0.01)


def test_another_process_with_more_threads_finds_the_same_bits(tmp_path) -> None:
    codes = blobs(20_000, 10, 9, spread=1.0, seed=12)
    np.save(tmp_path / "codes.npy", codes)
    one, two = (run_python(WITH_FAISS, str(tmp_path / "codes.npy"), threads=threads) for threads in (1, 2))
    assert one == two


def test_assignment_is_the_nearest_centroid() -> None:
    rng = np.random.default_rng(13)
    codes, centroids = rng.normal(size=(3_000, 7)), rng.normal(size=(11, 7))
    labels, distances = assign_to_centroids(codes, centroids)
    squared = ((codes[:, None] - centroids) ** 2).sum(axis=2)
    assert labels.dtype == np.int64
    assert np.array_equal(labels, squared.argmin(axis=1))
    np.testing.assert_allclose(distances, squared.min(axis=1), rtol=1e-12)


def test_ties_go_to_the_lowest_index_however_the_rows_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(14)
    centroids = rng.normal(size=(40, 9)).astype(np.float32)
    centroids[[5, 17, 39]] = centroids[3]
    centroids[[20, 21]] = centroids[8]
    codes = rng.normal(size=(2_000, 9)).astype(np.float32)
    codes[::5] = (centroids[rng.integers(0, 40, 400)] + centroids[rng.integers(0, 40, 400)]) / 2
    whole, distances = assign_to_centroids(codes, centroids)
    assert not np.isin(whole, [5, 17, 39, 20, 21]).any()
    assert np.isin([3, 8], whole).all()
    for rows in (1, 7, 64):
        monkeypatch.setattr(kmeans, "_BLOCK_BYTES", rows * 8 * (40 + 9))
        parts, part_distances = assign_to_centroids(codes, centroids)
        assert np.array_equal(parts, whole)
        assert np.array_equal(part_distances, distances)


def test_far_from_the_origin_plain_differences_decide() -> None:
    rng = np.random.default_rng(15)
    # whole numbers: the plain differences are exact, ties are ties, and the expanded squares lose 1 in 1e17
    centroids = 1e8 + rng.integers(0, 6, (30, 3)).astype(np.float64)
    codes = 1e8 + rng.integers(0, 6, (500, 3)).astype(np.float64)
    squared = ((codes[:, None] - centroids) ** 2).sum(axis=2)
    labels, distances = assign_to_centroids(codes, centroids)
    assert np.array_equal(labels, squared.argmin(axis=1))
    assert np.array_equal(distances, squared.min(axis=1))


def test_assignment_refuses_what_cannot_be_compared() -> None:
    codes = np.zeros((4, 3))
    with pytest.raises(DataError, match=r"shape \(4, 3\) and centroids \(2, 2\)"):
        assign_to_centroids(codes, np.zeros((2, 2)))
    with pytest.raises(DataError, match="K > 0"):
        assign_to_centroids(codes, np.zeros((0, 3)))
    codes[2, 1] = np.nan
    with pytest.raises(DataError, match="row 2 of the codes holds NaN"):
        assign_to_centroids(codes, np.zeros((2, 3)))
    assert assign_to_centroids(codes[:0], np.zeros((2, 3)))[0].shape == (0,)


@pytest.mark.parametrize("name", ["dot_product", "cosine", "manhattan"])
def test_the_max_min_start_has_no_two_alike(name: str) -> None:
    """A copy of a chosen row is not at distance 0 by every dissimilarity, and many rows may be equal."""
    formula, options = DISSIMILARITIES[name].formula, DissimilarityOptions()

    def pairwise(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return formula(a[:, None, :], b, options)

    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.rand(300, 4, generator=generator) + 1.0
        codes[12:] = codes[11]  # 289 equal rows
        start = init_plus_plus(codes, 8, pairwise, generator)
        assert start.shape == (8, 4)
        assert len(torch.unique(start, dim=0)) == 8, seed
