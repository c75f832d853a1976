"""K experts as one module: each gives back its input, and its squared error is the energy of its cluster.

Every kind has `errors(x)` (B, K), summed over features; those with codes have `codes(x)` (B, K, J) and both
of one pass, `codes_and_errors(x)`; `reconstruct(x)` (B, K, D) is dense and large: for pictures, never for a
loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.mixture.convolutional import ConvolutionalAutoencoder
from distclust.mixture.layers import ACTIVATIONS, uniform
from distclust.mixture.precision import MixedProducts
from distclust.mixture.routing import Routes, pair_errors
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import (
    Rows,
    SparseRows,
    expert_squared_errors,
    n_rows,
    rows_times,
    square_norms,
)


def build_experts(n_inputs: int, n_clusters: int, s: ModelSettings) -> nn.Module:
    """The experts that the settings name, for inputs of that length."""
    match s.experts:
        case "constant":
            return ConstantExperts(n_inputs, n_clusters)
        case "low_rank":
            return LowRankExperts(n_inputs, n_clusters, s.expert_code_size)
        case "convolutional":
            return ConvolutionalExperts(n_clusters, s)
        case _:
            return AutoencoderExperts(
                n_inputs,
                n_clusters,
                s.expert_hidden,
                s.expert_code_size,
                activation=s.activation,
                # an expert sees every row, so the statistics of a batch would not be its cluster's
                norm="none" if s.norm == "none" else "layer",
            )


class ConstantExperts(nn.Module):
    """K vectors in input space: the smallest expert, f_k(x) = m_k. The error is a squared distance."""

    def __init__(self, n_features: int, n_clusters: int):
        super().__init__()
        # zeros: the first statistic ("expert_means") puts each at the mean of its pseudo-cluster
        self.means = nn.Parameter(torch.zeros(n_features, n_clusters))

    def errors(self, x: Rows) -> Tensor:
        """`||x - m_k||^2`, (B, K)."""
        x, means = self._centred(x)
        dots = rows_times(x, means)
        return (square_norms(x)[:, None] - 2.0 * dots + means.square().sum(0)).clamp_min(0.0)

    def _centred(self, x: Rows) -> tuple[Rows, Tensor]:
        """The rows and the means (D, K), less the mean of the means where the rows are dense: those may stand
        far from 0, and their squares then leave no digit to differences."""
        if isinstance(x, SparseRows):
            return x, self.means
        centre = self.means.detach().mean(1)  # (D,)
        return x - centre, self.means - centre[:, None]

    def codes(self, x: Rows) -> Tensor:
        raise ValueError("constant experts have no codes; use experts: autoencoder")

    def reconstruct(self, x: Rows) -> Tensor:
        """m_k, whatever the row, (B, K, D)."""
        return self.means.t().expand(n_rows(x), -1, -1)


class LowRankExperts(ConstantExperts):
    """K affine subspaces: f_k(x) = m_k + U_k U_k'(x - m_k), with U_k (D, R) of orthonormal columns.

    K linear autoencoders (a mixture of principal subspaces). The columns are made orthonormal by a QR
    decomposition in each pass, so that the error is that of the projection whatever the optimiser does:
    `||x - m||^2 - ||U'(x - m)||^2`.
    """

    def __init__(self, n_features: int, n_clusters: int, rank: int):
        super().__init__(n_features, n_clusters)
        if rank > n_features:
            raise ValueError(
                f"model.expert_code_size is {rank}, and low-rank experts reconstruct {n_features} numbers; "
                f"expected a rank of at most {n_features}: set model.expert_code_size lower"
            )
        self.directions = uniform((n_clusters, n_features, rank), n_features)

    def _projections(self, x: Rows, basis: Tensor | None = None) -> Tensor:
        """U_k'(x - m_k), (B, K, R)."""
        basis = torch.linalg.qr(self.directions).Q if basis is None else basis  # (K, D, R)
        k, d, r = basis.shape
        flat = basis.permute(1, 0, 2).reshape(d, k * r)  # (D, K*R)
        x, means = self._centred(x)
        own = torch.einsum("dk,kdr->kr", means, basis)  # (K, R)
        return rows_times(x, flat).view(n_rows(x), k, r) - own

    def errors(self, x: Rows) -> Tensor:
        """`||x - f_k(x)||^2`, (B, K)."""
        return self.codes_and_errors(x)[1]

    def codes(self, x: Rows) -> Tensor:
        """U_k'(x - m_k), (B, K, R)."""
        return self._projections(x)

    def codes_and_errors(self, x: Rows) -> tuple[Tensor, Tensor]:
        """Both of the above in one pass."""
        codes = self._projections(x)
        return codes, (super().errors(x) - codes.square().sum(2)).clamp_min(0.0)

    def reconstruct(self, x: Rows) -> Tensor:
        """m_k + U_k U_k'(x - m_k), (B, K, D)."""
        basis = torch.linalg.qr(self.directions).Q
        return self.means.t() + torch.einsum("bkr,kdr->bkd", self._projections(x, basis), basis)


