"""What is added up: each term gives one number a row, (B,), and the loss is a weighted mean over rows.

Notation: gate p, energies E, temperature tau, responsibility w = softmax(log p - E / tau). Energies and
`squared_reconstruction` are sums over features, `reconstruction` is a mean over them.

A term that is not linear in a mean over the data (a usage prior, an entropy of mean gates) has its value from
the reduced statistic and its gradient from the linear term with the derivative's weights: exact on any number
of workers, without a collective inside the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distclust.mixture.energies import CentroidEnergy
from distclust.mixture.gates import TiedGate
from distclust.mixture.sparse import Rows

if TYPE_CHECKING:
    from distclust.mixture.model import MixtureModel

Stats = dict[str, Tensor]
"""Additive statistics: summed over rows, lanes and workers."""


@dataclass(frozen=True, slots=True)
class View:
    """One forward pass; what a phase does not need is None."""

    z: Tensor | None = None  # (B, J) codes as the encoder gives them
    energies: Tensor | None = None  # (B, K)
    asked: Tensor | None = None  # (B, K) bool, top-m experts: whose energies were computed
    log_p: Tensor | None = None  # (B, K) gate, with the phase's noise
    clean_log_p: Tensor | None = None  # (B, K) gate without noise and without gradient
    pseudo_labels: Tensor | None = None  # (B,) of the pretrained encoder's k-means
    log_q: Tensor | None = None  # (B, K) FREE's own q, where it is not the responsibility (VaDE)
    teacher_log_p: Tensor | None = None  # (B, K) gate of the frozen teacher
    layers: dict[str, Tensor] = field(default_factory=dict)  # hidden layers, variances, switches


@dataclass(frozen=True, slots=True)
class Scene:
    """What a term may look at."""

    model: MixtureModel
    x: Rows
    view: View
    totals: Stats
    """Statistics of the whole data or step, already reduced over workers, without gradient."""


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a loss, with what it needs of a forward pass."""

    function: Callable[[Scene], Tensor]
    needs: frozenset[str]
    statistics: frozenset[str] = frozenset()
    """Statistics that the phase must keep for it."""


# ---- the formulas


def responsibility(log_p: Tensor, energies: Tensor, tau: Tensor | float) -> Tensor:
    """log w (B, K), w_k ~ p_k exp(-E_k / tau)."""
    return torch.log_softmax(log_p - energies / tau, dim=1)


def lse(log_p: Tensor, energies: Tensor, tau: Tensor | float) -> Tensor:
    """LSE_tau(p, E) = -tau log sum_k p_k exp(-E_k / tau): the mixture likelihood (DAMIC; GMM), (B,)."""
    return -tau * torch.logsumexp(log_p - energies / tau, dim=1)


def expected(log_p: Tensor, energies: Tensor) -> Tensor:
    """EXP(p, E) = sum_k p_k E_k (CM, DKM, MIXAE), (B,)."""
    return (log_p.exp() * energies).sum(1)


def free_energy(log_q: Tensor, log_p: Tensor, energies: Tensor, tau: Tensor | float) -> Tensor:
    """FREE_tau(q, p, E) = sum_k q_k E_k + tau KL(q || p) (EM, VaDE), (B,)."""
    q = log_q.exp()
    return (q * energies).sum(1) + tau * (q * (log_q - log_p)).sum(1)


def sharpened_target(log_p: Tensor, log_f: Tensor, kappa: float, eta: float) -> Tensor:
    """log t with t_k ~ p_k^kappa / f_k^eta, f over the whole data; (2, 1) is DEC, (1, 1/2) DEPICT."""
    return torch.log_softmax(kappa * log_p - eta * log_f, dim=1)


def kl_from_target(log_t: Tensor, log_p: Tensor) -> Tensor:
    """KL(t || p) with t fixed, (B,); its gradient wrt the gate's logits is p - t."""
    log_t = log_t.detach()
    return (log_t.exp() * (log_t - log_p)).sum(1)


def of_a_mean(values: Tensor, derivative: Tensor, per_row: Tensor) -> Tensor:
    """The value `f(g)` with the gradient of `sum_k f'(g_k) p_ik` in each row's own gate, (B,).

    `values` () is f at the global mean g; `derivative` * `per_row` (B, K) is linear in the row.
    """
    linear = (derivative.detach() * per_row).sum(1)
    return values.detach() + linear - linear.detach()


