"""Spectral codes of any row, from landmarks: a target for encoders that are to find clusters of any shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distclust.errors import DataError
from distclust.mixture.sparse import Rows, SparseRows, rows_times

_NEAR = 50
"""Where no width is given, a landmark's affinity falls to `exp(-1/2)` at the nearest one in so many."""
_ALONE = 0.1
"""A landmark whose affinities sum to less than this share of the median has no neighbours."""
_RANK = 1e-6
"""Eigenvalues below it are lost when single precision divides by them."""


class SpectralMap(nn.Module):
    """The K leading eigenvectors of the normalised affinity of landmarks, extended to any row.

    On the landmarks these are the codes of Ng, Jordan & Weiss 2001 ("On spectral clustering: analysis and an
    algorithm"): eigenvectors of `D^-1/2 A D^-1/2` with `A = exp(-gamma ||x - y||^2)`, each row of length 1.
    A row that is no landmark gets Nystroem's extension (Fowlkes, Belongie, Chung & Malik 2004, "Spectral
    grouping using the Nystroem method"), which needs no pass over the data.

    The diagonal of A is 1 here and 0 there, so that the extension meets the landmarks' own codes. A landmark
    without neighbours would then have an eigenvector to itself, at the cost of one that divides the data:
    such landmarks are left out, and rows near them are as the nearest one that is left.
    """

    centre: Tensor
    landmarks: Tensor
    at_centre: Tensor
    bias: Tensor
    directions: Tensor
    gamma: Tensor

    def __init__(self, n_landmarks: int, n_features: int, n_codes: int, gamma: float | None):
        super().__init__()
        self.given = gamma
        # landmarks less their mean: far from the origin a product of rows as they are has no digits left
        self.register_buffer("centre", torch.zeros(n_features))
        self.register_buffer("landmarks", torch.zeros(n_features, n_landmarks))
        self.register_buffer("at_centre", torch.zeros(n_landmarks))
        # -gamma ||l||^2, or -inf where there is no landmark
        self.register_buffer("bias", torch.zeros(n_landmarks))
        self.register_buffer("directions", torch.zeros(n_landmarks, n_codes))
        self.register_buffer("gamma", torch.tensor(1.0 if gamma is None else float(gamma)))

    def forward(self, x: Rows) -> Tensor:
        """Codes (B, K) of length 1. A row's own length and degree cancel, so a far row is as its nearest
        landmark."""
        if isinstance(x, SparseRows):
            products = rows_times(x, self.landmarks) - self.at_centre  # (B, M)
        else:
            products = (x - self.centre) @ self.landmarks  # (B, M)
        shares = torch.softmax(2.0 * self.gamma * products + self.bias, dim=1)
        return F.normalize(shares @ self.directions, dim=1)

    @torch.no_grad()
    def fit(self, rows: Tensor) -> int:
        """Take rows (n, D), at most as many as there are landmarks, and find their eigenvectors.

        Returns:
            The number of landmarks: rows that differ and have neighbours.

        Raises:
            DataError: when those are fewer than the codes, or gamma is too small to tell so many apart.
        """
        n_given, n_codes = len(rows), self.directions.shape[1]
        rows = torch.unique(rows.cpu().double(), dim=0)
        more = ", or for more model.landmarks" if n_given == len(self.bias) else ""
        if len(rows) < n_codes:
            raise DataError(
                f"the spectral codes of {n_codes} clusters need as many rows that differ; found {len(rows)} "
                f"among {n_given} landmarks: ask for fewer clusters{more}"
            )
        square = torch.cdist(rows, rows).square()  # (n, n)
        gamma = self.given
        if gamma is None:
            near = 1 + -(-len(rows) // _NEAR)
            gamma = float(0.5 / square.kthvalue(near, dim=1).values.median())
            if gamma > torch.finfo(torch.float32).max:
                raise DataError(
                    f"the landmarks lie so near each other that the measured gamma is {gamma:.3g}; expected "
                    "one that float32 can hold: set vocabulary.scale higher"
                )
        affinity = torch.exp(-gamma * square)
        others = affinity.sum(1) - 1.0
        kept = others > _ALONE * others.median()
        rows, affinity = rows[kept], affinity[kept][:, kept]
        n = len(rows)
        if n < n_codes:
            other = "ask for fewer clusters" if self.given is None else "leave it out to have it measured"
            raise DataError(
                f"at model.spectral_gamma {gamma:g} only {n} of {len(kept)} landmarks that differ (of "
                f"{n_given}) have neighbours, and {n_codes} clusters need as many: set it lower, or {other}"
            )
        root = affinity.sum(1).rsqrt()  # (n,)
        values, vectors = torch.linalg.eigh(root[:, None] * affinity * root)
        values, vectors = values[-n_codes:].flip(0), vectors[:, -n_codes:].flip(1)  # largest first
        if float(values[-1]) < _RANK:
            raise DataError(
                f"at model.spectral_gamma {gamma:g} all landmarks are near each other: the eigenvalue of the "
                f"last of {n_codes} clusters is {float(values[-1]):.1e}, expected {_RANK:g} or more; set it "
                f"higher, or ask for fewer clusters{more}"
            )
        centre = rows.mean(0)
        centred = rows - centre
        scaled = root[:, None] * vectors / values
        self.centre.copy_(centre)
        self.landmarks.zero_()[:, :n].copy_(centred.t())
        self.at_centre.zero_()[:n].copy_(centred @ centre)
        self.bias.fill_(-torch.inf)[:n].copy_(-gamma * centred.square().sum(1))
        self.directions.zero_()[:n].copy_(scaled / scaled.abs().max())
        self.gamma.fill_(gamma)
        return n
