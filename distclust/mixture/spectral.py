"""Spectral codes of any row, from landmarks: a target for encoders that are to find clusters of any shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.errors import DataError
from distclust.mixture.sparse import Rows, rows_times, square_norms

_NEAR = 50
"""Where no width is given, a landmark's affinity falls to `exp(-1/2)` at the nearest one in so many."""


class SpectralMap(nn.Module):
    """The K leading eigenvectors of the normalised affinity of landmarks, extended to any row.

    On the landmarks these are the codes of Ng, Jordan & Weiss 2001 ("On spectral clustering: analysis and an
    algorithm"): eigenvectors of `D^-1/2 A D^-1/2` with `A = exp(-gamma ||x - y||^2)`, each row of length 1
    (but for the diagonal of A, which is 1 here, so that the extension meets the landmarks' own codes).
    A row that is no landmark gets Nystroem's extension (Fowlkes, Belongie, Chung & Malik 2004, "Spectral
    grouping using the Nystroem method"), which needs no pass over the data.
    """

    landmarks: Tensor
    absent: Tensor
    directions: Tensor
    gamma: Tensor

    def __init__(self, n_landmarks: int, n_features: int, n_codes: int, gamma: float | None):
        super().__init__()
        self.given = gamma
        self.register_buffer("landmarks", torch.zeros(n_features, n_landmarks))
        # 0, or -inf where the data has fewer rows than landmarks were asked for
        self.register_buffer("absent", torch.zeros(n_landmarks))
        self.register_buffer("directions", torch.zeros(n_landmarks, n_codes))
        self.register_buffer("gamma", torch.tensor(1.0 if gamma is None else float(gamma)))

    def forward(self, x: Rows) -> Tensor:
        """Codes (B, K) of length 1. A row's degree cancels, so a far row is as its nearest landmark."""
        return F.normalize(torch.softmax(self._log_affinity(x) + self.absent, dim=1) @ self.directions, dim=1)

    def _log_affinity(self, x: Rows) -> Tensor:
        """`-gamma ||x - l||^2` (B, M)."""
        products = rows_times(x, self.landmarks)  # (B, M)
        square = square_norms(x)[:, None] + self.landmarks.square().sum(0) - 2.0 * products
        return -self.gamma * square.clamp_min(0.0)

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Take rows (n, D), at most as many as there are landmarks, and find their eigenvectors.

        Raises:
            DataError: when fewer rows than codes differ.
        """
        rows = torch.unique(rows.cpu().double(), dim=0)
        n, n_codes = len(rows), self.directions.shape[1]
        if n < n_codes:
            raise DataError(
                f"the spectral codes of {n_codes} clusters need as many landmarks that differ; found "
                f"{n} in the sample: ask for fewer clusters, or for more model.landmarks"
            )
        square = torch.cdist(rows, rows).square()  # (n, n)
        gamma = self.given
        if gamma is None:
            gamma = float(0.5 / square.kthvalue(1 + -(-n // _NEAR), dim=1).values.median())
        affinity = torch.exp(-gamma * square)
        root = affinity.sum(1).rsqrt()  # (n,)
        values, vectors = torch.linalg.eigh(root[:, None] * affinity * root)
        values, vectors = values[-n_codes:].flip(0), vectors[:, -n_codes:].flip(1)  # largest first
        self.landmarks.zero_()[:, :n].copy_(rows.t())
        self.absent.fill_(-torch.inf)[:n] = 0.0
        scaled = root[:, None] * vectors / values.clamp_min(1e-9)
        self.directions.zero_()[:n].copy_(scaled / scaled.abs().max())
        self.gamma.fill_(gamma)
