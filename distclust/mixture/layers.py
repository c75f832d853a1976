"""Layers that take sparse rows, normalisation by lanes, and a multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.mixture.noise import Noise
from distclust.mixture.precision import MixedProducts
from distclust.mixture.sparse import Rows, rows_times

ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": lambda v: F.leaky_relu(v, 0.2),
    "leaky_relu_01": lambda v: F.leaky_relu(v, 0.01),
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def uniform(shape: Sequence[int], fan_in: int) -> nn.Parameter:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): variance scaling with scale 1/3, as DEC and DMAE start."""
    bound = 1.0 / math.sqrt(max(fan_in, 1))
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Lanes:
    """The lanes of the batch that is being trained on: what batch normalisation may mix.

    One object is shared by a model and its layers. `counts` is None whenever no training step runs.
    """

    def __init__(self) -> None:
        self.counts: tuple[int, ...] | None = None

    def membership(self, rows: int, like: Tensor) -> Tensor:
        """(L, B) with 1 where row b is of lane l."""
        assert self.counts is not None
        if sum(self.counts) != rows:
            raise ValueError(f"{rows} rows in lanes of {list(self.counts)}")
        counts = torch.tensor(self.counts)
        if like.is_cuda:  # so that nothing waits for the copy
            counts = counts.pin_memory().to(like.device, non_blocking=True)
        lanes = torch.arange(len(self.counts), device=like.device)
        of_row = torch.repeat_interleave(lanes, counts, output_size=rows)
        return F.one_hot(of_row, len(self.counts)).to(like.dtype).t()


class LaneBatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) of each lane by itself, (B, C, ...) -> the same shape.

    A lane's rows do not depend on the number of workers, so the result does not either. In training the
    lane's own mean and variance are used, and kept until the statistic "batch_norm" has added them up over
    all workers into the running ones, which are used everywhere else.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, width: int, lanes: Lanes, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_variance", torch.ones(width))
        self._lanes, self._momentum, self._eps = lanes, momentum, eps
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        if self._lanes.counts is None:
            mean, variance = self.running_mean.view(shape), self.running_variance.view(shape)
        else:
            member = self._lanes.membership(x.shape[0], x)  # (L, B)
            places = x[0, 0].numel() if x.shape[0] else 1
            rows = member.sum(1, keepdim=True).clamp_min(1.0)  # (L, 1)
            lane_mean = member @ x.flatten(2).sum(2) / (rows * places) if x.dim() > 2 else member @ x / rows
            mean = (member.t() @ lane_mean).view(-1, x.shape[1], *shape[2:])  # (B, C, 1...)
            squares = (x - mean).square()
            squares = squares.flatten(2).sum(2) if x.dim() > 2 else squares
            lane_variance = member @ squares / (rows * places)  # (L, C)
            variance = (member.t() @ lane_variance).view(-1, x.shape[1], *shape[2:])
            weights = member.sum(1).double()
            # what only one lane saw weighs as much as its rows
            self.seen.append(
                (
                    weights.sum(),
                    weights @ lane_mean.detach().double(),
                    weights @ lane_variance.detach().double(),
                )
            )
        normal = (x - mean) * torch.rsqrt(variance + self._eps)
        return normal * self.weight.view(shape) + self.bias.view(shape)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, and row-weighted sums (C,) of means and variances since the last call."""
        device = self.weight.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        zeros = torch.zeros(self.weight.shape[0], dtype=torch.float64, device=device)
        rows = sum((s[0] for s in self.seen), zero)
        mean = sum((s[1] for s in self.seen), zeros)
        variance = sum((s[2] for s in self.seen), zeros)
        self.seen = []
        return rows, mean, variance

    def update(self, rows: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Move the running values towards the means over all workers."""
        step = self._momentum * (rows > 0)
        self.running_mean += step * (mean / rows.clamp_min(1) - self.running_mean)
        self.running_variance += step * (variance / rows.clamp_min(1) - self.running_variance)


def normalisation(kind: str, width: int, lanes: Lanes | None) -> nn.Module:
    """The layer that a setting's `norm` names, for (B, width)."""
    if kind == "batch":
        assert lanes is not None
        return LaneBatchNorm(width, lanes)
    return nn.LayerNorm(width) if kind == "layer" else nn.Identity()


class RowsLinear(nn.Module):
    """x (B, D), sparse or dense, to (B, H). The weight is stored (D, H): a row for each feature."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = uniform((n_in, n_out), n_in)
        self.bias = uniform((n_out,), n_in)

    def forward(self, x: Rows) -> Tensor:
        return rows_times(x, self.weight) + self.bias


class MLP(MixedProducts):
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
        dropout: tuple[float, float] = (0.0, 0.0),
        lanes: Lanes | None = None,
    ):
        super().__init__()
        self.layers = nn.ModuleList(RowsLinear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.norms = nn.ModuleList(normalisation(norm, w, lanes) for w in widths[1:-1])
        self._activation = ACTIVATIONS[activation]
        self._input_dropout, self._hidden_dropout = dropout

    def hidden_layers(self, x: Rows, noise: Noise | None, name: str) -> list[Rows]:
        """The input as the first layer sees it, and the values (B, H) of each hidden layer."""
        if noise is not None:
            x = noise.dropout(f"{name}.input", x, self._input_dropout)
        found = [x]
        for i, norm in enumerate(self.norms):
            with self.mixed():
                x = self.layers[i](x)
            x = self._activation(norm(x))
            if noise is not None:
                x = noise.dropout(f"{name}.hidden{i}", x, self._hidden_dropout)
            found.append(x)
        return found

    def hidden(self, x: Rows, noise: Noise | None, name: str) -> Rows:
        """The values (B, widths[-2]) that the last layer sees."""
        return self.hidden_layers(x, noise, name)[-1]

    def forward(self, x: Rows, noise: Noise | None = None, name: str = "mlp") -> Tensor:
        return self.layers[-1](self.hidden(x, noise, name))
