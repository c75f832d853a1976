"""scikit-learn's clusterings as rows of the table: fitted on a corpus, every document assigned.

Above `max_rows` documents a row is fitted on an evenly drawn sample, and then all documents are assigned, a
shard at a time. Spectral clustering has no rule for a document that it was not fitted on, so it takes all of
them or refuses. Nothing is kept of a fit but the assignments: the same corpus, settings and seed give the
same again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from distclust.config import RunConfig
from distclust.errors import ConfigError, DataError
from distclust.mixture.catalogue import DIRECTIONS, ESTIMATORS, EstimatorConfig
from distclust.mixture.energies import DISSIMILARITIES, OF_POSITIVES, DissimilarityOptions
from distclust.results.assignment import (
    Assignment,
    find_finished,
    part_name,
    partial_of,
    publish,
    take_up,
    write_part,
)
from distclust.results.baselines import (
    BLOCK_ROWS,
    Labels,
    Rows,
    evenly_drawn,
    gather,
    shard_matrix,
    unit_rows,
)
from distclust.results.predict import AMBIGUOUS, Prediction
from distclust.training.kmeans import threads_for

if TYPE_CHECKING:
    from distclust.corpus.shards import Corpus

logger = logging.getLogger(__name__)

DENSE_VALUES = 250_000_000
"""Dense values that are held at once at most: 1 GB in float32, and a few copies while they are fitted."""
_GRAPH_VALUES = 4_000_000  # differences of rows that are held at once while neighbours are looked for
_NMF_SWEEPS = 200
_SKLEARN_METRICS = {
    "euclidean": "euclidean",
    "squared_euclidean": "euclidean",  # the same neighbours
    "mahalanobis": "euclidean",  # after the rows have been whitened
    "manhattan": "manhattan",
    "minkowski": "minkowski",
    "chebyshev": "chebyshev",
    "cosine": "cosine",
}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted estimator: a rule for any rows, or the clusters of just those that it was fitted on."""

    n_fitted: int
    """Documents that it was fitted on."""
    rule: Callable[[Rows], Prediction] | None = None
    labels: Labels | None = None

    def predict(self, rows: Rows, first: int, n_clusters: int) -> Prediction:
        """What it says of rows (n, D) that begin at row `first` of the corpus."""
        if self.rule is not None:
            return self.rule(rows)
        assert self.labels is not None
        return _hard(self.labels[first : first + rows.shape[0]], n_clusters)


# ---- before the work


def check_estimator(config: RunConfig, corpus: Corpus) -> None:
    """Refuse what could not be done, before anything is fitted.

    Raises:
        ConfigError: a sample that is smaller than the number of clusters.
        DataError: too many documents for spectral, or rows that would not fit into memory.
    """
    method, settings, n = config.method, config.estimator, corpus.n_rows
    if method == "spectral":
        if n > settings.spectral_rows:
            raise DataError(
                f"spectral was given {n:,} documents and takes {settings.spectral_rows:,} at most: it needs "
                "all of them at once, and cannot assign others. Expected fewer: set source.limit, or take "
                "another method, such as gmm or lsa-kmeans (estimator.spectral_rows raises the limit, if "
                "memory and hours do not matter)"
            )
        if n <= config.clusters:
            raise DataError(
                f"spectral was given {n} documents for {config.clusters} clusters; expected more documents "
                "than clusters"
            )
    elif settings.max_rows < config.clusters:
        raise ConfigError(
            f"estimator.max_rows is {settings.max_rows} and clusters is {config.clusters}; expected a sample "
            "of at least as many documents as clusters"
        )
    if method in ("lsa-kmeans", "nmf-kmeans") and settings.components == 0:
        raise ConfigError(f"estimator.components is 0; {method} needs 1 or more: take k-means without them")
    if method in ("lsa-kmeans", "nmf-kmeans") and corpus.n_features < 2:
        raise DataError(
            f"{method} needs two features or more, the documents of {corpus.root} have one; take k-means"
        )
    if method in ("gmm", "spectral") and not _directions(method, corpus.kind == "sparse", settings):
        held = min(n, settings.max_rows if method == "gmm" else n) * corpus.n_features
        if held > DENSE_VALUES:
            raise DataError(
                f"{method} would hold {held:,} dense values; expected {DENSE_VALUES:,} at most: set "
                "estimator.components, so that rows are reduced first, or a smaller estimator.max_rows"
            )


def fitted_on(config: RunConfig, corpus: Corpus) -> int:
    """Documents that the estimator is fitted on."""
    return corpus.n_rows if config.method == "spectral" else min(corpus.n_rows, config.estimator.max_rows)