# ---- what the terms read


def _log_p(s: Scene) -> Tensor:
    assert s.view.log_p is not None
    return s.view.log_p


def _clean_log_p(s: Scene) -> Tensor:
    assert s.view.clean_log_p is not None
    return s.view.clean_log_p


def _energies(s: Scene) -> Tensor:
    assert s.view.energies is not None
    return s.view.energies


def _codes(s: Scene) -> Tensor:
    assert s.view.z is not None
    return s.view.z


def _centroids(s: Scene) -> CentroidEnergy:
    assert isinstance(s.model.energy, CentroidEnergy)
    return s.model.energy


def _log_frequency(s: Scene) -> Tensor:
    """log f_k, the gate's sum over the whole data (K,)."""
    return s.totals["gate_usage"].log()


# ---- aggregators


def _lse(s: Scene) -> Tensor:
    return lse(_log_p(s), _energies(s), s.model.tau)


def _lse_clean_teacher(s: Scene) -> Tensor:
    """LSE whose responsibilities come from the undisturbed row, while the gate is fitted on the disturbed
    one.

    The value is LSE(clean p, E); the gradients are those of sum_k t_k (E_k - tau log p_k) with t fixed:
    t ~ w^kappa / f^eta, which is w where the settings neither sharpen it nor balance the clusters.
    """
    energies, tau, settings = _energies(s), s.model.tau, s.model.settings
    clean = _clean_log_p(s)
    log_w = responsibility(clean, energies, tau).detach()
    if settings.sharpen != 1.0 or settings.balance:
        log_f = _log_frequency(s) if settings.balance else log_w.new_zeros(())
        log_w = sharpened_target(log_w, log_f, settings.sharpen, settings.balance)
    surrogate = (log_w.exp() * (energies - tau * _log_p(s))).sum(1)
    value = lse(clean, energies, tau).detach()
    return value + surrogate - surrogate.detach()


def _exp(s: Scene) -> Tensor:
    return expected(_log_p(s), _energies(s))


def _exp_orthonormal(s: Scene) -> Tensor:
    """EXP with squared distances as AE-CM writes it for orthonormal centroids:
    `||z - sum_k p_k mu_k||^2 + sum_k p_k (1 - p_k)`."""
    p = _log_p(s).exp()
    mixed = p @ _centroids(s).centroids  # (B, J)
    return (s.model.energy_codes(_codes(s)) - mixed).square().sum(1) + (p * (1.0 - p)).sum(1)


def _min(s: Scene) -> Tensor:
    return _energies(s).amin(1)


def _mix(s: Scene) -> Tensor:
    """MIX = d(z, sum_k p_k theta_k) - log(sum_k p_k pi_k) / alpha (DMAE Eq 12)."""
    energy, gate = _centroids(s), s.model.gate
    assert isinstance(gate, TiedGate)
    log_p = _log_p(s)
    d = energy.rowwise(s.model.energy_codes(_codes(s)), energy.mix(log_p.exp()), s.model.nat)
    if not energy.dissimilarity.loss_has_prior:
        return d
    return d - torch.logsumexp(log_p + gate.log_prior(), dim=1) / gate.alpha


def _free(s: Scene) -> Tensor:
    """FREE_tau with the view's own q."""
    assert s.view.log_q is not None
    return free_energy(s.view.log_q, _log_p(s), _energies(s), s.model.tau)


# ---- targets


def _sharpened(s: Scene, log_p: Tensor) -> Tensor:
    settings = s.model.settings
    return sharpened_target(log_p.detach(), _log_frequency(s), settings.target_kappa, settings.target_eta)


def _target(s: Scene) -> Tensor:
    """KL(t || p), t from the gate as it is and the whole data's frequencies of the last refresh (DEC)."""
    return kl_from_target(_sharpened(s, _log_p(s)), _log_p(s))


def _target_clean(s: Scene) -> Tensor:
    """KL(t || p), t from the undisturbed row, p from the disturbed one (DEPICT; a gate's self-training)."""
    return kl_from_target(_sharpened(s, _clean_log_p(s)), _log_p(s))


