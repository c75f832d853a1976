"""Agreement scores equal scikit-learn's and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn import metrics as reference

from distclust.errors import DataError
from distclust.results.metrics import Scores, contingency, scores


def scored(labels: np.ndarray, clusters: np.ndarray, n_classes: int, n_clusters: int) -> Scores:
    return scores(contingency(labels, clusters, n_classes, n_clusters))


def assert_equals_sklearn(labels: np.ndarray, clusters: np.ndarray, n_classes: int, n_clusters: int) -> None:
    found = scored(labels, clusters, n_classes, n_clusters)
    for convention in ("geometric", "arithmetic"):
        expected = reference.normalized_mutual_info_score(labels, clusters, average_method=convention)
        assert getattr(found, f"nmi_{convention}") == pytest.approx(expected, abs=1e-12)
    assert found.ari == pytest.approx(reference.adjusted_rand_score(labels, clusters), abs=1e-12)


@pytest.mark.parametrize("block", range(8))
def test_random_labelings_equal_sklearn(block: int) -> None:
    rng = np.random.default_rng(block)
    for _ in range(50):
        n_classes, n_clusters = rng.integers(1, 12, size=2)
        n = int(rng.choice([1, 2, 3, 10, 100, 1000]))
        labels = rng.integers(0, n_classes, n)
        # from agreement to none, with skewed sizes and clusters that stay empty
        skewed = (n_clusters * rng.random(n) ** 3).astype(np.int64)
        clusters = np.where(rng.random(n) < rng.random(), labels % n_clusters, skewed)
        assert_equals_sklearn(labels, clusters, n_classes, n_clusters)


@pytest.mark.parametrize(
    ("labels", "clusters"),
    [
        ([], []),
        ([0], [0]),
        ([3], [4]),
        ([0, 0, 0], [0, 0, 0]),
        ([0, 0, 0], [0, 1, 2]),
        ([0, 1, 2], [0, 0, 0]),
        ([0, 1, 2, 3], [3, 2, 1, 0]),
        ([0, 0, 1, 1], [0, 1, 0, 1]),
        ([0, 0, 5, 5], [4, 4, 2, 2]),
    ],
)
def test_degenerate_labelings_equal_sklearn(labels: list[int], clusters: list[int]) -> None:
    assert_equals_sklearn(np.array(labels, dtype=int), np.array(clusters, dtype=int), 6, 5)


def test_accuracy_equals_brute_force_with_unequal_numbers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n_classes, n_clusters = rng.integers(1, 6, size=2)
        table = rng.integers(0, 8, (n_classes, n_clusters))
        if not table.sum():
            continue
        side = max(n_classes, n_clusters)
        square = np.zeros((side, side), dtype=int)
        square[:n_classes, :n_clusters] = table
        best = max(square[range(side), order].sum() for order in itertools.permutations(range(side)))
        assert scores(table).acc == pytest.approx(best / table.sum(), abs=1e-12)


def test_a_perfect_clustering_under_other_names_scores_one() -> None:
    labels = np.random.default_rng(1).integers(0, 5, 300)
    assert scored(labels, (labels + 2) % 5, 5, 5) == Scores(
        nmi_geometric=pytest.approx(1), nmi_arithmetic=pytest.approx(1), ari=1.0, acc=1.0
    )


def test_geometric_is_never_below_arithmetic_and_above_it_when_clusters_collapse() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        table = rng.integers(0, 20, tuple(rng.integers(1, 9, size=2)))
        found = scores(table)
        assert found.nmi_geometric >= found.nmi_arithmetic - 1e-12
    collapsed = scores(np.array([[50, 0], [50, 0], [50, 0], [20, 30]]))
    assert collapsed.nmi_geometric > collapsed.nmi_arithmetic + 0.02


def test_a_million_documents_do_not_overflow() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 10, 1_000_000)
    clusters = np.where(rng.random(1_000_000) < 0.7, labels, rng.integers(0, 12, 1_000_000))
    assert_equals_sklearn(labels, clusters, 10, 12)


def test_counts_beyond_32_and_64_bits_of_pairs() -> None:
    small = np.array([[30, 2, 1], [3, 40, 5]], dtype=np.int64)
    large = scores(small * 10**9)
    # as the collection grows at the same shares, ARI tends to its limit; the others do not change
    assert large.nmi_geometric == pytest.approx(scores(small).nmi_geometric, abs=1e-12)
    assert large.acc == scores(small).acc
    assert large.ari == pytest.approx(scores(small * 10**4).ari, abs=1e-6)


def test_tables_of_parts_add_up() -> None:
    rng = np.random.default_rng(4)
    labels, clusters = rng.integers(0, 4, 500), rng.integers(0, 3, 500)
    parts = contingency(labels[:123], clusters[:123], 4, 3) + contingency(labels[123:], clusters[123:], 4, 3)
    whole = contingency(labels, clusters, 4, 3)
    assert whole.dtype == np.int64
    assert np.array_equal(parts, whole)
    assert np.array_equal(whole, reference.cluster.contingency_matrix(labels, clusters))


@pytest.mark.parametrize(
    ("labels", "clusters", "message"),
    [
        ([0, 1], [0], "2 labels for 1 clusters"),
        ([-1, 1], [0, 0], "labels run from -1 to 1; expected 0 to 1"),
        ([0, 1], [0, 2], "clusters run from 0 to 2; expected 0 to 1"),
        ([0.0, 1.0], [0, 1], "labels are a float64 array"),
        (["a", "b"], [0, 1], r"labels are a <U1 array of shape \(2,\)"),
        ([[0], [1]], [0, 1], r"shape \(2, 1\)"),
    ],
)
def test_labels_that_cannot_be_counted_are_refused(labels: list, clusters: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        contingency(labels, clusters, 2, 2)


@pytest.mark.parametrize("table", [[1, 2], [[1, -1]], [[0.5, 1.0]], [[np.nan, 1.0]]])
def test_what_is_no_table_is_refused(table: list) -> None:
    with pytest.raises(DataError, match="contingency table"):
        scores(np.array(table))
