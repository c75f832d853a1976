"""Energies E_k(x) (B, K): how badly cluster k explains row x; smaller is better.

A dissimilarity is a pair of functions of codes and parameters, `pairwise` (B, K) and `rowwise` (B,), of one
formula, so
that MIX can put the convex combination of the parameters into the same formula.
Source of the list: DMAE (Lara & Gonzalez, arXiv 2006.08177), section 3 and its code; the Bregman forms are
Banerjee et al. 2005.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distclust.mixture.imports import import_object, is_import_path

EPS = 1e-12
"""Added under a square root: its gradient at a centroid is then finite."""
POSITIVE = 1e-6
"""The smallest value that a divergence on positive vectors sees."""

Formula = Callable[[Tensor, Tensor, "DissimilarityOptions"], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DissimilarityOptions:
    """What some formulas need beside codes and centroids."""

    p: float = 3.0
    """Minkowski's exponent, at least 1."""
    interval: float = 2.0
    """The length of the torus in each direction (2 for codes in [-1, 1])."""
    normaliser: str = "softmax_abs"
    """How Kullback-Leibler puts codes and centroids on the simplex: a key of NORMALISERS."""

    def __post_init__(self) -> None:
        if self.p < 1:
            raise ValueError(f"dissimilarity p is {self.p}; Minkowski needs p >= 1; use manhattan for p = 1")
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"normaliser is {self.normaliser!r}; expected one of {', '.join(NORMALISERS)}")


def _simplex(v: Tensor) -> Tensor:
    v = v + 1e-3  # DMAE's own guard against empty rows
    return v / v.sum(-1, keepdim=True)


NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax_abs": lambda v: torch.softmax(v.abs(), -1),
    "softmax_relu": lambda v: torch.softmax(torch.relu(v), -1),
    "square": lambda v: _simplex(v.square()),
    "abs": lambda v: _simplex(v.abs()),
    "relu": lambda v: _simplex(torch.relu(v)),
    "plain": lambda v: _simplex(v),
    "none": lambda v: v,  # codes that are on the simplex already
}


# Every formula takes codes x and parameters y that broadcast against each other, (..., J), and sums over J.


