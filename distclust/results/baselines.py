"""What a simple method finds in the same documents: the figures that stand beside every deep one.

* ``k-means``: on the rows as they are (TF-IDF, or dense input), 10 restarts;
* ``LSA + k-means``: 50 singular directions (Deerwester et al. 1990), rows scaled to length 1, then as above;
* ``AE + k-means``: on the codes of the pretrained autoencoder, as they are and scaled to length 1;
* ``gate after warm start`` or ``before joint training``: the run's own labels before its joint phase.

Which of them a run gets follows from its row (`code_phase`, `start_phase`): there are no codes to cluster
without a pretrained autoencoder, and no labels from before joint training where it starts from scratch.

No labels come in here. Above `max_rows` documents everything is fitted on an evenly drawn sample, and then
all documents are assigned, a shard at a time.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distclust.config import RunConfig
from distclust.mixture.catalogue import ESTIMATORS, EstimatorConfig
from distclust.mixture.method import STARTS
from distclust.mixture.taxonomy import losses
from distclust.results.from_checkpoint import encode_corpus, predict_corpus
from distclust.training.kmeans import assign_to_centroids, count_distinct, fit_kmeans, threads_for

if TYPE_CHECKING:
    from distclust.corpus.shards import Corpus
    from distclust.mixture.model import MixtureModel

logger = logging.getLogger(__name__)

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Rows = Any  # scipy CSR matrix or dense array (n, D)

LSA_DIRECTIONS = 50
_RESTARTS = 10
BLOCK_ROWS = 16_384
"""Rows that are assigned at once."""
_ROWS_TIMES_CLUSTERS = 4_000_000
"""Above this k-means on CSR rows is fitted on fewer of them, again evenly drawn: a restart costs rows times
clusters, and a baseline must not take hours where the run takes minutes."""


_SAME = {"k-means": "k-means", "lsa-kmeans": "LSA + k-means"}  # rows of the table that are baselines too


# ---- which of them a run gets


def baselines_of(
    config: RunConfig, corpus: Corpus, phases: Collection[str], model_after: Callable[[str], MixtureModel]
) -> dict[str, Callable[[], dict[str, Labels]]]:
    """How to make each kind of baseline that makes sense for a run: {kind: {name: labels (N,)}}.

    Args:
        config: the run's.
        corpus: the run's.
        phases: the phases that have left a checkpoint.
        model_after: the model as it stood at the end of one of them.
    """
    k, seed = config.clusters, config.seed
    own = _SAME.get(config.method) if config.estimator == EstimatorConfig() else None
    kinds = {"rows": lambda: corpus_baselines(corpus, k, seed, leave_out=own)}
    if config.method in ESTIMATORS:
        return kinds
    before, start = code_phase(config), start_phase(config)
    if before is not None and before in phases:

        def codes() -> dict[str, Labels]:
            found = code_baselines(encode_corpus(model_after(before), corpus), k, seed)
            # a row that trains nothing further is one of the two itself
            alone = start is None and not any(losses(phase).clustering for phase in config.phases)
            if alone and "k-means" in config.row.readout.replace("kmeans", "k-means"):
                del found["AE (l2) + k-means" if config.model.unit_codes else "AE + k-means"]
            return found

        kinds["codes"] = codes
    if start is not None and start[0] in phases:
        phase, name = start
        kinds["gate"] = lambda: {name: predict_corpus(model_after(phase), corpus)}
    return kinds


def code_phase(config: RunConfig) -> str | None:
    """The phase that ends the autoencoder's pretraining: the last that trains it on reconstruction alone,
    before the first that clusters. None where nothing is pretrained."""
    found = None
    for phase in config.phases:
        kinds = losses(phase)
        if kinds.clustering:
            break
        if phase.epochs and "network" in phase.trains and kinds.other:
            found = phase.name
    return found


def start_phase(config: RunConfig) -> tuple[str, str] | None:
    """The gate's warm start, else the phase that the last joint phase starts from; and the name of the
    baseline that its labels are.

    None where those labels would say nothing: no joint phase, clusters that start at random or with the joint
    phase itself, or a gate of its own that has learnt nothing yet.
    """
    joint = [
        i for i, phase in enumerate(config.phases) if losses(phase).clustering and not losses(phase).warm
    ]
    before = config.phases[: joint[-1]] if joint else ()
    begun = {name for phase in before for name in phase.begin}
    if not begun & STARTS:
        return None
    learnt = any(phase.epochs and "gate" in phase.trains for phase in before)
    own = config.row.gate not in ("tied", "prior", "hard")
    if own and not learnt and not any("gate" in name for name in begun):
        return None
    warm = [phase.name for phase in before if losses(phase).warm and "gate" in phase.trains]
    return (warm[-1], "gate after warm start") if warm else (before[-1].name, "before joint training")


# ---- how they are made


def corpus_baselines(
    corpus: Corpus, n_clusters: int, seed: int, max_rows: int = 200_000, leave_out: str | None = None
) -> dict[str, Labels]:
    """Cluster a prepared corpus without any network.

    Args:
        corpus: sparse or dense, `corpus.shards.Corpus`.
        n_clusters: K; fewer are made, with a warning, where too few documents (or their LSA rows) differ.
        seed: of the starts, the sample and the singular directions.
        max_rows: documents fitted on at most; they are held in memory at once, the others a block at a time.
            k-means on CSR rows is fitted on 4 million / K of them at most.
        leave_out: the one of the two that is not wanted.

    Returns:
        ``{"k-means": labels, "LSA + k-means": labels}``, each (corpus.n_rows,) in the order of the corpus.
    """
    from sklearn.decomposition import TruncatedSVD

    fitted = gather(corpus, evenly_drawn(corpus.n_rows, max_rows, seed))
    found = {}
    if leave_out != "k-means":
        rows, most = fitted, max(_ROWS_TIMES_CLUSTERS // n_clusters, n_clusters)
        if corpus.kind == "sparse" and rows.shape[0] > most:
            rows = rows[evenly_drawn(rows.shape[0], most, seed)]
        found["k-means"] = _assign(corpus, _fit_rows(rows, n_clusters, seed))
    if leave_out == "LSA + k-means":
        return found
    if corpus.n_features < 2:
        logger.warning("no LSA baseline: it needs two features or more, these documents have one")
        return found
    directions = min(LSA_DIRECTIONS, corpus.n_features, fitted.shape[0])
    svd = TruncatedSVD(directions, random_state=seed)
    with threads_for(fitted.size * directions):
        codes = unit_rows(svd.fit_transform(fitted))
    centroids = _fit_codes(codes, n_clusters, seed)

    def nearest(rows: Rows) -> Labels:
        return assign_to_centroids(unit_rows(svd.transform(rows)), centroids)[0]

    found["LSA + k-means"] = _assign(corpus, nearest)
    return found


def code_baselines(codes: Floats, n_clusters: int, seed: int, max_rows: int = 200_000) -> dict[str, Labels]:
    """Cluster the codes of an autoencoder by k-means, 10 restarts.

    Args:
        codes: (N, J) finite, in the order of the corpus.
        n_clusters: K; fewer are made, with a warning, where the codes have collapsed to fewer distinct rows.
        seed: of the starts and the sample.
        max_rows: codes fitted on at most.

    Returns:
        ``{"AE + k-means": labels, "AE (l2) + k-means": labels}``, each (N,).
    """
    sample = evenly_drawn(len(codes), max_rows, seed)
    found = {}
    for name, rows in {"AE + k-means": codes, "AE (l2) + k-means": unit_rows(codes)}.items():
        centroids = _fit_codes(rows[sample], n_clusters, seed)
        found[name] = assign_to_centroids(rows, centroids)[0]
    return found


def evenly_drawn(n_rows: int, max_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Ascending row numbers: all, or one at random out of each of max_rows equal stretches."""
    if n_rows <= max_rows:
        return np.arange(n_rows, dtype=np.int64)
    edges = np.linspace(0, n_rows, max_rows + 1).astype(np.int64)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def shard_matrix(corpus: Corpus, number: int) -> Rows:
    """One shard as a CSR matrix or dense array, not copied where the memory map will do."""
    from scipy.sparse import csr_matrix

    shard = corpus.shard(number)
    if shard.offsets is None:
        return shard.dense
    shape = (len(shard.offsets) - 1, corpus.n_features)
    return csr_matrix((shard.values, shard.indices, shard.offsets), shape=shape, copy=False)


