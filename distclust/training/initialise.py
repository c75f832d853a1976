"""Starts of the cluster parameters: k-means on an evenly drawn sample of codes, and what follows from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from distclust.config import RunConfig
from distclust.corpus.stream import Batch, Stream
from distclust.errors import DataError
from distclust.mixture.energies import (
    POSITIVE,
    CentroidEnergy,
    GaussianEnergy,
    init_plus_plus,
    outside_domain,
    told_of_domain,
)
from distclust.mixture.gates import LinearGate, PriorGate
from distclust.mixture.method import DIRECTIONS, KMEANS
from distclust.mixture.model import MixtureModel
from distclust.mixture.networks import Directions, Identity
from distclust.mixture.sparse import Rows, SparseRows
from distclust.training.kmeans import assign_to_centroids, fit_kmeans, threads_for
from distclust.training.world import World

log = logging.getLogger(__name__)
BLOCK = 512


_SAMPLE_NUMBERS = 2**28
"""Numbers in a sample of codes at most (1 GiB in float32): long codes are drawn from fewer rows."""


def start_clusters(name: str, model: MixtureModel, stream: Stream, config: RunConfig, world: World) -> None:
    """What a phase may begin with: `singular_directions`, `initialise_clusters`, `pinv_gate`, `e_step_gate`,
    `gaussian_start` (`method.STARTS`).

    Raises:
        DataError: when there are fewer distinct codes than clusters.
    """
    if name == KMEANS:
        initialise_clusters(model, stream, config, world)
    elif name == DIRECTIONS:
        find_directions(model, stream, config, world)
    elif name == "pinv_gate":
        assert isinstance(model.gate, LinearGate)
        model.gate.start_from(model.pseudo_centroids)
    elif name == "e_step_gate":
        assert isinstance(model.gate, LinearGate)
        model.gate.start_at_e_step(model.pseudo_centroids)
    else:
        gaussian_start(model, stream, config, world)


def initialise_clusters(model: MixtureModel, stream: Stream, config: RunConfig, world: World) -> None:
    """Set the pseudo-labels' centroids and, for a mixture over codes, the parameters of its energies.

    Every worker encodes its share of an evenly drawn sample, rank 0 fits, everybody gets the result.

    Raises:
        DataError: when there are fewer distinct codes than clusters, or rows that the dissimilarity is not
            defined for.
    """
    codes = world.gather_rows(_sample_codes(model, stream, config, world))
    k, j = config.clusters, model.code_size
    energy = model.energy if isinstance(model.energy, CentroidEnergy) else None
    centroids = torch.zeros(k, j, device=world.device)
    starts = torch.zeros(k, j, device=world.device)
    kind = "kmeans" if energy is None else energy.dissimilarity.starts_from
    if kind == "init_plus_plus" and any("em" in phase.statistics for phase in config.phases):
        kind = "kmeans"  # the M-step's centroids are means, and so is its start
    factors = torch.zeros(k, j, j, device=world.device) if kind == "kmeans_covariance" else None

    def fit() -> str:
        if energy is not None:
            _check_domain(energy, codes, isinstance(model.network, Identity))
        sample = codes.cpu().numpy()
        result = fit_kmeans(
            sample,
            k,
            seed=config.seed,
            restarts=config.initialise.restarts,
            iterations=config.initialise.iterations,
            gpu=world.device.type == "cuda",
        )
        centroids.copy_(torch.from_numpy(result.centroids))
        starts.copy_(centroids)
        if energy is not None and kind == "init_plus_plus":
            starts.copy_(_max_min_start(energy, codes, k, config.seed))
        if factors is not None:
            identity = model.settings.precision_start == "identity"
            start = torch.eye(j).expand(k, j, j) if identity else precision_factors(sample, result.centroids)
            factors.copy_(start)
        log.info(
            "k-means: %d codes of %d rows, objective %.6g, %d empty clusters repaired, %s",
            result.n_sample,
            stream.corpus.n_rows,
            result.objective,
            result.n_repaired,
            result.backend,
        )
        return ""

    world.on_first(fit)
    model.pseudo_centroids.copy_(world.broadcast(centroids))
    if energy is not None:
        energy.centroids.data.copy_(world.broadcast(starts))
        if energy.factors is not None and factors is not None:
            energy.factors.data.copy_(world.broadcast(factors))


def _check_domain(energy: CentroidEnergy, codes: Tensor, are_rows: bool) -> None:
    """Refuse rows (S, J) that the formula would clamp; of learnt codes, which nobody can mend, only tell."""
    outside = int(outside_domain(energy.name, codes, energy.options).sum())
    if outside and are_rows:
        raise DataError(told_of_domain(energy, "rows", outside, len(codes)))
    if outside:
        said = told_of_domain(energy, "codes", outside, len(codes))
        log.warning("%s. Training goes on with them raised to %g", said, POSITIVE)


def gaussian_start(model: MixtureModel, stream: Stream, config: RunConfig, world: World) -> None:
    """Means, variances and weights of a diagonal Gaussian mixture on a sample of codes (VaDE's start), which
    itself starts from the k-means centroids."""
    codes = world.gather_rows(_sample_codes(model, stream, config, world))
    k, j = config.clusters, model.code_size
    assert isinstance(model.energy, GaussianEnergy)
    assert isinstance(model.gate, PriorGate)
    means, variances = torch.zeros(k, j, device=world.device), torch.ones(k, j, device=world.device)
    weights = torch.full((k,), 1.0 / k, device=world.device)

    def fit() -> str:
        from sklearn.mixture import GaussianMixture

        start = model.pseudo_centroids.cpu().double().numpy()
        fitted = GaussianMixture(
            k, covariance_type="diag", means_init=start, random_state=config.seed, reg_covar=1e-4
        )
        with threads_for(codes.numel() * k):
            fitted.fit(codes.cpu().double().numpy())
        means.copy_(torch.from_numpy(fitted.means_))
        variances.copy_(torch.from_numpy(fitted.covariances_))
        weights.copy_(torch.from_numpy(fitted.weights_))
        log.info("Gaussian mixture on %d codes: %d iterations", len(codes), fitted.n_iter_)
        return ""

    world.on_first(fit)
    model.energy.centroids.data.copy_(world.broadcast(means))
    model.energy.log_variances.data.copy_(world.broadcast(variances).log())
    model.gate.logits.data.copy_(world.broadcast(weights).clamp_min(1e-6).log())


def fit_spectral_map(model: MixtureModel, stream: Stream, world: World) -> None:
    """Spectral codes of an evenly drawn sample of rows, for the encoder to learn.

    Raises:
        DataError: when fewer rows of the sample than clusters differ or have neighbours.
    """
    spectral = model.spectral

    def dense(x: Rows) -> Tensor:
        return x.to_dense() if isinstance(x, SparseRows) else x

    size = min(len(spectral.bias), stream.corpus.n_rows)
    rows = world.gather_rows(_sample(stream, world, size, dense, model.n_features))

    def fit() -> str:
        kept = spectral.fit(rows)
        log.info("spectral codes: %d landmarks of %d rows, gamma %.6g", kept, size, spectral.gamma)
        return ""

    world.on_first(fit)
    for buffer in spectral.buffers():
        buffer.copy_(world.broadcast(buffer.clone()))


@torch.no_grad()
def find_directions(model: MixtureModel, stream: Stream, config: RunConfig, world: World) -> None:
    """The leading right singular vectors of an evenly drawn sample of rows, by scikit-learn's randomised SVD
    (Halko, Martinsson & Tropp 2011), as the encoder's weight.

    All workers hand in their share of the sample, rank 0 factorises, everybody gets the result, which so does
    not depend on how many they are. Where there are fewer directions than numbers in a code, the last are 0.
    """
    assert isinstance(model.network, Directions)
    corpus, code_size = stream.corpus, model.network.code_size
    a_row = corpus.n_features if corpus.kind == "dense" else 2 * corpus.manifest.n_nonzeros / corpus.n_rows
    size = min(config.initialise.sample, corpus.n_rows, int(_SAMPLE_NUMBERS / max(a_row, 1)) + 1)
    batch = stream.gather(_share(_evenly(corpus.n_rows, size), world))
    values = world.gather_rows(batch.values).cpu().numpy()
    rows: Any = values
    if batch.offsets is not None and batch.indices is not None:
        lengths = world.gather_rows(batch.offsets.diff()).cpu().numpy()
        indices = world.gather_rows(batch.indices).cpu().numpy()
        offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        rows = csr_matrix((values, indices, offsets), (len(lengths), corpus.n_features))
    found = torch.zeros_like(model.network.directions)

    def fit() -> str:
        from sklearn.decomposition import TruncatedSVD

        svd = TruncatedSVD(min(code_size, *rows.shape), random_state=config.seed)
        with threads_for(rows.size * code_size):
            svd.fit(rows)
        found[:, : len(svd.components_)] = torch.from_numpy(svd.components_.T.copy())
        share = float(svd.explained_variance_ratio_.sum())
        log.info("%d singular directions of %d rows, %.3g of their variance", svd.n_components, size, share)
        return ""

    world.on_first(fit)
    model.network.directions.copy_(world.broadcast(found))


def _sample_codes(model: MixtureModel, stream: Stream, config: RunConfig, world: World) -> Tensor:
    """This worker's share (n, J) of a sample of codes."""
    n_rows = stream.corpus.n_rows
    least = min(n_rows, 50 * config.clusters)
    size = min(config.initialise.sample, n_rows, max(_SAMPLE_NUMBERS // model.code_size, least))
    return _sample(stream, world, size, model.codes, model.code_size)


@torch.no_grad()
def _sample(stream: Stream, world: World, size: int, encode: Callable[[Rows], Tensor], width: int) -> Tensor:
    """This worker's share (n, width) of `size` evenly drawn rows, encoded, in row order; fixed blocks, so a
    code does not depend on its neighbours."""
    n_rows, n_features = stream.corpus.n_rows, stream.corpus.n_features
    mine = _share(_evenly(n_rows, size), world)
    blocks = [mine[i : i + BLOCK] for i in range(0, len(mine), BLOCK)]
    codes = [encode(_padded(stream.gather(block), n_features, BLOCK))[: len(block)] for block in blocks]
    return torch.cat(codes) if codes else torch.zeros(0, width, device=world.device)


def _evenly(n_rows: int, size: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, n_rows - 1, size).astype(np.int64))


def _share(chosen: NDArray[np.int64], world: World) -> NDArray[np.int64]:
    """This worker's rows of a sample; in rank order they are the sample."""
    return np.array_split(chosen, world.size)[world.rank]


def _padded(batch: Batch, n_features: int, n_rows: int) -> Rows:
    """The batch with empty rows up to `n_rows`."""
    missing = n_rows - batch.rows.shape[0]
    if batch.offsets is None:
        return torch.cat((batch.values, batch.values.new_zeros(missing, n_features)))
    assert batch.indices is not None
    offsets = torch.cat((batch.offsets, batch.offsets[-1:].expand(missing)))
    return SparseRows(offsets, batch.indices, batch.values, n_features)


def _max_min_start(energy: CentroidEnergy, codes: Tensor, k: int, seed: int) -> Tensor:
    def pairwise(a: Tensor, b: Tensor) -> Tensor:
        return energy.dissimilarity.formula(a[:, None, :], b, energy.options)

    return init_plus_plus(codes, k, pairwise, torch.Generator().manual_seed(seed))


def precision_factors(codes: np.ndarray, centroids: np.ndarray) -> Tensor:
    """The factor L (K, J, J) of each cluster's precision, `L L' = inv(cov)`, from the codes of its k-means
    cluster (DMAE).

    A cluster with few rows has a singular covariance: each is shrunk towards the pooled one by J rows' worth.
    """
    labels, _ = assign_to_centroids(codes, centroids)
    k, j = centroids.shape
    centred = codes.astype(np.float64) - centroids[labels]
    pooled = centred.T @ centred / len(codes)
    pooled += np.eye(j) * (1e-6 + 1e-3 * np.trace(pooled) / j)
    factors = np.empty((k, j, j))
    for c in range(k):
        own = centred[labels == c]
        covariance = (own.T @ own + j * pooled) / (len(own) + j)
        factors[c] = np.linalg.cholesky(np.linalg.inv(covariance))
    return torch.from_numpy(factors).float()