# ---- fitting


def fit_estimator(config: RunConfig, corpus: Corpus) -> Fitted:
    """Fit `config.method`, a name of `catalogue.ESTIMATORS`, on the corpus or a sample of it.

    Raises:
        DataError: rows that the method cannot take (negative ones for NMF), or a fit that failed.
    """
    settings, sparse = config.estimator, corpus.kind == "sparse"
    rows = gather(corpus, evenly_drawn(corpus.n_rows, fitted_on(config, corpus), config.seed))
    k, seed = config.clusters, config.seed
    directions = _directions(config.method, sparse, settings)
    if config.method == "nmf-kmeans":
        codes, reduce = _nmf(rows, directions, seed, settings)
    elif directions:
        codes, reduce = _lsa(rows, directions, seed, settings)
    else:
        codes, reduce = rows, _as_is
    if config.method == "spectral":
        return Fitted(rows.shape[0], labels=_spectral(_dense(codes), k, seed, settings))
    if config.method == "gmm":
        rule = _gmm(_dense(codes), k, seed, settings)
    else:
        rule = _kmeans(codes, k, seed, settings)
    return Fitted(rows.shape[0], lambda block: rule(reduce(block)))


def _directions(method: str, sparse: bool, settings: EstimatorConfig) -> int:
    """Directions to reduce rows to; 0 leaves them as they are."""
    if method == "k-means":
        return 0
    if settings.components is None:
        return DIRECTIONS if sparse or method in ("lsa-kmeans", "nmf-kmeans") else 0
    return settings.components


def _as_is(rows: Rows) -> Rows:
    return rows


def _dense(rows: Rows) -> npt.NDArray[np.floating[Any]]:
    return rows if isinstance(rows, np.ndarray) else rows.toarray()


def _lsa(
    rows: Rows, directions: int, seed: int, settings: EstimatorConfig
) -> tuple[Rows, Callable[..., Rows]]:
    """Codes of the rows on their singular directions, and the rule for others."""
    from sklearn.decomposition import TruncatedSVD

    svd = TruncatedSVD(min(directions, *rows.shape), random_state=seed)
    scale = unit_rows if settings.unit_rows else _as_is
    with threads_for(rows.size * directions):
        codes = scale(svd.fit_transform(rows))
    return codes, lambda block: scale(svd.transform(block))


def _nmf(
    rows: Rows, directions: int, seed: int, settings: EstimatorConfig
) -> tuple[Rows, Callable[..., Rows]]:
    """Weights of the rows on non-negative parts, and the rule for others."""
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    least = float(rows.min())
    if least < 0:
        raise DataError(
            f"nmf-kmeans was given rows with negative values (the least is {least:.4g}); expected none below "
            "0: take lsa-kmeans, which does not mind"
        )
    nmf = NMF(min(directions, *rows.shape), init="nndsvda", random_state=seed, max_iter=settings.iterations)
    scale = unit_rows if settings.unit_rows else _as_is
    with threads_for(rows.size * directions), _telling("the factorisation"):
        nmf.fit(rows)
    # a fixed number of sweeps: with a tolerance a row's weights would depend on the rows beside it
    nmf.set_params(tol=0.0, max_iter=_NMF_SWEEPS)

    # a part twice as long with weights half as large is the same part
    lengths = np.linalg.norm(nmf.components_, axis=1)

    def weights(block: Rows) -> Rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return scale(nmf.transform(block) * lengths)

    return np.concatenate([weights(rows[at : at + BLOCK_ROWS]) for at in _blocks(rows)]), weights


def _kmeans(rows: Rows, k: int, seed: int, settings: EstimatorConfig) -> Callable[[Rows], Prediction]:
    from sklearn.cluster import KMeans
    from sklearn.metrics.pairwise import euclidean_distances
    from threadpoolctl import threadpool_limits

    # several threads add a centroid up in whatever order they finish
    with threadpool_limits(limits=1, user_api="openmp"), _telling("k-means"):
        fitted = KMeans(
            min(k, rows.shape[0]), n_init=settings.restarts, max_iter=settings.iterations, random_state=seed
        ).fit(rows)

    # expanded squares, as `fitted.predict` has them in float32, cost rows far from 0 their digits
    centres = fitted.cluster_centers_.astype(np.float64)
    mean = centres.mean(axis=0)
    # distances in units of the centres' own, so that "close" does not depend on the data's
    unit = float(np.square(centres - mean).sum(axis=1).mean()) or 1.0

    def predict(block: Rows) -> Prediction:
        block, near = block.astype(np.float64), centres
        if isinstance(block, np.ndarray):
            block, near = block - mean, centres - mean
        distances = euclidean_distances(block, near, squared=True)
        return _hard(distances.argmin(axis=1), k)._replace(ambiguous=_close(-distances / unit))

    return predict