def _target_responsibility(s: Scene) -> Tensor:
    """KL(t || p), t from the undisturbed row's responsibilities: self-training with experts as evidence."""
    log_w = responsibility(_clean_log_p(s), _energies(s), s.model.tau)
    return kl_from_target(_sharpened(s, log_w), _log_p(s))


def _target_teacher(s: Scene) -> Tensor:
    """KL(t || p), t from the model as it was at the last refresh (DEC and IDEC as published)."""
    assert s.view.teacher_log_p is not None
    return kl_from_target(_sharpened(s, s.view.teacher_log_p), _log_p(s))


def _pseudo_label(s: Scene) -> Tensor:
    assert s.view.pseudo_labels is not None
    return s.view.pseudo_labels[:, None]


def _pseudo_energy(s: Scene) -> Tensor:
    """Each expert's energy on the rows of its own pseudo-cluster (DAMIC, step 3)."""
    return _energies(s).gather(1, _pseudo_label(s)).squeeze(1)


def _pseudo_cross_entropy(s: Scene) -> Tensor:
    """The gate's cross-entropy towards the pseudo-labels (DAMIC, step 4)."""
    return -_log_p(s).gather(1, _pseudo_label(s)).squeeze(1)


# ---- reconstructions


def _squared_reconstruction(s: Scene) -> Tensor:
    """The error of x from its codes, summed over features."""
    return s.model.network.recon_error(_codes(s), s.x, s.view.layers)


def _reconstruction(s: Scene) -> Tensor:
    """The error of x from its codes, as a mean over features."""
    return _squared_reconstruction(s) / s.model.n_features


def _unit_reconstruction(s: Scene) -> Tensor:
    """Mean over features of the squared error of x from its codes as the energies see them.

    Codes that all move along one direction draw together on the unit sphere; a decoder that is given them as
    they are does not notice, and so does nothing against it.
    """
    z = s.model.energy_codes(_codes(s)) * s.model.code_radius
    return s.model.network.recon_error(z, s.x) / s.model.n_features


def _mixed_reconstruction(s: Scene) -> Tensor:
    """Mean over features of the squared error of x from the mixed centroid (DMAE Eq 17, 18)."""
    theta, _ = _centroids(s).mix(_log_p(s).exp())
    return s.model.network.recon_error(theta * s.model.code_radius, s.x) / s.model.n_features


def _layer_reconstruction(s: Scene) -> Tensor:
    """The hidden layers of the undisturbed row from the disturbed one's codes (DEPICT)."""
    return s.model.network.layer_errors(_codes(s), s.view.layers)


def _fourier_regression(s: Scene) -> Tensor:
    """Mean squared error (B,) of the codes against random Fourier features of the rows (DMAE's examples)."""
    return (_codes(s) - s.model.fourier_features(s.x)).square().mean(1)


def _spectral_regression(s: Scene) -> Tensor:
    """Mean squared error (B,) of the codes against the rows' spectral codes (ours; see spectral.py)."""
    return (_codes(s) - s.model.spectral_codes(s.x)).square().mean(1)


# ---- regularisers


def _variational_entropy(s: Scene) -> Tensor:
    """Minus the entropy of the code's own Gaussian, `-0.5 sum_j (1 + log 2 pi + log v_j)` (VaDE)."""
    log_variance = s.view.layers["log_variance"]
    return -0.5 * (log_variance + 1.0 + torch.log(torch.tensor(2.0 * torch.pi))).sum(1)


def _sample_entropy(s: Scene) -> Tensor:
    """H(p) of each row: small when the gate is sure (MIXAE)."""
    log_p = _log_p(s)
    return -(log_p.exp() * log_p).sum(1)


def _log_mean_gate(s: Scene) -> Tensor:
    """log g_k of the global batch (K,), in float64: it does not underflow where a float32 gate does."""
    sums, rows = s.totals["step_usage"], s.totals["step_rows"]
    return sums.clamp_min(torch.finfo(torch.float64).tiny).log() - rows.clamp_min(1.0).log()


