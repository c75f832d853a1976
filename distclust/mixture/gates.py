"""Gates p_k(x): who is asked first. All of them answer in log space, (B, K)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.mixture.convolutional import ConvolutionalClassifier
from distclust.mixture.layers import MLP, RowsLinear
from distclust.mixture.noise import Noise
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import Rows


class NetworkGate(nn.Module):
    """`softmax(g(x))`, a classifier of its own (DAMIC: of the rows; MIXAE: of the experts' codes)."""

    def __init__(self, n_inputs: int, n_clusters: int, s: ModelSettings):
        super().__init__()
        self.net: nn.Module
        if s.image and s.gate_conv:
            self.net = ConvolutionalClassifier(s, n_clusters)
        else:
            self.net = MLP(
                [n_inputs, *s.gate_hidden, n_clusters],
                activation=s.activation,
                norm="none" if s.norm == "none" else "layer",
                dropout=(s.gate_dropout, s.gate_dropout),
            )

    def log_p(self, x: Rows, noise: Noise | None) -> Tensor:
        return F.log_softmax(self.net(x, noise, "gate"), dim=1)


class LinearGate(nn.Module):
    """`softmax(z W + b)`, one layer on the codes (CM, AE-CM, DEPICT); it contains the exact E-step of an
    isotropic Gaussian mixture."""

    def __init__(self, code_size: int, n_clusters: int):
        super().__init__()
        self.layer = RowsLinear(code_size, n_clusters)

    def log_p(self, z: Tensor) -> Tensor:
        return F.log_softmax(self.layer(z), dim=1)

    @torch.no_grad()
    def start_from(self, centroids: Tensor) -> None:
        """`W = pinv(mu)`, b = 0: logit 1 on the own centroid (K, J) and 0 on the others (AE-CM's start)."""
        self.layer.weight.copy_(torch.linalg.pinv(centroids.double()))  # (J, K)
        self.layer.bias.zero_()

    @torch.no_grad()
    def start_at_e_step(self, centroids: Tensor, sharpness: float = 10.0) -> None:
        """`p_k ~ exp(-b ||z - mu_k||^2)`: the E-step of an isotropic mixture at the centroids (K, J), whose
        argmax is k-means'; b makes logits differ by `sharpness` for the mean squared distance of two
        centroids."""
        mu = centroids.double()
        k = mu.shape[0]
        apart = torch.cdist(mu, mu).square().sum() / max(k * (k - 1), 1)
        b = sharpness / apart.clamp_min(1e-12)
        self.layer.weight.copy_(2.0 * b * mu.t())  # (J, K)
        self.layer.bias.copy_(-b * mu.square().sum(1))


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

    alpha: Tensor

    def __init__(self, n_clusters: int, alpha: float):
        super().__init__(n_clusters)
        self.register_buffer("alpha", torch.tensor(float(alpha)))

    def log_p_of(self, energies: Tensor) -> Tensor:
        return F.log_softmax(-self.alpha * energies + self.log_prior(), dim=1)


class HardGate(nn.Module):
    """One-hot at the smallest energy (k-means, k-DAE, DCN); it has nothing to train."""
