"""What a step tells the log, beside its terms."""

from __future__ import annotations

import torch
from torch import Tensor

from distclust.mixture.routing import worst_case
from distclust.mixture.terms import Scene, Stats, lse, responsibility


def diagnostics(scene: Scene, global_step: int) -> Stats:
    """Sums over the batch for the log: hard usage counts (K,), the gate's certainty, KL(w || p) where there
    are both, and with top-m experts what leaving experts out costs."""
    n_clusters = scene.model.n_clusters
    view = scene.view
    log_p = view.clean_log_p if view.clean_log_p is not None else view.log_p
    if log_p is None and view.energies is not None:
        log_p = -view.energies  # only which is largest counts
    sums: Stats = {}
    if log_p is None:
        return sums
    log_p = log_p.detach()
    labels = log_p.argmax(1)
    sums["usage"] = torch.zeros(n_clusters, device=log_p.device).index_add_(
        0, labels, torch.ones_like(labels, dtype=torch.float32)
    )
    aggregator = scene.model.method.aggregator
    if aggregator == "MIX" and view.log_p is not None:
        sums["certainty"] = view.log_p.detach().exp().amax(1).sum()
    if view.energies is not None and aggregator in ("LSE", "FREE") and view.log_p is not None:
        log_w = responsibility(log_p, view.energies.detach(), scene.model.tau)
        sums["kl_w_p"] = (log_w.exp() * (log_w - log_p)).sum()
    if view.asked is not None:
        sums |= _left_out(scene, view.asked, global_step)
    return sums


@torch.no_grad()
def _left_out(scene: Scene, asked: Tensor, global_step: int) -> Stats:
    """What top-m experts leave out: pairs that were asked, the bound on the loss that is too high, and every
    `expert_check_steps` the energies of all experts: the exact difference, and the rows whose best expert (of
    the smallest energy; of the largest responsibility) was not asked."""
    model, view = scene.model, scene.view
    log_p = view.log_p if view.clean_log_p is None else view.clean_log_p
    assert log_p is not None
    assert view.energies is not None
    loss = lse(log_p, view.energies, model.tau)
    sums: Stats = {
        "topm/experts_asked": asked.sum(),
        "topm/bound": worst_case(log_p, asked, loss, model.tau).sum(),
    }
    if global_step % model.settings.expert_check_steps == 0:
        energies = model.energies(scene.x, view.z)
        best, w = energies.argmin(1), responsibility(log_p, energies, model.tau).argmax(1)
        sums |= {
            "topm_checked/rows": torch.tensor(float(log_p.shape[0])),
            "topm_checked/exact_error": (loss - lse(log_p, energies, model.tau)).sum(),
            "topm_checked/best_left_out": (~asked.gather(1, best[:, None])).sum(),
            "topm_checked/most_responsible_left_out": (~asked.gather(1, w[:, None])).sum(),
        }
    return sums


def left_out_metrics(sums: Stats, rows: float) -> dict[str, float]:
    """The sums of `diagnostics` about top-m experts, of all workers, as means a row."""
    found = {key: float(sums[key]) / rows for key in sums if key.startswith("topm/")}
    checked = float(sums.get("topm_checked/rows", torch.zeros(())))
    for key in sums if checked else ():
        if key.startswith("topm_checked/") and not key.endswith("/rows"):
            found[key.replace("topm_checked/", "topm/")] = float(sums[key]) / checked
    return found
