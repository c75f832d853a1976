"""What changes from epoch to epoch beside the weights: temperatures, and the mean of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distclust.mixture.gates import TiedGate
from distclust.mixture.model import MixtureModel
from distclust.mixture.settings import Phase


def dkm_alpha(value: int) -> float:
    """The `value`-th inverse temperature of DKM's schedule, from 1.

    `alpha_1 = 0.1`, `alpha_{n+1} = 2^(1 / ln(n + 1)^2) alpha_n` (Fard, Thonet & Gaussier 2020).
    """
    alpha = 0.1
    for n in range(1, value):
        alpha *= 2.0 ** (1.0 / math.log(n + 1) ** 2)
    return alpha


def anneal(model: MixtureModel, phase: Phase, epoch: int) -> None:
    """Set the temperature of an epoch; a function of the epoch alone, so a resumed run has the same."""
    if phase.anneal == "alpha":
        if not isinstance(model.gate, TiedGate):
            raise ValueError(f"phase {phase.name} anneals alpha, and the gate of this row has none")
        model.gate.alpha.fill_(dkm_alpha(epoch // phase.anneal_epochs + 1))
    factor = phase.tau_factor
    if phase.anneal == "tau":
        progress = epoch / (phase.epochs - 1) if phase.epochs > 1 else 1.0
        factor *= phase.anneal_from ** (1.0 - progress)
    model.tau.copy_(model.base_tau * factor)


class WeightAverage:
    """The mean of the weights over the steps of an epoch (AE-CM's last one; Polyak & Juditsky 1992).

    The sums are kept among the statistics of the epoch, so they are in its checkpoints.
    """

    prefix = "average/"

    def add(self, parameters: dict[str, torch.nn.Parameter], totals: dict[str, Tensor]) -> None:
        """Add the weights as they are after a step."""
        for name, parameter in parameters.items():
            key = self.prefix + name
            value = parameter.detach().double()
            totals[key] = totals[key] + value if key in totals else value
        count = totals.get(self.prefix)
        one = torch.ones((), dtype=torch.float64)
        totals[self.prefix] = one if count is None else count + one.to(count.device)

    def finish(self, parameters: dict[str, torch.nn.Parameter], totals: dict[str, Tensor]) -> None:
        """Replace the weights by their mean."""
        count = totals.get(self.prefix)
        if count is None:
            return
        for name, parameter in parameters.items():
            parameter.data.copy_(totals[self.prefix + name] / count.to(parameter.device))
