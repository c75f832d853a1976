"""Additive statistics of the whole data or of a step: one mechanism for everything that is not separable
over rows.

A statistic collects sums on each worker without gradient, the sums are added over lanes and workers, and
`apply` does the same thing to the model on every worker. `when` says how often:

* ``begin``: one pass over the data when a phase begins;
* ``epoch``: one pass at the start of each epoch (EM sums, closed-form centroids);
* ``refresh``: one pass every `refresh_steps` of the phase (DEC's frequencies, the frozen teacher);
* ``before_step``: over the rows of the step, before its loss (usage priors);
* ``after_step``: over the rows of the step, after the update (DCN's running means).

What `collect` returns is also handed to the terms as `totals`, under the same keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distclust.errors import DataError
from distclust.mixture.energies import NORMALISERS, CentroidEnergy, outside_domain, told_of_domain
from distclust.mixture.experts import ConstantExperts
from distclust.mixture.gates import PriorGate
from distclust.mixture.layers import LaneBatchNorm
from distclust.mixture.sparse import SparseRows
from distclust.mixture.terms import Scene, Stats, lse, responsibility

if TYPE_CHECKING:
    from distclust.mixture.model import MixtureModel

_LARGE = 2.0**30
"""A normaliser adds 1e-3 to each feature: 1e-12 of a row whose sum is this. A power of two, which costs a
float no digit."""

When = Literal["begin", "epoch", "refresh", "before_step", "after_step"]


class Statistic(Protocol):
    when: When
    needs: frozenset[str]

    def collect(self, scene: Scene) -> Stats: ...

    def apply(self, model: MixtureModel, totals: Stats) -> None: ...


class CodeRadius:
    """The mean length of the codes: what turns a unit centroid back into something that the decoder knows."""

    when: When = "begin"
    needs = frozenset({"codes"})

    def collect(self, scene: Scene) -> Stats:
        z = scene.view.z
        assert z is not None
        return {"radius_sum": z.double().norm(dim=1).sum(), "radius_rows": _count(z)}

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        if model.settings.unit_codes:
            model.code_radius.copy_(totals["radius_sum"] / totals["radius_rows"].clamp_min(1))


class ExpertMeans:
    """Constant experts start at the mean row of their pseudo-cluster: the optimum of DAMIC's step 3 in
    closed form."""

    when: When = "begin"
    needs = frozenset({"pseudo_labels"})

    def collect(self, scene: Scene) -> Stats:
        labels, model = scene.view.pseudo_labels, scene.model
        assert labels is not None
        x = model.expert_inputs(scene.x)
        k, d = model.n_clusters, model.n_expert_inputs
        counts = torch.zeros(k, dtype=torch.float64, device=labels.device)
        counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        sums = torch.zeros(d * k, dtype=torch.float64, device=labels.device)
        if isinstance(x, SparseRows):
            cells = x.indices.long() * k + labels[x.row_numbers()]
            sums.index_add_(0, cells, x.values.double())
            return {"label_sums": sums.view(d, k), "label_counts": counts}
        by_label = torch.zeros(k, d, dtype=torch.float64, device=labels.device)
        return {"label_sums": by_label.index_add_(0, labels, x.double()).t(), "label_counts": counts}

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        if not isinstance(model.experts, ConstantExperts):
            return
        sums, counts = totals["label_sums"], totals["label_counts"]
        overall = sums.sum(1, keepdim=True) / counts.sum().clamp_min(1)
        # a pseudo-cluster without rows starts at the overall mean
        means = torch.where(counts > 0, sums / counts.clamp_min(1), overall)
        model.experts.means.data.copy_(means)


class Temperature:
    """tau = factor x the mean over rows of the standard deviation of E over clusters; a scale-free
    temperature."""

    when: When = "begin"
    needs = frozenset({"energies"})

    def collect(self, scene: Scene) -> Stats:
        energies = scene.view.energies
        assert energies is not None
        spread = energies.double().std(dim=1, correction=0).sum()
        return {"spread_sum": spread, "spread_rows": _count(energies)}

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        factor = model.settings.tau_spread
        if factor is not None:
            spread = totals["spread_sum"] / totals["spread_rows"].clamp_min(1)
            model.tau.copy_((factor * spread).clamp_min(1e-6))
            model.base_tau.copy_(model.tau)


class GateUsage:
    """f_k = sum of p_k over the whole data (DEC's target; never a batch's)."""

    when: When = "refresh"
    needs = frozenset({"gate"})

    def collect(self, scene: Scene) -> Stats:
        assert scene.view.log_p is not None
        return {"gate_usage": scene.view.log_p.double().exp().sum(0)}

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        usage = totals["gate_usage"]
        least = (model.settings.usage_floor * usage.sum() / len(usage)).clamp_min(1e-12)
        totals["gate_usage"] = torch.maximum(usage, least).to(torch.float32)


class Teacher(GateUsage):
    """The model as it is now, frozen until the next refresh, and f_k of its gate.

    Counts the labels that moved since the last refresh: `moved` of `moved_rows`.
    """

    needs = frozenset({"gate", "teacher"})

    def collect(self, scene: Scene) -> Stats:
        before, now = scene.view.teacher_log_p, scene.view.log_p
        assert before is not None
        assert now is not None
        moved = (before.argmax(1) != now.argmax(1)).double().sum()
        return {**super().collect(scene), "moved": moved, "moved_rows": _count(now)}

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        super().apply(model, totals)
        model.freeze_teacher()


class StepUsage:
    """Sums of p_k over the rows of the step on all workers (usage priors, batch entropies)."""

    when: When = "before_step"
    needs = frozenset({"gate"})

    def collect(self, scene: Scene) -> Stats:
        assert scene.view.log_p is not None
        return {"step_usage": scene.view.log_p.double().exp().sum(0), "step_rows": _count(scene.view.log_p)}

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        pass


class RunningMeans:
    """DCN's centroids: `mu_k += (1 / c_k) (z - mu_k)` for each code of the step, c_k counting from 100.

    One after the other that gives `(c_k mu_k + sum z) / (c_k + n_k)`, whatever the order, so one update from
    the sums over all workers is the same.
    """

    when: When = "after_step"
    needs = frozenset({"codes", "energies"})

    def collect(self, scene: Scene) -> Stats:
        return _sums_of_clusters(scene, "running")

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        assert isinstance(model.energy, CentroidEnergy)
        sums, added, counts = totals["running_sums"], totals["running_counts"], model.cluster_counts
        new = (counts[:, None] * model.energy.centroids + sums) / (counts + added)[:, None]
        model.energy.centroids.data.copy_(new)
        counts += added


class Recentre:
    """Centroids become the means of their clusters (a step of Lloyd's); an empty one stays where it is."""

    when: When = "epoch"
    needs = frozenset({"codes", "energies"})

    def collect(self, scene: Scene) -> Stats:
        return _sums_of_clusters(scene, "centre")

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        assert isinstance(model.energy, CentroidEnergy)
        counts = totals["centre_counts"][:, None]
        means = totals["centre_sums"] / counts.clamp_min(1.0)
        old = model.energy.centroids.data
        model.energy.centroids.data.copy_(torch.where(counts > 0, means.to(old.dtype), old))


class ExpectationMaximisation:
    """One EM iteration of Bregman soft clustering (Banerjee et al. 2005): w from the E-step, then
    `mu_k = sum_i w_ik x_i / sum_i w_ik` for every Bregman divergence, and `pi_k = mean_i w_ik`.

    `em_objective` is the sum over rows of LSE before the update. A cluster that loses all its weight stays
    where it is. Rows that the divergence is not defined for are counted, and refused.
    """

    when: When = "epoch"
    needs = frozenset({"codes", "energies", "gate"})

    def collect(self, scene: Scene) -> Stats:
        view, model = scene.view, scene.model
        assert view.log_p is not None
        assert view.energies is not None
        assert view.z is not None
        assert isinstance(model.energy, CentroidEnergy)
        outside = outside_domain(model.energy.name, model.energy_codes(view.z), model.energy.options)
        w = responsibility(view.log_p, view.energies, model.tau).double().exp()
        return {
            "em_weights": w.sum(0),
            "em_sums": w.t() @ _bregman_points(model, view.z).double(),
            "em_rows": _count(view.z),
            "em_outside": outside.double().sum(),
            "em_objective": lse(view.log_p, view.energies, model.tau).double().sum(),
        }

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        assert isinstance(model.energy, CentroidEnergy)
        assert isinstance(model.gate, PriorGate)
        if outside := int(totals.pop("em_outside")):  # once a pass, the same on all workers
            raise DataError(told_of_domain(model.energy, "rows", outside, int(totals["em_rows"])))
        weights = totals["em_weights"]
        old = model.energy.centroids.data
        means = totals["em_sums"] / weights.clamp_min(1e-300)[:, None]  # (K, J)
        new = (means * _scale_of_means(model)).to(old.dtype)
        model.energy.centroids.data.copy_(torch.where(weights[:, None] > 1e-12, new, old))
        shares = (weights / totals["em_rows"].clamp_min(1)).clamp_min(1e-30)
        model.gate.logits.data.copy_(shares.log())


class BatchNorm:
    """Running means and variances of batch normalisation, from what each lane saw in the step."""

    when: When = "after_step"
    needs = frozenset[str]()

    def collect(self, scene: Scene) -> Stats:
        sums: Stats = {}
        for name, module in _batch_norms(scene.model).items():
            rows, mean, variance = module.sums()
            sums |= {f"norm_rows/{name}": rows, f"norm_mean/{name}": mean, f"norm_variance/{name}": variance}
        return sums

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        for name, module in _batch_norms(model).items():
            found = (totals.pop(f"norm_{what}/{name}") for what in ("rows", "mean", "variance"))
            module.update(*found)


def _batch_norms(model: MixtureModel) -> dict[str, LaneBatchNorm]:
    return {n: m for n, m in model.trained_modules() if isinstance(m, LaneBatchNorm)}


def _bregman_points(model: MixtureModel, z: Tensor) -> Tensor:
    """What the M-step averages (B, J): the codes, on the simplex for Kullback-Leibler."""
    codes = model.energy_codes(z)
    if model.settings.dissimilarity == "kullback_leibler":
        return NORMALISERS[model.settings.normaliser](codes)
    return codes


def _scale_of_means(model: MixtureModel) -> float:
    """What the M-step's means are stored times: where the energy puts its centroids on the simplex once
    more, a number that makes the normaliser's constant vanish, so that it gives the means back."""
    s = model.settings
    return _LARGE if s.dissimilarity == "kullback_leibler" and s.normaliser != "none" else 1.0


def _sums_of_clusters(scene: Scene, prefix: str) -> Stats:
    """Sums (K, J) and counts (K,) of the codes nearest to each centroid."""
    view, model = scene.view, scene.model
    assert view.energies is not None
    assert view.z is not None
    member = F.one_hot(view.energies.argmin(1), model.n_clusters).double()  # (B, K)
    codes = model.energy_codes(view.z).double()
    return {f"{prefix}_sums": member.t() @ codes, f"{prefix}_counts": member.sum(0)}


def _count(rows: Tensor) -> Tensor:
    return torch.full((), float(rows.shape[0]), dtype=torch.float64, device=rows.device)


STATISTICS: dict[str, Statistic] = {
    "code_radius": CodeRadius(),
    "expert_means": ExpertMeans(),
    "temperature": Temperature(),
    "gate_usage": GateUsage(),
    "teacher": Teacher(),
    "step_usage": StepUsage(),
    "running_means": RunningMeans(),
    "recentre": Recentre(),
    "em": ExpectationMaximisation(),
    "batch_norm": BatchNorm(),
}
