"""Bregman soft clustering: EM with closed-form means, whatever puts the rows on the simplex."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distclust.errors import DataError
from distclust.mixture import terms
from distclust.mixture.energies import NORMALISERS
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.mixture.statistics import STATISTICS
from distclust.mixture.terms import Scene

B, K, J = 24, 4, 6
ON_THE_SIMPLEX = ("abs", "none", "plain", "relu")


def model_of(n_features: int = J, **settings: Any) -> MixtureModel:
    torch.manual_seed(0)
    row = METHODS["bregman"]
    changed = dataclasses.replace(row.settings, **settings)
    return MixtureModel(dataclasses.replace(row, settings=changed), changed, n_features, K).double()


def em_step(model: MixtureModel, data: Tensor) -> tuple[Tensor, float]:
    """One iteration: the responsibilities (B, K) that it took, and the objective before it."""
    em = STATISTICS["em"]
    with torch.no_grad():
        view = model.view(data, em.needs)
        assert view.log_p is not None
        assert view.energies is not None
        w = terms.responsibility(view.log_p, view.energies, model.tau).exp()
        totals = em.collect(Scene(model, data, view, {}))
        em.apply(model, totals)
    return w, float(totals["em_objective"])


@pytest.fixture
def rows() -> Tensor:
    return torch.rand(B, J, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1


def word_counts(n_features: int) -> Tensor:
    """Rows (B, D) of K topics, mostly zeros, of length sqrt(2000) as the corpus scales them."""
    g = torch.Generator().manual_seed(3)
    topics = torch.rand(K, n_features, generator=g).pow(8)
    drawn = torch.multinomial(topics.repeat(B // K, 1), 100, replacement=True, generator=g)  # (B, 100)
    counts = torch.zeros(B, n_features).scatter_add_(1, drawn, torch.ones(B, 100)).double()
    return counts * 2000**0.5 / counts.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", ["squared_euclidean", "itakura_saito", "i_divergence"])
def test_em_means_are_weighted_averages_and_the_likelihood_rises(name: str, rows: Tensor) -> None:
    model = model_of(dissimilarity=name)
    model.energy.centroids.data.copy_(rows[:K])  # type: ignore[union-attr]
    before = math.inf
    for _ in range(6):
        w, now = em_step(model, rows)
        expected = w.t() @ rows / w.sum(0)[:, None]
        torch.testing.assert_close(model.energy.centroids.data, expected, atol=1e-6, rtol=1e-6)  # type: ignore[union-attr]
        assert now <= before + 1e-9
        before = now


@pytest.mark.parametrize("n_features", [J, 2000])
@pytest.mark.parametrize("normaliser", ON_THE_SIMPLEX)
def test_em_by_kl_has_the_best_means_whatever_the_normaliser(normaliser: str, n_features: int) -> None:
    """The energy puts its centroids on the simplex once more, which must not move the M-step's means."""
    model = model_of(n_features, dissimilarity="kullback_leibler", normaliser=normaliser)
    data = word_counts(n_features)
    data = data / data.sum(1, keepdim=True) if normaliser == "none" else data
    norm, energy = NORMALISERS[normaliser], model.energy
    energy.centroids.data.copy_(0.5 * data[:K] + 0.5 * data.mean(0))  # type: ignore[union-attr]
    before = math.inf
    for _ in range(8):
        w, now = em_step(model, data)
        assert now < before + 1e-9
        before = now
        seen = norm(energy.centroids.data)  # type: ignore[union-attr]
        expected = w.t() @ norm(data) / w.sum(0)[:, None]
        torch.testing.assert_close(seen, expected, atol=1e-9, rtol=1e-6)
        # no other point of the simplex explains the rows better: not the uniform one, not another mean
        best = (w * energy.pairwise(data)).sum()  # type: ignore[union-attr]
        stored = energy.centroids.data.clone()  # type: ignore[union-attr]
        scale = 1.0 if normaliser == "none" else 1e9
        for other in (torch.full_like(expected, 1 / n_features), expected.roll(1, 0)):
            # far above the normaliser's own constant, as the centroids are
            energy.centroids.data.copy_((0.99 * expected + 0.01 * other) * scale)  # type: ignore[union-attr]
            assert (w * energy.pairwise(data)).sum() > best  # type: ignore[union-attr]
        energy.centroids.data.copy_(stored)  # type: ignore[union-attr]