def _gmm(rows: Rows, k: int, seed: int, settings: EstimatorConfig) -> Callable[[Rows], Prediction]:
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        k,
        covariance_type="diag" if settings.covariance == "diagonal" else settings.covariance,
        n_init=settings.restarts,
        max_iter=settings.iterations,
        reg_covar=settings.floor,
        random_state=seed,
    )
    try:
        with threads_for(rows.size * k), _telling("the mixture of Gaussians"):
            mixture.fit(rows.astype(np.float64))
    except ValueError as error:
        raise DataError(
            f"gmm could not be fitted ({' '.join(str(error).split())}); expected variances above 0: raise "
            f"estimator.floor (it is {settings.floor}), or take estimator.covariance=diagonal, or fewer "
            "clusters"
        ) from error

    def predict(block: Rows) -> Prediction:
        p = mixture.predict_proba(_dense(block).astype(np.float64))
        with np.errstate(divide="ignore"):
            close = _close(np.log(p))
        return Prediction(p.argmax(axis=1).astype(np.int64), p.astype(np.float32), close)

    return predict


def _spectral(rows: npt.NDArray[Any], k: int, seed: int, settings: EstimatorConfig) -> Labels:
    from sklearn.cluster import SpectralClustering
    from threadpoolctl import threadpool_limits

    graph = neighbour_graph(rows, settings)
    spectral = SpectralClustering(k, affinity="precomputed", n_init=settings.restarts, random_state=seed)
    # a neighbour of a neighbour: as scikit-learn itself does with its nearest-neighbour affinity
    with threadpool_limits(limits=1), _telling("spectral clustering"):
        labels: Labels = spectral.fit_predict(0.5 * (graph + graph.T)).astype(np.int64)
    return labels


def neighbour_graph(rows: npt.NDArray[Any], settings: EstimatorConfig) -> Any:
    """The (N, N) CSR matrix of ones where a row's `neighbours` nearest rows are, itself the first of them.

    scikit-learn's neighbours where it has the dissimilarity; for the others the formula of the table. A
    dissimilarity that is not symmetric is d(row, neighbour). Mahalanobis takes one precision for all rows,
    the inverse of their covariance: there are no clusters yet that could have their own.

    Args:
        rows: (N, J), dense.
        settings: dissimilarity, neighbours and the options of the formula.

    Raises:
        DataError: negative values, and a divergence that takes none.
    """
    name, n = settings.dissimilarity, min(settings.neighbours, len(rows))
    if name in OF_POSITIVES and rows.min() < 0:
        raise DataError(
            f"estimator.dissimilarity is {name}, and the rows have negative values; expected none below 0: "
            "take another dissimilarity. Sparse rows that were reduced first are left as they are by "
            "estimator.components=0"
        )
    if name == "mahalanobis":
        rows = _whitened(rows, settings.floor)
    if name in _SKLEARN_METRICS:
        from sklearn.neighbors import NearestNeighbors

        options = {"p": settings.p} if name == "minkowski" else {}
        search = NearestNeighbors(n_neighbors=n, metric=_SKLEARN_METRICS[name], algorithm="brute", **options)
        return search.fit(rows).kneighbors_graph(rows)
    return _graph_by_formula(rows, n, settings)


