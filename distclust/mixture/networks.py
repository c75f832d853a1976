"""Networks: layers that take sparse rows, an autoencoder, and K experts as one module.

A network never returns a reconstruction for a caller to compare; it returns the squared error, so that a
sparse target
stays sparse (`sparse.squared_error`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.mixture.noise import Noise
from distclust.mixture.sparse import (
    Rows,
    expert_squared_errors,
    n_rows,
    rows_times,
    square_norms,
    squared_error,
)

ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": lambda v: F.leaky_relu(v, 0.2),
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def _uniform(shape: Sequence[int], fan_in: int) -> nn.Parameter:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): variance scaling with scale 1/3, as DEC and DMAE start."""
    bound = 1.0 / math.sqrt(max(fan_in, 1))
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class RowsLinear(nn.Module):
    """x (B, D), sparse or dense, to (B, H). The weight is stored (D, H): a row for each feature."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = _uniform((n_in, n_out), n_in)
        self.bias = _uniform((n_out,), n_in)

    def forward(self, x: Rows) -> Tensor:
        return rows_times(x, self.weight) + self.bias


class MLP(nn.Module):
    """Layers `widths[0] -> ... -> widths[-1]`; every layer but the last is normalised and activated.

    Dropout is on the input (`input_dropout`) and after each hidden layer (`hidden_dropout`), only where a
    `Noise` is given.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        activation: str = "relu",
        norm: str = "none",
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ):
        super().__init__()
        self.layers = nn.ModuleList(RowsLinear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.norms = nn.ModuleList(
            nn.LayerNorm(w) if norm == "layer" else nn.Identity() for w in widths[1:-1]
        )
        self._activation = ACTIVATIONS[activation]
        self._input_dropout, self._hidden_dropout = input_dropout, hidden_dropout

    def hidden(self, x: Rows, noise: Noise | None, name: str) -> Rows:
        """The values (B, widths[-2]) that the last layer sees."""
        if noise is not None:
            x = noise.dropout(f"{name}.input", x, self._input_dropout)
        for i, norm in enumerate(self.norms):
            x = self._activation(norm(self.layers[i](x)))
            if noise is not None:
                x = noise.dropout(f"{name}.hidden{i}", x, self._hidden_dropout)
        return x

    def forward(self, x: Rows, noise: Noise | None = None, name: str = "mlp") -> Tensor:
        return self.layers[-1](self.hidden(x, noise, name))


class Autoencoder(nn.Module):
    """An encoder D -> hidden -> J and its mirror, linear at the codes and at the output."""

    def __init__(
        self,
        n_features: int,
        hidden: Sequence[int],
        code_size: int,
        *,
        activation: str = "relu",
        norm: str = "none",
        input_dropout: float = 0.0,
    ):
        super().__init__()
        widths = [n_features, *hidden, code_size]
        self.encoder = MLP(widths, activation=activation, norm=norm, input_dropout=input_dropout)
        mirror = widths[::-1]
        if len(mirror) < 3:
            raise ValueError("an autoencoder needs at least one hidden layer")
        self.decoder = MLP(mirror[:-1] + [1], activation=activation, norm=norm)
        self.decoder.layers = self.decoder.layers[
            :-1
        ]  # the last layer is kept as (D, H), for the exact sparse error
        self.out_weight = _uniform((n_features, mirror[-2]), mirror[-2])
        self.out_bias = _uniform((n_features,), mirror[-2])

    def encode(self, x: Rows, noise: Noise | None = None) -> Tensor:
        """Codes (B, J)."""
        return self.encoder(x, noise, "network")

    def recon_error(self, codes: Tensor, x: Rows) -> Tensor:
        """`||x - decoder(codes)||^2` summed over features, (B,)."""
        return squared_error(x, self._before_output(codes), self.out_weight, self.out_bias)

    def decode(self, codes: Tensor) -> Tensor:
        """The reconstruction (B, D); for pictures and words, never for a loss."""
        return self._before_output(codes) @ self.out_weight.t() + self.out_bias

    def _before_output(self, codes: Tensor) -> Tensor:
        hidden = self.decoder.hidden(codes, None, "decoder")
        assert isinstance(hidden, Tensor)
        return hidden


class ConstantExperts(nn.Module):
    """K vectors in input space: the smallest expert, f_k(x) = m_k. The error is a squared distance."""

    def __init__(self, n_features: int, n_clusters: int):
        super().__init__()
        # zeros: the first statistic ("expert_means") puts each at the mean of its pseudo-cluster
        self.means = nn.Parameter(torch.zeros(n_features, n_clusters))

    def errors(self, x: Rows) -> Tensor:
        """`||x - m_k||^2`, (B, K)."""
        dots = rows_times(x, self.means)
        return (square_norms(x)[:, None] - 2.0 * dots + self.means.square().sum(0)).clamp_min(0.0)


class AutoencoderExperts(nn.Module):
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
        self.in_weight = _uniform((n_features, k, inner[0]), n_features)
        self.in_bias = _uniform((k, inner[0]), n_features)
        pairs = list(zip(inner[:-1], inner[1:], strict=True))
        self.weights = nn.ParameterList(_uniform((k, a, b), a) for a, b in pairs)
        self.biases = nn.ParameterList(_uniform((k, b), a) for a, b in pairs)
        self.out_weight = _uniform((n_features, k, inner[-1]), inner[-1])
        self.out_bias = _uniform((n_features, k), inner[-1])
        self._code_layer = len(hidden) - 1  # inner layer i gives the codes: linear
        self._activation = ACTIVATIONS[activation]
        self._norm = norm == "layer"

    def _activate(self, h: Tensor) -> Tensor:
        """Normalised (without gain, each expert by itself) and activated, (B, K, H)."""
        return self._activation(F.layer_norm(h, h.shape[-1:]) if self._norm else h)

    def errors(self, x: Rows) -> Tensor:
        """`||x - f_k(x)||^2` summed over features, (B, K)."""
        d, k, h1 = self.in_weight.shape
        h = rows_times(x, self.in_weight.reshape(d, k * h1)).view(n_rows(x), k, h1) + self.in_bias
        h = self._activate(h)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.einsum("bkh,khj->bkj", h, weight) + bias
            if i != self._code_layer:
                h = self._activate(h)
        return expert_squared_errors(x, h, self.out_weight, self.out_bias)
