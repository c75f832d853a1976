"""Networks: from rows to codes, and the error of the rows as the codes give them back.

A network never returns a reconstruction for a caller to compare; it returns the error of each row, so that a
sparse target stays sparse (`sparse.squared_error`).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.mixture.layers import MLP, Lanes, RowsLinear, uniform
from distclust.mixture.noise import Noise
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import Rows, SparseRows, rows_times, squared_error

Layers = dict[str, Tensor]
"""What a network hands on beside its codes: hidden layers, switches of a pooling, variances."""


class Network(Protocol):
    """What the mixture asks of a network; a network of your own has these."""

    code_size: int

    def encode(self, x: Rows, noise: Noise | None = None) -> Tensor:
        """Codes (B, J); undisturbed and deterministic without noise."""
        ...

    def encode_with_layers(self, x: Rows, noise: Noise | None = None) -> tuple[Tensor, Layers]:
        """The codes, and what the errors below need to know of the way there."""
        ...

    def recon_error(self, codes: Tensor, x: Rows, layers: Layers | None = None) -> Tensor:
        """The error (B,) of x as the decoder makes it from the codes, summed over features."""
        ...


def cross_entropy(x: Rows, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Binary cross-entropy of `sigmoid(hidden weight' + bias)` against x in [0, 1], summed to (B,).

    `hidden` (B, H), `weight` (D, H), `bias` (D,). It is `sum softplus(y) - x.y`, so that a sparse x stays so.
    """
    y = torch.addmm(bias, hidden, weight.t())  # (B, D)
    if isinstance(x, SparseRows):
        xy = (rows_times(x, weight) * hidden).sum(1) + rows_times(x, bias[:, None]).squeeze(1)
    else:
        xy = (x * y).sum(1)
    return F.softplus(y).sum(1) - xy


class Identity(nn.Module):
    """No network: the codes are the rows themselves, made dense (k-means, DMM, CM)."""

    def __init__(self, n_features: int):
        super().__init__()
        self.code_size = n_features

    def encode(self, x: Rows, noise: Noise | None = None) -> Tensor:
        return x.to_dense() if isinstance(x, SparseRows) else x

    def encode_with_layers(self, x: Rows, noise: Noise | None = None) -> tuple[Tensor, Layers]:
        return self.encode(x, noise), {}

    def recon_error(self, codes: Tensor, x: Rows, layers: Layers | None = None) -> Tensor:
        raise ValueError("this row has no network, so there is nothing to reconstruct")


class Directions(nn.Module):
    """The rows' leading singular directions as an encoder: latent semantic analysis (Deerwester et al. 1990).

    Codes are `x V`, what a row has of each direction, and a row is rebuilt as `V V' x`. The start
    `singular_directions` finds V (D, J); a phase that does not train the network leaves it.
    """

    def __init__(self, n_features: int, s: ModelSettings):
        super().__init__()
        self.code_size = s.code_size
        self.directions = nn.Parameter(torch.zeros(n_features, s.code_size))

    def encode(self, x: Rows, noise: Noise | None = None) -> Tensor:
        """Codes (B, J)."""
        return rows_times(x, self.directions)

    def encode_with_layers(self, x: Rows, noise: Noise | None = None) -> tuple[Tensor, Layers]:
        return self.encode(x, noise), {}

    def recon_error(self, codes: Tensor, x: Rows, layers: Layers | None = None) -> Tensor:
        """`||x - V codes||^2` (B,)."""
        return squared_error(x, codes, self.directions, codes.new_zeros(len(self.directions)))