def _graph_by_formula(rows: npt.NDArray[Any], n: int, settings: EstimatorConfig) -> Any:
    from scipy.sparse import csr_matrix

    formula = DISSIMILARITIES[settings.dissimilarity].formula
    options = DissimilarityOptions(p=settings.p, interval=settings.interval, normaliser=settings.normaliser)
    points = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
    step = max(1, _GRAPH_VALUES // points.numel())
    found = []
    for at in range(0, len(points), step):
        d = formula(points[at : at + step, None, :], points[None, :, :], options)  # (step, N)
        d[torch.arange(len(d)), torch.arange(at, at + len(d))] = -torch.inf  # itself first
        found.append(d.topk(n, largest=False).indices.numpy())
    columns = np.concatenate(found).ravel()
    bounds = np.arange(0, columns.size + 1, n)
    return csr_matrix((np.ones(columns.size), columns, bounds), shape=(len(rows), len(rows)))


def _whitened(rows: npt.NDArray[Any], floor: float) -> npt.NDArray[np.float64]:
    """Rows whose Euclidean distances are the Mahalanobis distances of those given."""
    covariance = np.atleast_2d(np.cov(rows, rowvar=False, dtype=np.float64))
    covariance += floor * max(float(np.trace(covariance)) / len(covariance), floor) * np.eye(len(covariance))
    factor = np.linalg.cholesky(np.linalg.inv(covariance))
    return np.asarray(rows.astype(np.float64) @ factor)


def _blocks(rows: Rows) -> range:
    return range(0, rows.shape[0], BLOCK_ROWS)


def _hard(labels: Labels, k: int) -> Prediction:
    """One cluster with certainty."""
    n = len(labels)
    p = np.zeros((n, k), np.float32)
    p[np.arange(n), labels] = 1.0
    return Prediction(labels, p, np.zeros(n, np.bool_))


def _close(scores: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """(n,) whether the two best of a row's scores (n, K) are so close that rounding decides."""
    if scores.shape[1] < 2:
        return np.zeros(len(scores), np.bool_)
    best = np.partition(scores, -2, axis=1)[:, -2:]
    return np.asarray(best[:, 1] - best[:, 0] < AMBIGUOUS)


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """scikit-learn's warnings as one of ours each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(" ".join(str(w.message).split()) for w in caught):
        logger.warning("%s: %s", what, message)


# ---- assigning


def find_assigned(config: RunConfig, corpus: Corpus, out: Path, replace: bool = False) -> Assignment | None:
    """The assignments of this very estimator, where they are finished; `replace` removes others.

    Raises:
        DataError: `out` holds something else.
    """
    return find_finished(out, _plan(config, corpus), replace)


def assign_fitted(
    fitted: Fitted,
    config: RunConfig,
    corpus: Corpus,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Assignment:
    """Write every document's cluster, in the same parts as `results.assign`.

    The column probability is the responsibility of a Gaussian, and 1 where a method has no doubt to tell of.

    Args:
        fitted: by `fit_estimator` with the same configuration and corpus.
        config: the run's.
        corpus: the run's.
        out: the folder to make; parts that an interrupted call left beside it are kept.
        progress: called with the parts that are done and how many there are.

    Raises:
        DataError: the folder holds something else, or cannot be written.
    """
    plan, partial = _plan(config, corpus), partial_of(out)
    counts = {int(part["part"]): part for part in take_up(partial, plan)}
    for part in range(plan["parts"]):
        if part not in counts:
            table, counted = _part(fitted, config.clusters, corpus, part)
            write_part(partial / part_name(part), table, counted)
            counts[part] = counted
        if progress is not None:
            progress(part + 1, plan["parts"])
    publish(partial, out, plan, [counts[part] for part in range(plan["parts"])])
    return Assignment.open(out)


def _part(fitted: Fitted, k: int, corpus: Corpus, number: int) -> tuple[pa.Table, dict[str, Any]]:
    shard, rows, first = corpus.shard(number), shard_matrix(corpus, number), int(corpus.shard_starts[number])
    labels, probabilities, ambiguous = [np.empty(0, np.int64)], [np.empty(0, np.float32)], 0
    for at in _blocks(rows):
        found = fitted.predict(rows[at : at + BLOCK_ROWS], first + at, k)
        labels.append(found.clusters)
        probabilities.append(found.probabilities[np.arange(len(found.clusters)), found.clusters])
        ambiguous += int(found.ambiguous.sum())
    clusters = np.concatenate(labels)
    table = pa.table(
        {
            "id": pa.array(shard.ids(), pa.string()),
            "cluster": pa.array(clusters.astype(np.int32)),
            "probability": pa.array(np.concatenate(probabilities)),
        }
    )
    filled = rows.any(axis=1).sum() if isinstance(rows, np.ndarray) else (np.diff(rows.indptr) > 0).sum()
    counts = {
        "part": number,
        "documents": len(clusters),
        "empty": len(clusters) - int(filled),
        "ambiguous": ambiguous,
        "sizes": np.bincount(clusters, minlength=k).tolist(),
    }
    return table, counts


def _plan(config: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """What the parts are made from; see `results.assignment`."""
    import sklearn

    settings = {name: getattr(config.estimator, name) for name in sorted(ESTIMATORS[config.method].uses)}
    made_by = [config.method, settings, config.clusters, config.seed, sklearn.__version__]
    return {
        "version": 1,
        "model": hashlib.sha256(json.dumps(made_by).encode()).hexdigest(),
        "clusters": config.clusters,
        "all_probabilities": False,
        "data": corpus.manifest.fingerprint,
        "parts": len(corpus.shard_rows),
    }
