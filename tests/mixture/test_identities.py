"""The identities of the mixture's formulas, gradients included (float64)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from distclust.mixture import terms
from distclust.mixture.energies import DISSIMILARITIES, CentroidEnergy, DissimilarityOptions, StudentEnergy
from distclust.mixture.experts import ConstantExperts, LowRankExperts
from distclust.mixture.gates import TiedGate
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.mixture.settings import ModelSettings

B, K, J = 40, 5, 6


@pytest.fixture
def draws() -> tuple[Tensor, Tensor]:
    """Gate logits (B, K) and energies (B, K)."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, K, generator=g, dtype=torch.float64, requires_grad=True)
    energies = (torch.rand(B, K, generator=g, dtype=torch.float64) * 4).requires_grad_()
    return logits, energies


def test_damic_gate_gradient_is_p_minus_w(draws: tuple[Tensor, Tensor]) -> None:
    logits, energies = draws
    log_p = torch.log_softmax(logits, 1)
    terms.lse(log_p, energies, 1.0).sum().backward()
    w = terms.responsibility(log_p, energies, 1.0).exp()
    torch.testing.assert_close(logits.grad, (log_p.exp() - w).detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(energies.grad, w.detach(), atol=1e-12, rtol=0)


def test_damic_expert_gradient_is_w_times_the_residual() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, J, generator=g, dtype=torch.float64)
    f = torch.randn(B, K, J, generator=g, dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(torch.randn(B, K, generator=g, dtype=torch.float64), 1)
    energies = 0.5 * (x[:, None] - f).square().sum(2)
    terms.lse(log_p, energies, 1.0).sum().backward()
    w = terms.responsibility(log_p, energies, 1.0).exp()
    expected = w[:, :, None] * (f - x[:, None])
    torch.testing.assert_close(f.grad, expected.detach(), atol=1e-12, rtol=0)


def test_loss_falls_as_energies_fall(draws: tuple[Tensor, Tensor]) -> None:
    log_p, energies = torch.log_softmax(draws[0], 1), draws[1]
    assert (terms.lse(log_p, energies - 0.1, 1.0) < terms.lse(log_p, energies, 1.0)).all()


def test_lse_is_the_smallest_free_energy(draws: tuple[Tensor, Tensor]) -> None:
    log_p, energies = torch.log_softmax(draws[0], 1), draws[1]
    for tau in (0.3, 1.0, 7.0):
        log_w = terms.responsibility(log_p, energies, tau)
        at_w = terms.free_energy(log_w, log_p, energies, tau)
        torch.testing.assert_close(at_w, terms.lse(log_p, energies, tau), atol=1e-12, rtol=0)
        elsewhere = terms.free_energy(torch.log_softmax(log_w + 0.3 * energies, 1), log_p, energies, tau)
        assert (elsewhere >= at_w - 1e-12).all()
    # at tau = 1 that is sum w E + KL(w || p)
    log_w = terms.responsibility(log_p, energies, 1.0)
    kl = (log_w.exp() * (log_w - log_p)).sum(1)
    torch.testing.assert_close(terms.lse(log_p, energies, 1.0), (log_w.exp() * energies).sum(1) + kl)


def test_min_lse_exp_on_one_temperature_axis(draws: tuple[Tensor, Tensor]) -> None:
    log_p, energies = torch.log_softmax(draws[0], 1), draws[1]
    axis = [terms.lse(log_p, energies, tau) for tau in (1e-3, 0.1, 1.0, 10.0, 1e4)]
    low, high = energies.amin(1), terms.expected(log_p, energies)
    for a, b in zip([low, *axis], [*axis, high], strict=True):
        assert (a <= b + 1e-9).all()
    torch.testing.assert_close(axis[0], low, atol=2e-2, rtol=0)
    torch.testing.assert_close(axis[-1], high, atol=1e-3, rtol=0)


def test_clean_teacher_has_the_gradients_of_lse_when_nothing_is_noisy(draws: tuple[Tensor, Tensor]) -> None:
    logits, energies = draws
    view = terms.View(energies=energies, log_p=torch.log_softmax(logits, 1))
    view = terms.View(energies=energies, log_p=view.log_p, clean_log_p=view.log_p.detach())

    class _Model:
        tau = torch.tensor(2.0, dtype=torch.float64)
        settings = ModelSettings()

    scene = terms.Scene(_Model(), torch.empty(B, 1), view, {})  # type: ignore[arg-type]
    clean = terms.TERMS["lse_clean_teacher"].function(scene)
    plain = terms.lse(view.log_p, energies, 2.0)
    torch.testing.assert_close(clean, plain, atol=1e-12, rtol=0)
    got = torch.autograd.grad(clean.sum(), (logits, energies), retain_graph=True)
    expected = torch.autograd.grad(plain.sum(), (logits, energies))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def _energy(name: str, **options: float) -> CentroidEnergy:
    torch.manual_seed(2)
    energy = CentroidEnergy(K, J, name, DissimilarityOptions(**options)).double()  # type: ignore[arg-type]
    if energy.factors is not None:
        energy.factors.data += 0.2 * torch.randn(K, J, J, dtype=torch.float64)
    return energy


def test_exp_minus_mix_is_the_variance_of_the_centroids(draws: tuple[Tensor, Tensor]) -> None:
    energy = _energy("squared_euclidean")
    z = torch.randn(B, J, dtype=torch.float64)
    log_p = torch.log_softmax(draws[0].detach(), 1)
    p = log_p.exp()
    gap = terms.expected(log_p, energy.pairwise(z)) - energy.rowwise(z, energy.mix(p))
    mean = p @ energy.centroids
    variance = (p[:, :, None] * (energy.centroids[None] - mean[:, None]).square()).sum((1, 2))
    torch.testing.assert_close(gap, variance, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", sorted(DISSIMILARITIES))
def test_pairwise_is_rowwise_at_a_one_hot_gate(name: str) -> None:
    energy = _energy(name)
    z = torch.rand(B, J, dtype=torch.float64) + 0.1
    energy.centroids.data = energy.centroids.data.abs() + 0.1
    pairs = energy.pairwise(z)
    for k in range(K):
        one_hot = torch.zeros(B, K, dtype=torch.float64)
        one_hot[:, k] = 1
        torch.testing.assert_close(energy.rowwise(z, energy.mix(one_hot)), pairs[:, k], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(DISSIMILARITIES))
def test_gradients_are_finite_at_a_centroid_and_match_differences_elsewhere(name: str) -> None:
    energy = _energy(name)
    energy.centroids.data = energy.centroids.data.abs() + 0.1
    at = energy.centroids.detach()[:2].clone().requires_grad_()
    energy.pairwise(at).sum().backward()
    assert torch.isfinite(at.grad).all()
    assert torch.isfinite(energy.centroids.grad).all()
    z = (torch.rand(3, J, dtype=torch.float64) + 0.15).requires_grad_()
    assert torch.autograd.gradcheck(energy.pairwise, (z,), atol=1e-5)


FORMULAS = {
    "euclidean": lambda x, y: np.sqrt(((x - y) ** 2).sum()),
    "squared_euclidean": lambda x, y: ((x - y) ** 2).sum(),
    "manhattan": lambda x, y: np.abs(x - y).sum(),
    "minkowski": lambda x, y: (np.abs(x - y) ** 3).sum() ** (1 / 3),
    "chebyshev": lambda x, y: np.abs(x - y).max(),
    "cosine": lambda x, y: 1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y),
    "dot_product": lambda x, y: -x @ y,
    "kullback_leibler": lambda x, y: (_soft(x) * (np.log(_soft(x)) - np.log(_soft(y)))).sum(),
    # Bregman definitions: phi(x) - phi(y) - (x - y).phi'(y)
    "itakura_saito": lambda x, y: -np.log(x).sum() + np.log(y).sum() + ((x - y) / y).sum(),
    "i_divergence": lambda x, y: (x * np.log(x)).sum() - (y * np.log(y)).sum() - ((x - y) @ (np.log(y) + 1)),
}


@pytest.mark.parametrize("p", [1.0, 3.0, 20.0, 60.0])
def test_minkowski_of_small_differences_and_large_powers(p: float) -> None:
    """A large power of a small difference is below whatever float32 adds to it."""
    options = DissimilarityOptions(p=p)
    x = torch.tensor([[0.01, 0.0], [0.1, 0.05], [0.5, 0.5], [0.0, 0.0]], requires_grad=True)
    found = DISSIMILARITIES["minkowski"].formula(x, torch.zeros(2), options)
    expected = [np.linalg.norm(row, ord=p) for row in x.detach().double().numpy()]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-9)
    found.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[0, 0] == pytest.approx(1.0, abs=1e-4)


