"""k-means for initialising cluster parameters: k-means++ starts, FAISS Lloyd, the best of several restarts.

Measured on 400,000 x 10 with 20 clusters: FAISS's own random start ends at 5.70e6, scikit-learn's k-means++
start followed by FAISS at 4.00e6. So each restart takes its start from scikit-learn and its iterations from
FAISS; where FAISS is not installed scikit-learn iterates too, from the same starts.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from distclust.errors import DataError

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.floating[Any]]

# k-means++ passes over all rows once a cluster, on one core: a sample gives as good a start
_SEEDING_ROWS = 20_000
# iterations between looks at the objective, and the relative gain in them below which a restart ends
_ROUND = 10
_SETTLED = 1e-5
# Lloyd again after clusters were still empty at its end and got new centroids
_TRIES = 3
_BLOCK_BYTES = 32 * 2**20
# multiplications of an iteration (rows x dimensions x clusters) from which several threads gain
_PARALLEL_FROM = 100_000_000
_TOO_LARGE = 1e15  # squares of larger values, summed, leave float32


@dataclass(frozen=True, slots=True, kw_only=True)
class KMeansResult:
    """The best of the restarts."""

    centroids: npt.NDArray[np.float32]
    """(K, J), every one the nearest to at least one row"""
    objective: float
    """sum over rows of the squared distance to the nearest centroid"""
    n_repaired: int
    """how often a cluster ran empty in the kept restart and was given new rows"""
    n_sample: int
    """S, the rows it was fitted on"""
    backend: str
    """faiss-cpu, faiss-gpu or scikit-learn"""


def fit_kmeans(
    codes: Floats,
    n_clusters: int,
    *,
    seed: int,
    restarts: int = 10,
    iterations: int = 50,
    gpu: bool = False,
) -> KMeansResult:
    """Cluster rows by k-means (Lloyd 1957, k-means++ starts of Arthur and Vassilvitskii 2007).

    The same codes and seed give the same centroids. All rows are used (FAISS's silent subsampling is off):
    draw a sample first where there are too many. For spherical codes normalise them first.

    Args:
        codes: (S, J) finite rows; computed in float32.
        n_clusters: K.
        seed: of the starts.
        restarts: independent starts; the one with the smallest objective is kept.
        iterations: Lloyd iterations of each restart.
        gpu: iterate on the GPU where this FAISS has one, else on the CPU.

    Raises:
        DataError: no (S, J) array, values that are not finite, or fewer distinct rows than clusters.
    """
    rows = _checked(codes, n_clusters)
    if restarts < 1 or iterations < 1:
        raise ValueError(f"restarts={restarts}, iterations={iterations}; expected 1 or more of each")
    # distances are expanded squares in float32: an offset common to all rows would cost their digits
    mean = rows.mean(axis=0, dtype=np.float64)
    centred = np.subtract(rows, mean, out=np.empty_like(rows), casting="unsafe")
    faiss = _load_faiss()
    gpus = _gpus(faiss) if gpu else 0
    backend = "scikit-learn" if faiss is None else "faiss-gpu" if gpus else "faiss-cpu"
    best: tuple[float, npt.NDArray[np.float32], int] | None = None
    with threads_for(rows.size * n_clusters):
        for state in np.random.SeedSequence(seed).generate_state(restarts):
            centroids, repaired = _start(centred, n_clusters, int(state)), 0
            for _ in range(_TRIES):
                if faiss is None:
                    centroids, splits = _lloyd_sklearn(centred, centroids, iterations), 0
                else:
                    centroids, splits = _lloyd_faiss(faiss, centred, centroids, iterations, gpus > 0)
                found, objective, moved = _repair(rows, (centroids + mean).astype(np.float32))
                repaired += splits + moved
                if not moved:
                    break
                centroids = (found - mean).astype(np.float32)
            if best is None or objective < best[0]:
                best = objective, found, repaired
    assert best is not None
    logger.info(
        "k-means (%s): %d rows x %d, %d clusters, best of %d restarts: objective %.6g, %d repairs",
        backend, len(rows), rows.shape[1], n_clusters, restarts, best[0], best[2],
    )  # fmt: skip
    return KMeansResult(
        centroids=best[1], objective=best[0], n_repaired=best[2], n_sample=len(rows), backend=backend
    )


def assign_to_centroids(
    codes: Floats, centroids: Floats
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The nearest centroid of every row, in blocks of bounded memory.

    Independent of how the rows are divided into calls; exact ties go to the lowest index.

    Args:
        codes: (S, J).
        centroids: (K, J).

    Returns:
        labels (S,) int64 and *squared* Euclidean distances (S,) float64, which add up to the objective.

    Raises:
        DataError: shapes that do not fit, or rows that are not finite.
    """
    centres = np.asarray(centroids, dtype=np.float64)
    if not len(centres) or centres.shape[1:] != codes.shape[1:]:
        raise DataError(
            f"codes of shape {codes.shape} and centroids {centres.shape}; expected (S, J) and (K, J), K > 0"
        )
    labels = np.empty(len(codes), dtype=np.int64)
    distances = np.empty(len(codes), dtype=np.float64)
    centre_norms = np.einsum("kj,kj->k", centres, centres)
    epsilon = 4.0 * (codes.shape[1] + 4) * np.finfo(np.float64).eps
    for block in _blocks(len(codes), len(centres) + codes.shape[1]):
        rows = np.asarray(codes[block], dtype=np.float64)
        norms = np.einsum("sj,sj->s", rows, rows)
        if not np.isfinite(norms).all():
            row = block.start + int(np.flatnonzero(~np.isfinite(norms))[0])
            raise DataError(
                f"row {row} of the codes holds NaN or infinity; expected finite codes: see what made them"
            )
        squared = norms[:, None] - 2.0 * (rows @ centres.T) + centre_norms
        nearest = squared.argmin(axis=1)
        # The expanded square cancels, and its last bits depend on the shape of the block: what it cannot tell
        # apart is decided by plain differences.
        slack = epsilon * (norms + centre_norms.max())
        rivals = squared <= (squared[np.arange(len(rows)), nearest] + slack)[:, None]
        unsure = np.flatnonzero(np.count_nonzero(rivals, axis=1) > 1)
        if unsure.size:
            nearest[unsure] = _decide(rows[unsure], centres, rivals[unsure])
        labels[block] = nearest
        distances[block] = ((rows - centres[nearest]) ** 2).sum(axis=1)
    return labels, distances


def _decide(
    rows: npt.NDArray[np.float64], centres: npt.NDArray[np.float64], rivals: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """The nearest among each row's rivals (S, K), the lowest index on a tie, by sums in a fixed order."""
    row, rival = np.nonzero(rivals)
    squared = np.zeros(len(row))
    for dimension in range(rows.shape[1]):
        squared += (rows[row, dimension] - centres[rival, dimension]) ** 2
    first = np.searchsorted(row, np.arange(len(rows)))
    smallest = np.minimum.reduceat(squared, first)
    is_nearest = np.flatnonzero(squared == smallest[row])
    return rival[is_nearest[np.searchsorted(row[is_nearest], np.arange(len(rows)))]]


def count_distinct(codes: Floats, enough: int) -> int:
    """How many different rows there are; stops counting once `enough` are known."""
    rows = min(len(codes), max(4 * enough, 64))
    while True:
        found = len(np.unique(codes[:rows], axis=0)) if rows else 0
        if found >= enough or rows == len(codes):
            return found
        rows = min(len(codes), 4 * rows)


@functools.cache
def _load_faiss() -> ModuleType | None:
    """FAISS, or nothing and one warning: it is an optional extra (cpu or gpu)."""
    try:
        import faiss
    except ImportError:
        logger.warning(
            "FAISS is not installed: scikit-learn's k-means takes its place, slower on many cores or a GPU; "
            "pip install 'distclust[cpu]' (or 'distclust[gpu]') adds it"
        )
        return None
    return faiss


def threads_for(products: int) -> contextlib.AbstractContextManager[Any]:
    """One thread where an iteration is a matter of milliseconds, all that the process may use otherwise.

    Threads that wait for each other spin: with other processes on the same cores (workers of this very run) a
    small k-means was seen to take 20 times as long with two threads as with one.
    """
    if products >= _PARALLEL_FROM:
        return contextlib.nullcontext()
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1)


def _gpus(faiss: ModuleType | None) -> int:
    count = int(faiss.get_num_gpus()) if faiss is not None and hasattr(faiss, "get_num_gpus") else 0
    if count == 0:
        logger.info("k-means was asked for on the GPU, but this FAISS has none: it runs on the CPU")
    return count


def _checked(codes: Floats, n_clusters: int) -> npt.NDArray[np.float32]:
    array = np.asarray(codes)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(
            f"codes are a {array.dtype} array of shape {array.shape}; expected (rows, dimensions) floats"
        )
    rows = np.ascontiguousarray(array, dtype=np.float32)
    usable = (np.abs(rows) < _TOO_LARGE).all(axis=1)  # false for NaN too
    if not usable.all():
        bad = np.flatnonzero(~usable)
        raise DataError(
            f"{bad.size} of {len(rows)} rows to cluster hold NaN, infinity or values beyond {_TOO_LARGE:.0e} "
            f"(first: row {bad[0]}); expected smaller ones: correct these documents, or, where rows are "
            "codes, lower the learning rate of the phase that learnt them"
        )
    if n_clusters < 1:
        raise DataError(f"{n_clusters} clusters asked; expected 1 or more")
    distinct = count_distinct(rows, n_clusters)
    if distinct < n_clusters:
        raise DataError(
            f"{n_clusters} clusters asked, but the {len(rows)} rows hold only {distinct} distinct ones; "
            f"expected at least one distinct row a cluster: ask for at most {distinct} clusters"
        )
    return rows


def _start(rows: npt.NDArray[np.float32], n_clusters: int, state: int) -> npt.NDArray[np.float32]:
    """(K, J) k-means++ start on a sample of the rows."""
    from sklearn.cluster import kmeans_plusplus

    size = max(_SEEDING_ROWS, 10 * n_clusters)
    if len(rows) > size:
        rows = rows[np.sort(np.random.default_rng(state).choice(len(rows), size, replace=False))]
    start, _ = kmeans_plusplus(rows, n_clusters, random_state=state)
    return np.ascontiguousarray(start, dtype=np.float32)


def _lloyd_faiss(
    faiss: ModuleType,
    rows: npt.NDArray[np.float32],
    start: npt.NDArray[np.float32],
    iterations: int,
    gpu: bool,
) -> tuple[npt.NDArray[np.float32], int]:
    """Centroids (K, J), and how many empty clusters FAISS gave half of a big one as it went."""
    centroids, splits = start, 0
    # FAISS always makes all its iterations: in rounds, so that a restart that has settled can end
    for done in range(0, iterations, _ROUND):
        kmeans = faiss.Kmeans(
            rows.shape[1],
            len(start),
            niter=min(_ROUND, iterations - done),
            nredo=1,
            gpu=gpu,
            verbose=False,
            min_points_per_centroid=1,
            max_points_per_centroid=len(rows),  # the default of 256 subsamples silently
        )
        kmeans.train(rows, init_centroids=centroids)
        centroids = np.array(kmeans.centroids, dtype=np.float32).reshape(start.shape)
        stats = kmeans.iteration_stats
        splits += sum(int(entry["nsplit"]) for entry in stats)
        if stats[0]["obj"] - stats[-1]["obj"] <= _SETTLED * stats[-1]["obj"]:
            break
    return centroids, splits


def _lloyd_sklearn(
    rows: npt.NDArray[np.float32], start: npt.NDArray[np.float32], iterations: int
) -> npt.NDArray[np.float32]:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # several threads add up a centroid in whatever order they finish
    with threadpool_limits(limits=1, user_api="openmp"):
        fitted = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0.0).fit(rows)
    return np.asarray(fitted.cluster_centers_, dtype=np.float32)


def _repair(
    rows: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], float, int]:
    """Move each centroid that no row is nearest to onto the row farthest from its own; and count them."""
    moved = 0
    labels, distances = assign_to_centroids(rows, centroids)
    counts = np.bincount(labels, minlength=len(centroids))
    # each round lowers the objective, so it ends; there are as many distinct rows as clusters, so it succeeds
    while not counts.all():
        centroids = centroids.copy()
        empty = int(np.flatnonzero(counts == 0)[0])
        takeable = np.where(counts[labels] > 1, distances, -1.0)
        centroids[empty] = rows[int(takeable.argmax())]
        moved += 1
        labels, distances = assign_to_centroids(rows, centroids)
        counts = np.bincount(labels, minlength=len(centroids))
    return centroids, float(distances.sum()), moved


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (8 * max(1, columns)))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
