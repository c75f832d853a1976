"""Additive statistics of the whole data or of a step: one mechanism for everything that is not separable
over rows.

A statistic collects sums on each worker without gradient, the sums are added over lanes and workers, and
`apply` does the
same thing to the model on every worker. `when` says how often:

* ``begin``: one pass over the data when a phase begins;
* ``epoch``: one pass at the start of each epoch (DEC's cluster frequencies);
* ``before_step``: over the rows of the step, before its loss (usage priors);
* ``after_step``: over the rows of the step, after the update (DCN's running means).

What `collect` returns is also handed to the terms as `totals`, under the same keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from distclust.mixture.networks import ConstantExperts
from distclust.mixture.sparse import SparseRows
from distclust.mixture.terms import Scene, Stats

if TYPE_CHECKING:
    from distclust.mixture.model import MixtureModel

When = Literal["begin", "epoch", "before_step", "after_step"]


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
    needs = frozenset({"teacher"})

    def collect(self, scene: Scene) -> Stats:
        labels, model, x = scene.view.pseudo_labels, scene.model, scene.x
        assert labels is not None
        k, d = model.n_clusters, model.n_features
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


class GateUsage:
    """f_k = sum of p_k over the whole data, refreshed every epoch (DEC's target; never a batch's)."""

    when: When = "epoch"
    needs = frozenset({"energies", "gate"})

    def collect(self, scene: Scene) -> Stats:
        assert scene.view.log_p is not None
        return {"gate_usage": scene.view.log_p.double().exp().sum(0)}

    def apply(self, model: MixtureModel, totals: Stats) -> None:
        totals["gate_usage"] = totals["gate_usage"].clamp_min(1e-12).to(torch.float32)


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(float(rows.shape[0]), dtype=torch.float64, device=rows.device)


STATISTICS: dict[str, Statistic] = {
    "code_radius": CodeRadius(),
    "expert_means": ExpertMeans(),
    "temperature": Temperature(),
    "gate_usage": GateUsage(),
}
