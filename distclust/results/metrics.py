"""How well clusters agree with given classes, from the contingency table alone.

The table is additive, so workers count their own documents and the sum is scored: nothing here needs the
labels of all documents in one place. Conventions (they differ between papers, so both are given and named):

* NMI geometric, ``I / sqrt(H(classes) H(clusters))``: DAMIC, DEC, IDEC, DCN, VaDE (scikit-learn before 0.22);
* NMI arithmetic, ``2 I / (H(classes) + H(clusters))``: DMAE, AE-CM (scikit-learn since 0.22), never larger;
* ARI: Hubert and Arabie 1985;
* ACC: the share of documents on the best one-to-one matching of clusters to classes (Hungarian method); with
  unequal numbers what has no partner counts as wrong, as padding with zeros to a square does.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from distclust.errors import DataError

# above it the sum of squared counts may not fit 63 bits
_SQUARES_FIT_INT64 = 3_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Agreement of clusters with classes; 1 is perfect for each, ARI is 0 on average for random clusters."""

    nmi_geometric: float
    nmi_arithmetic: float
    ari: float
    acc: float

    def as_dict(self) -> dict[str, float]:
        """The four by name, as summary files and the tracker hold them."""
        return asdict(self)


def contingency(
    labels: npt.ArrayLike, clusters: npt.ArrayLike, n_classes: int, n_clusters: int
) -> npt.NDArray[np.int64]:
    """Count documents by class and cluster.

    Args:
        labels: (N,) integers in [0, n_classes).
        clusters: (N,) integers in [0, n_clusters).

    Returns:
        (n_classes, n_clusters) int64; add the tables of parts of a collection for the table of the whole.

    Raises:
        DataError: unequal lengths, no integers, or a value out of range.
    """
    classes = _numbers("labels", labels, n_classes)
    found = _numbers("clusters", clusters, n_clusters)
    if classes.shape != found.shape:
        raise DataError(
            f"{classes.size} labels for {found.size} clusters; expected one label a document: "
            "leave out the documents without exactly one label on both sides"
        )
    # one number a cell: for a million documents this takes milliseconds, a loop seconds
    cells = np.bincount(classes * n_clusters + found, minlength=n_classes * n_clusters)
    return cells.astype(np.int64, copy=False).reshape(n_classes, n_clusters)


def scores(table: npt.ArrayLike) -> Scores:
    """All four scores of a (C, K) contingency table of counts.

    The same figures as scikit-learn's, its conventions for degenerate tables included: one class and one
    cluster, or no documents at all, score 1 (so say "not scored" where nothing was labelled); one of the two
    alone being trivial scores NMI and ARI 0.

    Raises:
        DataError: not a two-dimensional table of non-negative whole numbers.
    """
    counts = _checked_table(table)
    geometric, arithmetic = _nmi(counts)
    return Scores(nmi_geometric=geometric, nmi_arithmetic=arithmetic, ari=_ari(counts), acc=_acc(counts))


def _numbers(what: str, values: npt.ArrayLike, count: int) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(
            f"{what} are a {array.dtype} array of shape {array.shape}; expected (N,) integers: "
            "number the classes from 0 first"
        )
    if array.size and (int(array.min()) < 0 or int(array.max()) >= count):
        raise DataError(
            f"{what} run from {array.min()} to {array.max()}; expected 0 to {count - 1}: "
            "leave out unlabelled documents, or raise the number"
        )
    return array.astype(np.int64, copy=False)


def _checked_table(table: npt.ArrayLike) -> npt.NDArray[np.int64]:
    counts = np.asarray(table)
    whole = counts.ndim == 2 and (counts.dtype.kind in "iu" or np.array_equal(counts, np.trunc(counts)))
    if not whole or (counts.size and counts.min() < 0):
        raise DataError(
            f"the contingency table is a {counts.dtype} array of shape {counts.shape}; "
            "expected (classes, clusters) counts of documents, as contingency() makes them"
        )
    return counts.astype(np.int64, copy=False)


def _entropy(marginal: npt.NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution that the counts of a marginal give."""
    counts = marginal[marginal > 0].astype(np.float64)
    total = counts.sum()
    return float(-np.sum(counts / total * (np.log(counts) - math.log(total))))


def _nmi(counts: npt.NDArray[np.int64]) -> tuple[float, float]:
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    used_rows, used_columns = int(np.count_nonzero(rows)), int(np.count_nonzero(columns))
    if used_rows <= 1 and used_columns <= 1:
        return 1.0, 1.0
    if used_rows <= 1 or used_columns <= 1:
        return 0.0, 0.0
    row, column = np.nonzero(counts)
    cell = counts[row, column].astype(np.float64)
    total = float(rows.sum())
    # log before the product: rows * columns overflows int64 from some billions of documents on
    log_expected = np.log(rows[row]) + np.log(columns[column]) - math.log(total)
    information = float(np.sum(cell / total * (np.log(cell) - log_expected)))
    if information <= np.finfo(np.float64).eps:
        return 0.0, 0.0
    first, second = _entropy(rows), _entropy(columns)
    return min(1.0, information / math.sqrt(first * second)), min(1.0, 2.0 * information / (first + second))


def _square_sum(counts: npt.NDArray[np.int64], total: int) -> int:
    flat = counts.ravel()
    if total > _SQUARES_FIT_INT64:
        return sum(int(count) ** 2 for count in flat)
    return int(np.dot(flat, flat))


def _ari(counts: npt.NDArray[np.int64]) -> float:
    # pairs of documents in whole Python integers: products of pair counts pass 64 bits at 60,000 documents
    total = int(counts.sum())
    together = _square_sum(counts, total)
    by_class = _square_sum(counts.sum(axis=1), total)
    by_cluster = _square_sum(counts.sum(axis=0), total)
    true_positive = together - total
    false_negative = by_class - together
    false_positive = by_cluster - together
    true_negative = total * total - by_class - by_cluster + together
    if false_negative == 0 and false_positive == 0:
        return 1.0
    numerator = 2 * (true_positive * true_negative - false_negative * false_positive)
    return numerator / (
        (true_positive + false_negative) * (false_negative + true_negative)
        + (true_positive + false_positive) * (false_positive + true_negative)
    )


def _acc(counts: npt.NDArray[np.int64]) -> float:
    total = int(counts.sum())
    if total == 0:
        return 1.0
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return int(counts[rows, columns].sum()) / total