def gather(corpus: Corpus, rows: npt.NDArray[np.int64]) -> Rows:
    """The given ascending rows of the corpus, stacked."""
    from scipy.sparse import vstack

    starts = corpus.shard_starts
    parts = []
    for number, (first, last) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        inside = rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)]
        if inside.size:
            parts.append(shard_matrix(corpus, number)[inside - first])
    return np.concatenate(parts) if corpus.kind == "dense" else vstack(parts, format="csr")


def _assign(corpus: Corpus, nearest: Callable[[Rows], Labels]) -> Labels:
    found = []
    for number in range(len(corpus.shard_rows)):
        rows = shard_matrix(corpus, number)
        found += [nearest(rows[at : at + BLOCK_ROWS]) for at in range(0, rows.shape[0], BLOCK_ROWS)]
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _fit_rows(rows: Rows, n_clusters: int, seed: int) -> Callable[[Rows], Labels]:
    """k-means on the rows of a corpus; dense ones by FAISS, CSR by scikit-learn, which leaves it sparse."""
    if isinstance(rows, np.ndarray):
        centroids = _fit_codes(rows, n_clusters, seed)
        return lambda block: assign_to_centroids(block, centroids)[0]
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # several threads add a centroid up in whatever order they finish
    with threadpool_limits(limits=1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # too few distinct rows: said below
        kmeans = KMeans(min(n_clusters, rows.shape[0]), n_init=_RESTARTS, random_state=seed).fit(rows)
    _say_if_fewer(len(np.unique(kmeans.labels_)), n_clusters, rows.shape[0])
    return lambda block: kmeans.predict(block).astype(np.int64)


def _fit_codes(codes: Floats, n_clusters: int, seed: int) -> Floats:
    """Centroids (K, J); fewer where there are fewer distinct rows: a baseline must not end a run."""
    distinct = count_distinct(codes, n_clusters)
    _say_if_fewer(distinct, n_clusters, len(codes))
    return fit_kmeans(codes, min(n_clusters, distinct), seed=seed, restarts=_RESTARTS).centroids


def _say_if_fewer(made: int, n_clusters: int, rows: int) -> None:
    if made < n_clusters:
        message = "a k-means baseline makes %d clusters, not %d: its %d rows hold no more distinct ones"
        logger.warning(message, made, n_clusters, rows)


def unit_rows(rows: npt.NDArray[np.floating[Any]]) -> Floats:
    """Rows scaled to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