def test_em_by_kl_in_float32_as_in_float64() -> None:
    data = word_counts(2000)
    found = []
    for kind in (torch.float64, torch.float32):
        model = model_of(2000, dissimilarity="kullback_leibler", normaliser="abs").to(kind)
        model.energy.centroids.data.copy_(data[:K])  # type: ignore[union-attr]
        found.append([em_step(model, data.to(kind))[1] for _ in range(5)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


NEGATIVE = "of 24 rows have values below 0; expected none"
REFUSED = [
    ("itakura_saito", "none", f"itakura_saito, and 3 {NEGATIVE}.*squared_euclidean"),
    ("i_divergence", "none", f"i_divergence, and 3 {NEGATIVE}.*squared_euclidean"),
    ("kullback_leibler", "plain", f"kullback_leibler, and 3 {NEGATIVE}.*normaliser=abs or relu"),
    ("kullback_leibler", "none", "none, and 3 of 24 rows are not on the simplex; expected.*divide rows by"),
]


@pytest.mark.parametrize(("name", "normaliser", "message"), REFUSED)
def test_em_refuses_rows_outside_the_divergences_domain(name: str, normaliser: str, message: str) -> None:
    """Counted over batches and workers, whose sums are added; a row of words has zeros, which are inside."""
    model = model_of(2000, dissimilarity=name, normaliser=normaliser)
    data = word_counts(2000)
    data = data / data.sum(1, keepdim=True) if normaliser == "none" else data
    assert (data == 0).any(1).all()
    em_step(model, data)
    stood = model.energy.centroids.detach().clone()  # type: ignore[union-attr]
    data[[1, 20, 22], [0, 3, 5]] = -0.5
    em, totals = STATISTICS["em"], dict[str, Tensor]()
    for half in (data[:12], data[12:]):
        for key, sums in em.collect(Scene(model, half, model.view(half, em.needs), {})).items():
            totals[key] = totals[key] + sums if key in totals else sums
    with pytest.raises(DataError, match=message):
        em.apply(model, totals)
    assert torch.equal(model.energy.centroids, stood)  # type: ignore[union-attr]


def test_em_by_kl_without_a_normaliser_takes_rows_that_sum_to_one_and_no_others() -> None:
    model = model_of(dissimilarity="kullback_leibler", normaliser="none")
    data = torch.full((B, J), 1 / J, dtype=torch.float64)
    em_step(model, data * (1 + 1e-5))
    data[4], data[7] = 0.0, 0.5
    with pytest.raises(DataError, match="2 of 24 rows are not on the simplex"):
        em_step(model, data)


@pytest.mark.parametrize(
    ("name", "normaliser"),
    [("squared_euclidean", "none"), ("kullback_leibler", "abs"), ("kullback_leibler", "relu")],
)
def test_em_takes_negative_values_where_they_are_inside(name: str, normaliser: str, rows: Tensor) -> None:
    model = model_of(dissimilarity=name, normaliser=normaliser)
    em_step(model, rows - 0.5)
    assert torch.isfinite(model.energy.centroids).all()  # type: ignore[union-attr]


def test_bregman_clustering_refuses_what_is_no_bregman_divergence() -> None:
    with pytest.raises(ValueError, match="Bregman divergence only.*dmae-lse"):
        model_of(dissimilarity="manhattan")


def test_bregman_clustering_by_kl_needs_a_normaliser_that_leaves_means_alone() -> None:
    with pytest.raises(ValueError, match="normaliser is 'softmax_abs'; expected one of: abs, none, plain"):
        model_of(dissimilarity="kullback_leibler")