def _soft(v: np.ndarray) -> np.ndarray:
    e = np.exp(np.abs(v))
    return e / e.sum()


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_dissimilarities_equal_their_definitions(name: str) -> None:
    energy = _energy(name)
    energy.centroids.data = energy.centroids.data.abs() + 0.1
    z = torch.rand(7, J, dtype=torch.float64) + 0.1
    mine = energy.pairwise(z).detach().numpy()
    centroids = energy.centroids.detach().numpy()
    theirs = [[FORMULAS[name](x, y) for y in centroids] for x in z.numpy()]
    np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_mahalanobis_and_its_log_determinant() -> None:
    energy = _energy("mahalanobis")
    z = torch.randn(B, J, dtype=torch.float64)
    factors, centroids = energy.factors.detach(), energy.centroids.detach()  # type: ignore[union-attr]
    precision = factors @ factors.transpose(1, 2)
    diff = z[:, None] - centroids
    expected = torch.einsum("bki,kij,bkj->bk", diff, precision, diff)
    torch.testing.assert_close(energy.pairwise(z), expected)
    with_det = CentroidEnergy(K, J, "mahalanobis", DissimilarityOptions(), log_det=0.5).double()
    with_det.load_state_dict(energy.state_dict())
    torch.testing.assert_close(with_det.pairwise(z), expected - 0.25 * torch.logdet(precision))