class Autoencoder(nn.Module):
    """An encoder D -> hidden -> J and its mirror, linear at the codes and at the output (or a sigmoid)."""

    def __init__(self, n_features: int, s: ModelSettings, lanes: Lanes | None = None):
        super().__init__()
        self.code_size = s.code_size
        widths = [n_features, *s.hidden, s.code_size]
        self.encoder = MLP(
            widths,
            activation=s.activation,
            norm=s.norm,
            dropout=(s.input_dropout, s.hidden_dropout),
            lanes=lanes,
        )
        mirror = widths[::-1]
        self.decoder = MLP(mirror[:-1] + [1], activation=s.activation, norm=s.norm, lanes=lanes)
        # the last layer is kept as (D, H), for the exact sparse error
        self.decoder.layers = self.decoder.layers[:-1]
        self.out_weight = uniform((n_features, mirror[-2]), mirror[-2])
        self.out_bias = uniform((n_features,), mirror[-2])
        self._sigmoid = s.output == "sigmoid"

    def encode(self, x: Rows, noise: Noise | None = None) -> Tensor:
        """Codes (B, J)."""
        return self.encoder(x, noise, "network")

    def encode_with_layers(self, x: Rows, noise: Noise | None = None) -> tuple[Tensor, Layers]:
        """Codes (B, J), and the hidden layers as `layer0`, `layer1`, ... from the input on."""
        hidden = self.encoder.hidden_layers(x, noise, "network")
        layers = {f"layer{i}": h for i, h in enumerate(hidden[1:]) if isinstance(h, Tensor)}
        return self.encoder.layers[-1](hidden[-1]), layers

    def recon_error(self, codes: Tensor, x: Rows, layers: Layers | None = None) -> Tensor:
        """`||x - decoder(codes)||^2` summed over features, or the cross-entropy, (B,)."""
        error = cross_entropy if self._sigmoid else squared_error
        return error(x, self._before_output(codes), self.out_weight, self.out_bias)

    def layer_errors(self, codes: Tensor, layers: Layers) -> Tensor:
        """Mean squared error (B,) of each hidden layer against the decoder's mirror of it, added up."""
        decoded = self.decoder.hidden_layers(codes, None, "decoder")[1:]
        total = codes.new_zeros(codes.shape[0])
        for i, back in enumerate(reversed(decoded)):
            assert isinstance(back, Tensor)
            total = total + (layers[f"layer{i}"].detach() - back).square().mean(1)
        return total

    def decode(self, codes: Tensor) -> Tensor:
        """The reconstruction (B, D); for pictures and words, never for a loss."""
        y = self._before_output(codes) @ self.out_weight.t() + self.out_bias
        return y.sigmoid() if self._sigmoid else y

    def _before_output(self, codes: Tensor) -> Tensor:
        hidden = self.decoder.hidden(codes, None, "decoder")
        assert isinstance(hidden, Tensor)
        return hidden


class VariationalAutoencoder(Autoencoder):
    """An autoencoder whose code has a mean and a variance in each direction (VaDE; Kingma & Welling 2014).

    Without noise the code is the mean; with it, a draw. `layers` has `mean` and `log_variance` (B, J).
    """

    def __init__(self, n_features: int, s: ModelSettings, lanes: Lanes | None = None):
        super().__init__(n_features, s, lanes)
        self.log_variance = RowsLinear(s.hidden[-1], s.code_size)
        with torch.no_grad():  # small variances at first: the pretrained autoencoder still works
            self.log_variance.weight.mul_(0.1)
            self.log_variance.bias.fill_(-4.0)

    def encode(self, x: Rows, noise: Noise | None = None) -> Tensor:
        return self.encode_with_layers(x, noise)[0]

    def encode_with_layers(self, x: Rows, noise: Noise | None = None) -> tuple[Tensor, Layers]:
        hidden = self.encoder.hidden(x, noise, "network")
        mean, log_variance = self.encoder.layers[-1](hidden), self.log_variance(hidden)
        log_variance = log_variance.clamp(-20.0, 10.0)  # exp of it stays in float32
        z = mean
        if noise is not None:
            z = mean + (0.5 * log_variance).exp() * noise.normal("network.code", self.code_size)
        return z, {"mean": mean, "log_variance": log_variance}