class AutoencoderExperts(MixedProducts):
    """K autoencoders D -> hidden -> J -> hidden -> D in input space, held as stacked weights.

    The first layers are one sparse product (D, K*H), the inner ones batched products, the last ones the exact
    sparse error of K experts.
    """

    def __init__(
        self,
        n_features: int,
        n_clusters: int,
        hidden: Sequence[int],
        code_size: int,
        *,
        activation: str = "relu",
        norm: str = "none",
    ):
        super().__init__()
        k = n_clusters
        inner = [*hidden, code_size, *reversed(hidden)]
        self.in_weight = uniform((n_features, k, inner[0]), n_features)
        self.in_bias = uniform((k, inner[0]), n_features)
        pairs = list(zip(inner[:-1], inner[1:], strict=True))
        self.weights = nn.ParameterList(uniform((k, a, b), a) for a, b in pairs)
        self.biases = nn.ParameterList(uniform((k, b), a) for a, b in pairs)
        self.out_weight = uniform((n_features, k, inner[-1]), inner[-1])
        self.out_bias = uniform((n_features, k), inner[-1])
        self._code_layer = len(hidden) - 1  # inner layer i gives the codes: linear
        self._activation = ACTIVATIONS[activation]
        self._norm = norm == "layer"

    def _activate(self, h: Tensor) -> Tensor:
        """Normalised (without gain, each expert by itself) and activated, (B, K, H)."""
        return self._activation(F.layer_norm(h, h.shape[-1:]) if self._norm else h)

    def _product(self, layer: int) -> AbstractContextManager[object]:
        """Where an inner layer's product is made: codes are in float32, as all codes are."""
        return self.mixed() if layer != self._code_layer else nullcontext()

    def codes(self, x: Rows) -> Tensor:
        """The experts' codes, (B, K, J)."""
        return self._inner(x, 0, self._code_layer + 1, self._first(x))

    def errors(self, x: Rows) -> Tensor:
        """`||x - f_k(x)||^2` summed over features, (B, K)."""
        h = self._inner(x, 0, len(self.weights), self._first(x))
        return expert_squared_errors(x, h, self.out_weight, self.out_bias)

    def reconstruct(self, x: Rows) -> Tensor:
        """f_k(x), (B, K, D)."""
        h = self._inner(x, 0, len(self.weights), self._first(x))
        return torch.einsum("bkh,dkh->bkd", h, self.out_weight) + self.out_bias.t()

    def codes_and_errors(self, x: Rows) -> tuple[Tensor, Tensor]:
        """Both of the above in one pass."""
        codes = self.codes(x)
        h = self._inner(x, self._code_layer + 1, len(self.weights), codes)
        return codes, expert_squared_errors(x, h, self.out_weight, self.out_bias)

    def errors_of(self, x: Rows, routes: Routes) -> Tensor:
        """`||x_i - f_k(x_i)||^2` of P pairs of a row and an expert, (P,); other experts are not computed."""
        d, k, h1 = self.in_weight.shape
        pairs = routes.repeat(x)
        if isinstance(pairs, SparseRows):
            first = routes.own_columns(pairs).matmul(self.in_weight.reshape(d * k, h1))
        else:
            with self.mixed():
                first = routes.times(pairs, self.in_weight.unbind(1))
        h = self._activate(first + self.in_bias[routes.experts])  # (P, H)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            with self._product(i):
                h = routes.times(h, weight.unbind(0))
            h = h + bias[routes.experts]
            if i != self._code_layer:
                h = self._activate(h)
        return pair_errors(pairs, h, self.out_weight, self.out_bias, routes.counts)

    def _first(self, x: Rows) -> Tensor:
        d, k, h1 = self.in_weight.shape
        with self.mixed():
            h = rows_times(x, self.in_weight.reshape(d, k * h1))
        return self._activate(h.view(n_rows(x), k, h1) + self.in_bias)

    def _inner(self, x: Rows, first: int, last: int, h: Tensor) -> Tensor:
        """Inner layers from `first` up to `last`, (B, K, H)."""
        for i in range(first, last):
            with self._product(i):
                h = torch.einsum("bkh,khj->bkj", h, self.weights[i])
            h = h + self.biases[i]
            if i != self._code_layer:
                h = self._activate(h)
        return h


class ConvolutionalExperts(nn.Module):
    """K small convolutional autoencoders on images (DAMIC for images; the paper's layers are not known)."""

    def __init__(self, n_clusters: int, s: ModelSettings):
        super().__init__()
        self.experts = nn.ModuleList(
            ConvolutionalAutoencoder(s, conv=s.expert_conv, code_size=s.expert_code_size)
            for _ in range(n_clusters)
        )

    def _each(self) -> Iterator[ConvolutionalAutoencoder]:
        for expert in self.experts:
            assert isinstance(expert, ConvolutionalAutoencoder)
            yield expert

    def errors(self, x: Rows) -> Tensor:
        """`||x - f_k(x)||^2` summed over pixels, (B, K)."""
        return self.codes_and_errors(x)[1]

    def codes(self, x: Rows) -> Tensor:
        """The experts' codes, (B, K, J)."""
        return torch.stack([expert.encode(x) for expert in self._each()], dim=1)

    def codes_and_errors(self, x: Rows) -> tuple[Tensor, Tensor]:
        """Both of the above in one pass."""
        x = x.to_dense() if isinstance(x, SparseRows) else x
        codes, errors = [], []
        for expert in self._each():
            z, layers = expert.encode_with_layers(x)
            codes.append(z)
            errors.append(expert.recon_error(z, x, layers))
        return torch.stack(codes, dim=1), torch.stack(errors, dim=1)

    def reconstruct(self, x: Rows) -> Tensor:
        """f_k(x), (B, K, D), poolings undone as in `errors`."""
        found = []
        for expert in self._each():
            z, layers = expert.encode_with_layers(x)
            y = expert._maps(z, layers)[-1].flatten(1)
            found.append(y.sigmoid() if expert._sigmoid else y)
        return torch.stack(found, dim=1)
