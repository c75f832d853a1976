"""The initialisation: a million codes, k-means++ seeding and FAISS, against scikit-learn and FAISS alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from distclust.config import InitialiseConfig
from distclust.training.kmeans import assign_to_centroids, fit_kmeans
from jobs.benchmarks.measure import Row

CODE, CLUSTERS, TRUE_CLUSTERS = 10, 100, 60
RESTARTS = 1
SAMPLE = InitialiseConfig().sample
"""Codes that a run draws; objectives are of all rows."""


def codes(rows: int) -> NDArray[np.float32]:
    """Codes of clusters that overlap, of different sizes and widths."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((TRUE_CLUSTERS, CODE)) * 2
    share = 1 / np.arange(1, TRUE_CLUSTERS + 1) ** 0.5
    labels = rng.choice(TRUE_CLUSTERS, rows, p=share / share.sum())
    widths = 0.3 + rng.random(TRUE_CLUSTERS)
    found = centres[labels] + rng.standard_normal((rows, CODE)) * widths[labels, None]
    return found.astype(np.float32)


def kmeans(quick: bool) -> list[Row]:
    """Seconds and objectives, all with the same number of restarts and of iterations at most."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    rows = 100_000 if quick else 1_000_000
    x = codes(rows)

    def ours() -> NDArray[np.float32]:
        return fit_kmeans(x, CLUSTERS, seed=0, restarts=RESTARTS, iterations=50).centroids

    def as_a_run() -> NDArray[np.float32]:
        drawn = np.random.default_rng(0).choice(rows, min(rows, SAMPLE), replace=False)
        return fit_kmeans(x[np.sort(drawn)], CLUSTERS, seed=0, restarts=RESTARTS, iterations=50).centroids

    def sklearn_kmeans() -> NDArray[np.float32]:
        fitted = KMeans(CLUSTERS, n_init=RESTARTS, max_iter=50, random_state=0).fit(x)
        return np.asarray(fitted.cluster_centers_)

    def mini_batch() -> NDArray[np.float32]:
        fitted = MiniBatchKMeans(CLUSTERS, n_init=3, batch_size=4096, random_state=0).fit(x)
        return np.asarray(fitted.cluster_centers_)

    seconds, objective = {}, {}
    peers: dict[str, Callable[[], NDArray[np.float32]]] = {
        "ours": as_a_run,
        "ours on all rows": ours,
        "scikit-learn KMeans": sklearn_kmeans,
        "FAISS alone (random start)": lambda: _faiss_alone(x),
        "MiniBatchKMeans": mini_batch,
    }
    skipped = {}
    for name, function in peers.items():
        best = np.inf
        for _ in range(3 if name == "ours" else 1):
            started = time.perf_counter()
            try:
                centroids = function()
            except ImportError:
                skipped[name] = "not installed"
                break
            best = min(best, time.perf_counter() - started)
            objective[name] = float(assign_to_centroids(x, centroids)[1].sum())
        seconds[name] = best
    found = []
    for name in list(peers)[1:]:
        missing = name in skipped
        found.append(
            Row(
                name=f"k-means, {rows:,} x {CODE}, K {CLUSTERS}: seconds",
                ours=seconds["ours"],
                peer=None if missing else seconds[name],
                ratio=None if missing else seconds[name] / seconds["ours"],
                unit="s",
                peer_name=f"{name}: not installed" if missing else name,
                note="target: under 3 s" if name.startswith("scikit") else "",
            )
        )
        if not missing:
            found.append(
                Row(
                    name=f"k-means, {rows:,} x {CODE}, K {CLUSTERS}: objective",
                    ours=objective["ours"] / rows,
                    peer=objective[name] / rows,
                    ratio=objective[name] / objective["ours"],
                    unit="per row",
                    peer_name=name,
                    note="target: within 1 %" if name.startswith("scikit") else "",
                )
            )
    return found


def _faiss_alone(x: NDArray[np.float32]) -> NDArray[np.float32]:
    import faiss

    found = faiss.Kmeans(
        CODE, CLUSTERS, niter=50, nredo=RESTARTS, seed=1, max_points_per_centroid=len(x), verbose=False
    )
    found.train(x)
    return np.asarray(found.centroids).reshape(CLUSTERS, CODE)