def _squared_euclidean(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    return (x - y).square().sum(-1)


def _euclidean(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    return ((x - y).square().sum(-1) + EPS).sqrt()


def _manhattan(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    return (x - y).abs().sum(-1)


def _minkowski(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    d = (x - y).abs()
    # in units of the largest difference: a large power of a small number is 0 in float32
    most = d.detach().amax(-1, keepdim=True).clamp_min(EPS)
    return most.squeeze(-1) * ((d / most).pow(o.p).sum(-1) + EPS).pow(1.0 / o.p)


def _chebyshev(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    return (x - y).abs().amax(-1)


def _cosine(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    norms = ((x.square().sum(-1) + EPS) * (y.square().sum(-1) + EPS)).sqrt()
    return 1.0 - (x * y).sum(-1) / norms


def _dot_product(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    return -(x * y).sum(-1)


def _toroidal(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    # the squared distance is separable, so the best of {0, +I, -I}^J is the best shift of each direction
    d = x - y
    shifts = torch.stack((d, d + o.interval, d - o.interval)).square()
    return shifts.amin(0).sum(-1)


def _kullback_leibler(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    norm = NORMALISERS[o.normaliser]
    p, q = norm(x).clamp_min(POSITIVE), norm(y).clamp_min(POSITIVE)
    return (p * (p.log() - q.log())).sum(-1)


def _itakura_saito(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    ratio = x.clamp_min(POSITIVE) / y.clamp_min(POSITIVE)
    return (ratio - ratio.log() - 1.0).sum(-1)


def _i_divergence(x: Tensor, y: Tensor, o: DissimilarityOptions) -> Tensor:
    x, y = x.clamp_min(POSITIVE), y.clamp_min(POSITIVE)
    return (x * (x / y).log() - x + y).sum(-1)


@dataclass(frozen=True, slots=True)
class Dissimilarity:
    """One formula, and what is known of it."""

    formula: Formula
    starts_from: str
    """How its centroids start: 'kmeans', 'kmeans_covariance' or 'init_plus_plus' (DMAE's recipe)."""
    loss_has_prior: bool = True
    """Whether MIX subtracts log pi~/alpha; DMAE's KL loss omits it."""
    is_bregman: bool = False
    """Whether it is a Bregman divergence, whose best centroid is the weighted mean (Banerjee et al. 2005)."""
    has_expansion: bool = False
    """Whether it follows from inner products, which many features need."""


DISSIMILARITIES: dict[str, Dissimilarity] = {
    "euclidean": Dissimilarity(_euclidean, "kmeans", has_expansion=True),
    "squared_euclidean": Dissimilarity(_squared_euclidean, "kmeans", is_bregman=True, has_expansion=True),
    "manhattan": Dissimilarity(_manhattan, "init_plus_plus"),
    "minkowski": Dissimilarity(_minkowski, "init_plus_plus"),
    "chebyshev": Dissimilarity(_chebyshev, "init_plus_plus"),
    "cosine": Dissimilarity(_cosine, "init_plus_plus", has_expansion=True),
    "dot_product": Dissimilarity(_dot_product, "init_plus_plus", has_expansion=True),
    "mahalanobis": Dissimilarity(_squared_euclidean, "kmeans_covariance", is_bregman=True),
    "toroidal": Dissimilarity(_toroidal, "init_plus_plus"),
    "kullback_leibler": Dissimilarity(
        _kullback_leibler, "init_plus_plus", loss_has_prior=False, is_bregman=True
    ),
    "itakura_saito": Dissimilarity(_itakura_saito, "init_plus_plus", is_bregman=True),
    "i_divergence": Dissimilarity(_i_divergence, "init_plus_plus", is_bregman=True),
}


OF_POSITIVES = ("itakura_saito", "i_divergence")
"""Divergences that no value below 0 has."""
_OFF_THE_SIMPLEX = 1e-3
"""How far from 1 the sum of a row on the simplex may be, in float32."""


def outside_domain(name: str, codes: Tensor, o: DissimilarityOptions) -> Tensor:
    """Which rows (B,) of codes (B, J) a divergence is not defined for, where its formula clamps in silence.

    Rows with values below 0 for Itakura-Saito, the I-divergence and Kullback-Leibler of rows that nothing
    makes positive (`plain`, `none`); with `none` those whose sum is not 1 as well. Zeros are inside: a row of
    words has them.
    """
    simplex = name == "kullback_leibler"
    if name in OF_POSITIVES or (simplex and o.normaliser in ("plain", "none")):
        outside = (codes < 0).any(1)
        if simplex and o.normaliser == "none":
            outside |= (codes.sum(1) - 1.0).abs() > _OFF_THE_SIMPLEX
        return outside
    return torch.zeros(codes.shape[0], dtype=torch.bool, device=codes.device)


def find_dissimilarity(name: str) -> Dissimilarity:
    """A dissimilarity of the table, or a user's own by import path: a function of codes and parameters.

    The function takes x and y that broadcast against each other, (..., J), and sums over J.

    Raises:
        ValueError: an import path whose module was not allowed (`imports.allow_modules`), or of no function.
    """
    if not is_import_path(name):
        return DISSIMILARITIES[name]
    function = import_object(name)
    if not callable(function):
        raise ValueError(
            f"model.dissimilarity is {name}, which is a {type(function).__name__}; expected a function of x "
            f"and y, (..., J), one number for each pair: name one (a row goes to method={name})"
        )
    return Dissimilarity(lambda x, y, o: function(x, y), "init_plus_plus")


_MANY = 256
"""Codes longer than this are compared by inner products: differences would need a (B, K, J) tensor."""


def _expanded(name: str, x: Tensor, y: Tensor) -> Tensor:
    """A dissimilarity with `has_expansion` from x y', (B, K).

    Distances are taken from the mean of the parameters: the squares of rows that stand far from 0 leave no
    digit to their differences.
    """
    if name in ("euclidean", "squared_euclidean"):
        centre = y.detach().mean(0)  # (J,)
        x, y = x - centre, y - centre
    dots = x @ y.t()
    if name == "dot_product":
        return -dots
    xx, yy = x.square().sum(1, keepdim=True), y.square().sum(1)
    if name == "cosine":
        return 1.0 - dots / ((xx + EPS) * (yy + EPS)).sqrt()
    squared = (xx - 2.0 * dots + yy).clamp_min(0.0)
    # the expansion cancels to a few units in the last place of ||x||^2: nothing nearer can be told from 0
    return squared if name == "squared_euclidean" else (squared + 1e-6 * (xx.detach() + EPS)).sqrt()


class CentroidEnergy(nn.Module):
    """E_k = d(z, theta_k) for any dissimilarity of the table; parameters can be mixed."""

    def __init__(
        self,
        n_clusters: int,
        code_size: int,
        dissimilarity: str,
        options: DissimilarityOptions,
        log_det: float = 0.0,
    ):
        super().__init__()
        self.centroids = nn.Parameter(torch.empty(n_clusters, code_size).uniform_(-1, 1))
        self.dissimilarity = find_dissimilarity(dissimilarity)
        self.options = options
        self._expand = self.dissimilarity.has_expansion and code_size > _MANY
        self.name = dissimilarity
        self._log_det = log_det
        self.factors: nn.Parameter | None = None
        if dissimilarity == "mahalanobis":
            # the factor L of each precision P = L L'
            self.factors = nn.Parameter(torch.eye(code_size).repeat(n_clusters, 1, 1))

    def pairwise(self, codes: Tensor, nat: Tensor | float = 1.0) -> Tensor:
        """d(z, theta_k) (B, K); for Mahalanobis, less `log_det * nat * 0.5 log det P_k`.

        Args:
            codes: (B, J).
            nat: what one nat is in units of the distance: the temperature by which the gate divides it.
        """
        if self._expand:
            return _expanded(self.name, codes, self.centroids)
        if self.factors is None:
            return self.dissimilarity.formula(codes[:, None, :], self.centroids, self.options)
        diff = codes[:, None, :] - self.centroids  # (B, K, J)
        d = torch.einsum("bkj,kji->bki", diff, self.factors).square().sum(-1)  # (B, K)
        if self._log_det:
            d = d - self._log_det * nat * torch.linalg.slogdet(self.factors).logabsdet
        return d

    def mix(self, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convex combination of the parameters: theta~ (B, J), and P~ (B, J, J) for Mahalanobis (DMAE Eq
        11, 16)."""
        theta = p @ self.centroids
        if self.factors is None:
            return theta, None
        precision = self.factors @ self.factors.transpose(1, 2)  # (K, J, J)
        return theta, torch.einsum("bk,kij->bij", p, precision)

    def rowwise(
        self, codes: Tensor, theta: tuple[Tensor, Tensor | None], nat: Tensor | float = 1.0
    ) -> Tensor:
        """d(z, theta~) (B,), with the log-determinant of P~ as `pairwise` has that of P_k."""
        centre, precision = theta
        if precision is None:
            return self.dissimilarity.formula(codes, centre, self.options)
        diff = codes - centre  # (B, J)
        d = torch.einsum("bi,bij,bj->b", diff, precision, diff)
        if self._log_det:
            d = d - self._log_det * nat * 0.5 * torch.linalg.slogdet(precision).logabsdet
        return d


def told_of_domain(energy: CentroidEnergy, what: str, outside: int, n: int) -> str:
    """What to say of `outside` of n rows or codes (`what`) that `outside_domain` found."""
    found, normaliser = f"model.dissimilarity is {energy.name}", energy.options.normaliser
    if energy.name == "kullback_leibler" and normaliser == "none":
        return (
            f"{found} with model.normaliser none, and {outside} of {n} {what} are not on the simplex; "
            "expected values of 0 and more whose sum is 1, so no row of zeros: divide rows by their sums, or "
            "set model.normaliser to abs, which does that"
        )
    instead = "model.dissimilarity=squared_euclidean, which takes all rows"
    if energy.name == "kullback_leibler":
        instead = "model.normaliser=abs or relu"
    return (
        f"{found}, and {outside} of {n} {what} have values below 0; expected none: give {what} without "
        f"them, or say {instead}"
    )


class StudentEnergy(CentroidEnergy):
    """The heavy tail of DEC: E_k = ((a + 1) / 2) log(1 + ||z - mu_k||^2 / a), so that a tied gate is DEC's
    q."""

    def __init__(self, n_clusters: int, code_size: int, degrees: float = 1.0):
        super().__init__(n_clusters, code_size, "squared_euclidean", DissimilarityOptions())
        self._a = degrees

    def pairwise(self, codes: Tensor, nat: Tensor | float = 1.0) -> Tensor:
        return (self._a + 1) / 2 * torch.log1p(super().pairwise(codes) / self._a)


class GaussianEnergy(nn.Module):
    """E_k = -log N(z; mu_k, diag s2_k) in nats, or its mean over a code with a variance (VaDE).

    With `variance` (B, J): `0.5 sum_j [log 2 pi + log s2_kj + (v_j + (z_j - mu_kj)^2) / s2_kj]` (Jiang et al.
    2017), the terms of the code's own variance included.
    """

    def __init__(self, n_clusters: int, code_size: int):
        super().__init__()
        self.centroids = nn.Parameter(torch.empty(n_clusters, code_size).uniform_(-1, 1))
        self.log_variances = nn.Parameter(torch.zeros(n_clusters, code_size))

    def pairwise(self, codes: Tensor, variance: Tensor | None = None) -> Tensor:
        """E (B, K) of codes (B, J)."""
        precision = (-self.log_variances).exp()  # (K, J)
        squares = (codes[:, None, :] - self.centroids).square()  # (B, K, J)
        if variance is not None:
            squares = squares + variance[:, None, :]
        constant = self.log_variances.sum(1) + self.centroids.shape[1] * math.log(2.0 * math.pi)
        return 0.5 * ((squares * precision).sum(2) + constant)


def init_plus_plus(
    codes: Tensor, k: int, pairwise: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator
) -> Tensor:
    """DMAE's starting points (K, J) for an arbitrary dissimilarity: a max-min exchange over random
    candidates.

    Start from K random codes that differ. A hundred times, draw a candidate that is not among them: when
    its smallest dissimilarity to the set exceeds the smallest one within the set, it replaces the nearer
    member of that closest pair; else, when its second-smallest exceeds the smallest of its nearest member, it
    replaces that member. `pairwise(a, b)` gives (len(a), len(b)).
    """
    n = codes.shape[0]
    chosen = _first_distinct(codes, torch.randperm(n, generator=generator).to(codes.device), k)
    if k < 2:
        return chosen
    for _ in range(100):
        candidate = codes[torch.randint(n, (1,), generator=generator).to(codes.device)]
        if (candidate == chosen).all(1).any():  # by some dissimilarities a copy is not near (dot product)
            continue
        to_set = pairwise(candidate, chosen)[0]  # (K,)
        within = pairwise(chosen, chosen)  # (K, K)
        within.fill_diagonal_(float("inf"))
        closest = int(within.argmin())
        pair = (closest // k, closest % k)
        near = int(to_set.argmin())
        if to_set.min() > within.min():
            chosen[pair[0] if to_set[pair[0]] < to_set[pair[1]] else pair[1]] = candidate[0]
        elif to_set.kthvalue(2).values > within[near].min():
            chosen[near] = candidate[0]
    return chosen


def _first_distinct(codes: Tensor, order: Tensor, k: int) -> Tensor:
    """The first k codes (K, J) in that order that differ; fewer where there are no more."""
    size = k
    while True:
        rows = codes[order[:size]]
        _, value = torch.unique(rows, dim=0, return_inverse=True)
        places = torch.arange(len(rows), device=codes.device)
        first = torch.full_like(places, len(rows)).scatter_reduce(0, value, places, "amin")
        first = first[first < len(rows)].sort().values  # where each value is met first
        if len(first) >= k or len(rows) == len(order):
            return rows[first[:k]].clone()
        size *= 4