def _gaussian_responsibilities(
    x: np.ndarray, weights: np.ndarray, means: np.ndarray, precisions: np.ndarray
) -> np.ndarray:
    """w (B, K) of a Gaussian mixture, from its density in numpy."""
    diff = x[:, None] - means  # (B, K, J)
    squares = np.einsum("bki,kij,bkj->bk", diff, precisions, diff)  # (B, K)
    log_w = np.log(weights) + 0.5 * np.linalg.slogdet(precisions)[1] - 0.5 * squares
    w = np.exp(log_w - log_w.max(1, keepdims=True))
    return np.asarray(w / w.sum(1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("method", ["bregman", "dmm"])  # a prior gate, a tied one
def test_a_log_determinant_makes_gaussians_at_every_temperature(method: str, temperature: float) -> None:
    """exp(-d / temperature) is a Gaussian of the precision 2 P / temperature, and needs its determinant."""
    torch.manual_seed(5)
    row = METHODS[method]
    settings = dataclasses.replace(row.settings, dissimilarity="mahalanobis", log_det=1.0)
    model = MixtureModel(dataclasses.replace(row, settings=settings), settings, J, K).double()
    energy = model.energy
    assert isinstance(energy, CentroidEnergy)
    assert energy.factors is not None
    size = torch.tensor([0.5, 0.8, 1.0, 1.3, 2.0], dtype=torch.float64)[:, None, None]
    # entries of a size that leaves several clusters in doubt at each temperature
    energy.factors.data += 0.2 * torch.randn(K, J, J, dtype=torch.float64)
    energy.factors.data *= size * temperature**0.5
    model.gate.logits.data.normal_()
    # as they are after tau was measured, or alpha annealed
    if method == "bregman":
        model.tau.fill_(temperature)
    else:
        model.gate.alpha.fill_(1.0 / temperature)
    x = torch.randn(B, J, dtype=torch.float64)
    factors = energy.factors.detach()
    precisions = (factors @ factors.transpose(1, 2)).numpy()  # (K, J, J)
    weights = torch.softmax(model.gate.logits.detach(), 0).numpy()
    expected = _gaussian_responsibilities(
        x.numpy(), weights, energy.centroids.detach().numpy(), 2.0 / temperature * precisions
    )
    assert np.sort(expected, 1)[:, -2].mean() > 0.01
    np.testing.assert_allclose(model.predict(x).exp().numpy(), expected, atol=1e-6)


def test_mix_at_a_one_hot_gate_has_the_same_log_determinant() -> None:
    energy = CentroidEnergy(K, J, "mahalanobis", DissimilarityOptions(), log_det=0.7).double()
    energy.factors.data += 0.2 * torch.randn(K, J, J, dtype=torch.float64)  # type: ignore[union-attr]
    z = torch.randn(B, J, dtype=torch.float64)
    one_hot = torch.eye(K, dtype=torch.float64)[torch.arange(B) % K]
    pairs = energy.pairwise(z, 0.3)[torch.arange(B), torch.arange(B) % K]
    torch.testing.assert_close(energy.rowwise(z, energy.mix(one_hot), 0.3), pairs)


def test_the_torus_takes_the_shortest_way_round() -> None:
    energy = CentroidEnergy(2, 2, "toroidal", DissimilarityOptions(interval=2.0)).double()
    energy.centroids.data = torch.tensor([[0.9, 0.9], [0.0, 0.0]], dtype=torch.float64)
    d = energy.pairwise(torch.tensor([[-0.9, -0.9]], dtype=torch.float64))
    torch.testing.assert_close(d, torch.tensor([[0.08, 1.62]], dtype=torch.float64))
    # the minimum over the nine shifts of the plane, one by one
    z = torch.rand(B, 2, dtype=torch.float64) * 2 - 1
    shifts = torch.cartesian_prod(*[torch.tensor([0.0, 2.0, -2.0], dtype=torch.float64)] * 2)
    brute = (z[:, None, None] - energy.centroids[None, :, None] + shifts).square().sum(-1).amin(2)
    torch.testing.assert_close(energy.pairwise(z), brute)


def test_prior_cannot_be_scaled_away() -> None:
    """Multiplying pi by a constant lowers DMAE's published loss and changes nothing; here it cannot be
    done."""
    gate = TiedGate(K, alpha=2.0).double()
    energies = torch.rand(B, K, dtype=torch.float64)
    log_p = gate.log_p_of(energies)
    before = torch.logsumexp(log_p + gate.log_prior(), 1)
    gate.logits.data += 13.0
    torch.testing.assert_close(gate.log_p_of(energies), log_p)
    torch.testing.assert_close(torch.logsumexp(log_p + gate.log_prior(), 1), before)
    assert gate.log_prior().exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("degrees", [1.0, 3.0])
def test_student_gate_is_decs_q(degrees: float) -> None:
    torch.manual_seed(3)
    energy = StudentEnergy(K, J, degrees).double()
    z = torch.randn(B, J, dtype=torch.float64)
    d2 = torch.cdist(z, energy.centroids).square()
    q = (1 + d2 / degrees) ** (-(degrees + 1) / 2)
    gate = TiedGate(K, alpha=1.0).double()
    torch.testing.assert_close(gate.log_p_of(energy.pairwise(z)).exp(), q / q.sum(1, keepdim=True))


def test_targets_are_powers_over_frequencies() -> None:
    log_p = torch.log_softmax(torch.randn(B, K, dtype=torch.float64), 1)
    f = log_p.exp().sum(0)
    for kappa, eta in ((2.0, 1.0), (1.0, 0.5)):
        t = log_p.exp() ** kappa / f**eta
        mine = terms.sharpened_target(log_p, f.log(), kappa, eta).exp()
        torch.testing.assert_close(mine, t / t.sum(1, keepdim=True))


# ---- rows far from 0


def _far_rows(offset: float, n_features: int) -> tuple[Tensor, Tensor]:
    """Rows (B, D) in float32 and where K means (K, D) stand among them, all that far from 0."""
    g = torch.Generator().manual_seed(7)
    means = offset + torch.randn(K, n_features, generator=g)
    return means[torch.arange(B) % K] + torch.randn(B, n_features, generator=g), means


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("name", ["squared_euclidean", "euclidean"])
def test_many_features_keep_their_digits_far_from_zero(name: str, offset: float) -> None:
    """Above 256 features distances come from inner products; the formula itself in float64 is the measure."""
    x, means = _far_rows(offset, 300)
    energy = CentroidEnergy(K, 300, name, DissimilarityOptions())
    energy.centroids.data.copy_(means)
    found = energy.pairwise(x.requires_grad_())
    given, centroids = x.detach().double().requires_grad_(), means.double().requires_grad_()
    expected = energy.dissimilarity.formula(given[:, None], centroids, energy.options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad.double(), given.grad, rtol=1e-4, atol=1e-3)  # type: ignore[union-attr]
    torch.testing.assert_close(energy.centroids.grad.double(), centroids.grad, rtol=1e-4, atol=1e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("kind", [ConstantExperts, LowRankExperts])
def test_constant_and_low_rank_experts_keep_their_digits_far_from_zero(kind: type, offset: float) -> None:
    x, means = _far_rows(offset, 50)
    torch.manual_seed(0)
    experts = kind(50, K) if kind is ConstantExperts else kind(50, K, 3)
    experts.means.data.copy_(means.t())
    found = experts.errors(x)
    exact = experts.double()
    diff = x.double()[:, None] - exact.means.t()  # (B, K, D)
    expected = diff.square().sum(2)
    if kind is LowRankExperts:
        basis = torch.linalg.qr(exact.directions).Q  # (K, D, R)
        expected = expected - torch.einsum("bkd,kdr->bkr", diff, basis).square().sum(2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


# ---- limits: known models inside the mixture


def test_constant_experts_and_gate_are_a_unit_covariance_gaussian_mixture() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, J))
    means, weights = rng.normal(size=(K, J)), rng.dirichlet(np.ones(K))
    reference = GaussianMixture(K, covariance_type="spherical")
    reference.means_, reference.weights_ = means, weights
    reference.covariances_ = np.ones(K)
    reference.precisions_cholesky_ = np.ones(K)
    energies = 0.5 * torch.cdist(torch.tensor(x), torch.tensor(means)).square()
    nll = terms.lse(torch.tensor(np.log(weights)).expand(B, -1), energies, 1.0) + J / 2 * np.log(2 * np.pi)
    np.testing.assert_allclose(nll.numpy(), -reference.score_samples(x), atol=1e-9)
    w = terms.responsibility(torch.tensor(np.log(weights)).expand(B, -1), energies, 1.0).exp()
    np.testing.assert_allclose(w.numpy(), reference.predict_proba(x), atol=1e-9)


def test_sharp_dmae_is_k_means_distortion() -> None:
    energy = _energy("squared_euclidean")
    gate = TiedGate(K, alpha=1e6).double()
    z = torch.randn(B, J, dtype=torch.float64)
    log_p = gate.log_p_of(energy.pairwise(z))
    mix = (
        energy.rowwise(z, energy.mix(log_p.exp())) - torch.logsumexp(log_p + gate.log_prior(), 1) / gate.alpha
    )
    torch.testing.assert_close(mix, energy.pairwise(z).amin(1), atol=1e-4, rtol=0)


def test_cold_damic_with_a_uniform_gate_is_k_dae(draws: tuple[Tensor, Tensor]) -> None:
    uniform = torch.full((B, K), 1 / K, dtype=torch.float64).log()
    cold = terms.lse(uniform, draws[1], 1e-4)
    torch.testing.assert_close(cold, draws[1].amin(1), atol=1e-3, rtol=0)
