"""What is added up: each term gives one number a row, (B,), and the loss is a weighted mean over rows.

Notation: gate p, energies E, temperature tau, responsibility w = softmax(log p - E / tau).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    log_p: Tensor | None = None  # (B, K) gate, with the phase's noise
    clean_log_p: Tensor | None = None  # (B, K) gate without noise and without gradient
    pseudo_labels: Tensor | None = None  # (B,) from the frozen teacher


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


def _log_p(s: Scene) -> Tensor:
    assert s.view.log_p is not None
    return s.view.log_p


def _energies(s: Scene) -> Tensor:
    assert s.view.energies is not None
    return s.view.energies


def _codes(s: Scene) -> Tensor:
    assert s.view.z is not None
    return s.view.z


def _centroids(s: Scene) -> CentroidEnergy:
    assert s.model.energy is not None
    return s.model.energy


def _lse(s: Scene) -> Tensor:
    return lse(_log_p(s), _energies(s), s.model.tau)


def _lse_clean_teacher(s: Scene) -> Tensor:
    """LSE whose responsibilities come from the undisturbed row, while the gate is fitted on the disturbed
    one.

    The value is LSE(clean p, E); the gradients are those of sum_k w_k (E_k - tau log p_k) with w fixed.
    """
    assert s.view.clean_log_p is not None
    energies, tau = _energies(s), s.model.tau
    w = responsibility(s.view.clean_log_p, energies, tau).exp().detach()
    surrogate = (w * (energies - tau * _log_p(s))).sum(1)
    value = lse(s.view.clean_log_p, energies, tau).detach()
    return value + surrogate - surrogate.detach()


def _exp(s: Scene) -> Tensor:
    return expected(_log_p(s), _energies(s))


def _min(s: Scene) -> Tensor:
    return _energies(s).amin(1)


def _mix(s: Scene) -> Tensor:
    """MIX = d(z, sum_k p_k theta_k) - log(sum_k p_k pi_k) / alpha (DMAE Eq 12)."""
    energy, gate = _centroids(s), s.model.gate
    assert isinstance(gate, TiedGate)
    log_p = _log_p(s)
    d = energy.rowwise(s.model.energy_codes(_codes(s)), energy.mix(log_p.exp()))
    if not energy.dissimilarity.loss_has_prior:
        return d
    return d - torch.logsumexp(log_p + gate.log_prior(), dim=1) / gate.alpha


def _target(s: Scene) -> Tensor:
    """Cross-entropy towards the sharpened gate (kappa, eta) = (2, 1); its gradient is that of KL(t || p)
    (DEC)."""
    log_p = _log_p(s)
    log_f = s.totals["gate_usage"].log()
    t = sharpened_target(log_p, log_f, 2.0, 1.0).exp().detach()
    return -(t * log_p).sum(1)


def _reconstruction(s: Scene) -> Tensor:
    """Mean over features of the squared error of x from its codes."""
    return s.model.network.recon_error(_codes(s), s.x) / s.model.n_features


def _mixed_reconstruction(s: Scene) -> Tensor:
    """Mean over features of the squared error of x from the mixed centroid (DMAE Eq 17, 18)."""
    theta, _ = _centroids(s).mix(_log_p(s).exp())
    return s.model.network.recon_error(theta * s.model.code_radius, s.x) / s.model.n_features


def _pseudo_label(s: Scene) -> Tensor:
    assert s.view.pseudo_labels is not None
    return s.view.pseudo_labels[:, None]


def _pseudo_energy(s: Scene) -> Tensor:
    """Each expert's energy on the rows of its own pseudo-cluster (DAMIC, step 3)."""
    return _energies(s).gather(1, _pseudo_label(s)).squeeze(1)


def _pseudo_cross_entropy(s: Scene) -> Tensor:
    """The gate's cross-entropy towards the pseudo-labels (DAMIC, step 4)."""
    return -_log_p(s).gather(1, _pseudo_label(s)).squeeze(1)


TERMS: dict[str, Term] = {
    "reconstruction": Term(_reconstruction, frozenset({"codes"})),
    "mixed_reconstruction": Term(_mixed_reconstruction, frozenset({"codes", "energies", "gate"})),
    "pseudo_energy": Term(_pseudo_energy, frozenset({"energies", "teacher"})),
    "pseudo_cross_entropy": Term(_pseudo_cross_entropy, frozenset({"gate", "teacher"})),
    "lse": Term(_lse, frozenset({"energies", "gate"})),
    "lse_clean_teacher": Term(_lse_clean_teacher, frozenset({"energies", "gate", "clean_gate"})),
    "exp": Term(_exp, frozenset({"energies", "gate"})),
    "min": Term(_min, frozenset({"energies"})),
    "mix": Term(_mix, frozenset({"codes", "energies", "gate"})),
    "target": Term(_target, frozenset({"energies", "gate"})),
}

AGGREGATOR_TERMS = {
    "LSE": frozenset({"lse", "lse_clean_teacher"}),
    "EXP": frozenset({"exp"}),
    "MIN": frozenset({"min"}),
    "MIX": frozenset({"mix"}),
    "TARGET": frozenset({"target"}),
    "NONE": frozenset[str](),
}