def _batch_entropy(s: Scene) -> Tensor:
    """-H(g), g the mean gate over the global batch: small when all clusters are used (MIXAE)."""
    log_g = _log_mean_gate(s)
    value = (log_g.exp() * log_g).sum().to(torch.float32)
    return of_a_mean(value, (log_g + 1.0).to(torch.float32), _log_p(s).exp())


def _usage_prior(s: Scene) -> Tensor:
    """`-sum_k log g_k`, g the mean gate over the global batch: the Dirichlet prior of CM without its factor.

    CM adds `(1 - alpha) sum_k log g_k` to a sum over its batch of B rows; as a mean over rows the weight of
    this term is (alpha - 1) / B. The derivative is taken through log p in float64, so that a cluster whose
    gate underflows in float32 is still pulled back (down to log p = -700): `p_ik / g_k` is at most B.
    """
    log_g, log_p = _log_mean_gate(s), _log_p(s)
    share = (log_p.detach().double() - log_g).exp().to(log_p.dtype)
    return of_a_mean(-log_g.sum().to(torch.float32), -share, log_p)


def _orthonormality(s: Scene) -> Tensor:
    """`sum_kl |<mu_k, mu_l> - [k = l]|` of the centroids, the same for every row (AE-CM)."""
    m = _centroids(s).centroids
    gap = (m @ m.t() - torch.eye(m.shape[0], device=m.device)).abs().sum()
    return gap.expand(_log_p(s).shape[0])


_GATE = frozenset({"gate"})
_EG = frozenset({"energies", "gate"})

TERMS: dict[str, Term] = {
    "reconstruction": Term(_reconstruction, frozenset({"codes"})),
    "squared_reconstruction": Term(_squared_reconstruction, frozenset({"codes"})),
    "mixed_reconstruction": Term(_mixed_reconstruction, frozenset({"codes", "energies", "gate"})),
    "unit_reconstruction": Term(_unit_reconstruction, frozenset({"codes"})),
    "fourier_regression": Term(_fourier_regression, frozenset({"codes"})),
    "spectral_regression": Term(_spectral_regression, frozenset({"codes"})),
    "layer_reconstruction": Term(_layer_reconstruction, frozenset({"codes", "clean_layers"})),
    "pseudo_energy": Term(_pseudo_energy, frozenset({"energies", "pseudo_labels"})),
    "pseudo_cross_entropy": Term(_pseudo_cross_entropy, frozenset({"gate", "pseudo_labels"})),
    "lse": Term(_lse, _EG),
    "lse_clean_teacher": Term(_lse_clean_teacher, _EG | {"clean_gate"}),
    "exp": Term(_exp, _EG),
    "exp_orthonormal": Term(_exp_orthonormal, frozenset({"codes", "gate"})),
    "min": Term(_min, frozenset({"energies"})),
    "mix": Term(_mix, frozenset({"codes", "energies", "gate"})),
    "free": Term(_free, _EG | {"own_q"}),
    "target": Term(_target, _GATE, frozenset({"gate_usage"})),
    "target_clean": Term(_target_clean, _GATE | {"clean_gate"}, frozenset({"gate_usage"})),
    "target_responsibility": Term(_target_responsibility, _EG | {"clean_gate"}, frozenset({"gate_usage"})),
    "target_teacher": Term(_target_teacher, _GATE | {"teacher"}, frozenset({"teacher"})),
    "variational_entropy": Term(_variational_entropy, frozenset({"codes"})),
    "sample_entropy": Term(_sample_entropy, _GATE),
    "batch_entropy": Term(_batch_entropy, _GATE, frozenset({"step_usage"})),
    "usage_prior": Term(_usage_prior, _GATE, frozenset({"step_usage"})),
    "orthonormality": Term(_orthonormality, _GATE),
}

AGGREGATOR_TERMS = {
    "LSE": frozenset({"lse", "lse_clean_teacher"}),
    "EXP": frozenset({"exp", "exp_orthonormal"}),
    "MIN": frozenset({"min"}),
    "MIX": frozenset({"mix"}),
    "FREE": frozenset({"free"}),
    "TARGET": frozenset({"target", "target_clean", "target_responsibility", "target_teacher"}),
    "NONE": frozenset[str](),
}
