"""Gates p_k(x): who is asked first. All of them answer in log space, (B, K)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.mixture.networks import MLP
from distclust.mixture.noise import Noise
from distclust.mixture.sparse import Rows


class NetworkGate(nn.Module):
    """`softmax(g(x))`, a classifier of its own on the rows (DAMIC)."""

    def __init__(
        self,
        n_features: int,
        hidden: Sequence[int],
        n_clusters: int,
        *,
        activation: str,
        norm: str,
        dropout: float,
    ):
        super().__init__()
        self.net = MLP(
            [n_features, *hidden, n_clusters],
            activation=activation,
            norm=norm,
            input_dropout=dropout,
            hidden_dropout=dropout,
        )

    def log_p(self, x: Rows, noise: Noise | None) -> Tensor:
        return F.log_softmax(self.net(x, noise, "gate"), dim=1)


class PriorGate(nn.Module):
    """The same `pi` for every row. Held as logits, so that it can neither grow without bound nor become
    exactly zero."""

    def __init__(self, n_clusters: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_clusters))

    def log_prior(self) -> Tensor:
        """log pi (K,)."""
        return F.log_softmax(self.logits, dim=0)


class TiedGate(PriorGate):
    """`softmax(-alpha E + log pi)`: the energies decide (DMAE Eq 3, 15; DEC; DKM)."""

    def __init__(self, n_clusters: int, alpha: float):
        super().__init__(n_clusters)
        self.alpha = alpha

    def log_p_of(self, energies: Tensor) -> Tensor:
        return F.log_softmax(-self.alpha * energies + self.log_prior(), dim=1)


class HardGate(nn.Module):
    """One-hot at the smallest energy (k-means, k-DAE, DCN); it has nothing to train."""
