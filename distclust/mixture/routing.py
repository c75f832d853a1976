"""Which experts a row asks, where it does not ask all of them: top-m experts, and a row's own expert.

Leaving experts out is another objective than DAMIC's: with S the experts that are asked,
`L_S = -tau log sum_{k in S} p_k exp(-E_k / tau)`, which is never below L. As no energy is negative, the
difference is at most `tau log(1 + r exp(L_S / tau))` with r the gate's probability of the experts left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from distclust.mixture.sparse import Rows, SparseRows, columns_times, gram_is_cheaper

LEFT_OUT = 1e30
"""The energy of an expert that is not asked: finite, so that weights of zero times it are zero."""


@dataclass(frozen=True, slots=True)
class Routes:
    """P pairs of a row and an expert that it asks, expert by expert, rows rising within an expert."""

    rows: Tensor
    """(P,) int64."""
    experts: Tensor
    """(P,) int64, rising."""
    counts: list[int]
    """Pairs of each of the K experts. On a GPU the host waits for such sizes a few times a step."""

    @classmethod
    def of(cls, asked: Tensor) -> Routes:
        """The pairs of `asked` (B, K) bool."""
        experts, rows = asked.t().nonzero(as_tuple=True)
        return cls(rows, experts, asked.sum(0).tolist())

    @classmethod
    def to_own(cls, labels: Tensor, n_clusters: int) -> Routes:
        """Each row asks the one expert that `labels` (B,) names."""
        experts, rows = torch.sort(labels, stable=True)
        return cls(rows, experts, torch.bincount(labels, minlength=n_clusters).tolist())

    def table(self, of_pairs: Tensor, n_rows: int) -> Tensor:
        """Energies (P,) as (B, K), `LEFT_OUT` where no expert was asked."""
        empty = of_pairs.new_full((n_rows, len(self.counts)), LEFT_OUT)
        return empty.index_put((self.rows, self.experts), of_pairs)

    def times(self, of_pairs: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Each pair's row of (P, A) times the weight (A, B) of its expert, (P, B)."""
        return torch.cat([p @ w for p, w in zip(of_pairs.split(self.counts), weights, strict=True)])

    def repeat(self, x: Rows) -> Rows:
        """The row of each pair, (P, D)."""
        if not isinstance(x, SparseRows):
            return x[self.rows]
        lengths = (x.offsets[1:] - x.offsets[:-1])[self.rows]  # (P,)
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        shifts = torch.repeat_interleave(x.offsets[:-1][self.rows] - offsets[:-1], lengths)
        places = torch.arange(shifts.shape[0], device=shifts.device) + shifts
        return SparseRows(offsets.to(x.offsets.dtype), x.indices[places], x.values[places], x.n_features)

    def own_columns(self, pairs: SparseRows) -> SparseRows:
        """Pairs (P, D) with column d of pair (i, k) at d * K + k, (P, D * K).

        So a weight (D, K, H), seen as (D * K, H), gives each pair its own expert's product in one call.
        """
        k = len(self.counts)
        columns = pairs.indices.long() * k + self.experts[pairs.row_numbers()]
        return SparseRows(pairs.offsets.long(), columns, pairs.values, pairs.n_features * k)


def pair_errors(pairs: Rows, hidden: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
    """`||x_p - (weight_k hidden_p + bias_k)||^2` for P pairs (P, D), (P, H) in the order of `Routes`, (P,).

    `weight` (D, K, H), `bias` (D, K). No (P, D) tensor is made.
    """
    found: Tensor = _PairErrors.apply(hidden, weight, bias, pairs, counts)
    return found


class _PairErrors(torch.autograd.Function):
    """Expert by expert, by the Gram form for many rows, and dense for few, when (n, D) is smaller than the
    expert's weight; the backward makes that again, so that no two of them are held at a time.

    The backward writes each expert's gradient to its place: autograd's makes a gradient of all experts for
    each of these forms and copies them together, which is most of a step with some hundred experts.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, pairs: Rows, counts: list[int]
    ) -> Tensor:
        found: list[Tensor] = []
        halves: list[Tensor | None] = []
        parts = _split(pairs, counts)
        for k, (h, x) in enumerate(zip(hidden.split(counts), parts, strict=True)):
            b, half = bias[:, k].contiguous(), None
            if isinstance(x, SparseRows) and gram_is_cheaper(h.shape[0], h.shape[1], weight.shape[0]):
                own = weight[:, k].contiguous()  # (D, H)
                wb = b @ own  # (H,)
                half = torch.addmm(wb, h, own.t() @ own)  # (n, H): W'(W h + b)
                xw = x.matmul(own)  # (n, H)
                yy = ((half + wb) * h).sum(1) + b.square().sum()
                xy = (xw * h).sum(1) + x.matmul(b[:, None]).squeeze(1)
                found.append((x.square_norms() - 2.0 * xy + yy).clamp_min(0.0))
                half -= xw
            elif h.shape[0]:
                found.append(_residual(h, weight[:, k], b, x).square_().sum(1))
            halves.append(half)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.parts, ctx.counts, ctx.halves = parts, counts, halves
        return torch.cat(found) if found else hidden.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        hidden, weight, bias = ctx.saved_tensors
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        of_hidden = torch.empty_like(hidden)
        of_pairs = (part.split(ctx.counts) for part in (hidden, grad[:, None] * 2.0, of_hidden))
        every = zip(*of_pairs, ctx.parts, ctx.halves, strict=True)
        for k, (h, twice, out, x, half) in enumerate(every):
            own, b = weight[:, k], bias[:, k]
            if half is not None:
                weighted = h * twice
                mean = weighted.sum(0)
                # W (h' diag(g) h) + b mean' - x' diag(g) h
                product = torch.addmm(torch.outer(b, mean), own, weighted.t() @ h)
                of_weight[:, k] = product - columns_times(x, weighted)
                of_bias[:, k] = own @ mean + b * twice.sum() - columns_times(x, twice).squeeze(1)
                torch.mul(half, twice, out=out)
            elif h.shape[0]:
                scaled = _residual(h, own, b, x).mul_(twice)  # (n, D)
                torch.mm(scaled.t(), h, out=of_weight[:, k])
                of_bias[:, k] = scaled.sum(0)
                torch.mm(scaled, own, out=out)
        return of_hidden, of_weight, of_bias, None, None


def _residual(hidden: Tensor, weight: Tensor, bias: Tensor, x: Rows) -> Tensor:
    """`hidden weight' + bias - x`, (n, D)."""
    y = torch.addmm(bias, hidden, weight.t())
    if not isinstance(x, SparseRows):
        return y.sub_(x)
    places = x.row_numbers() * x.n_features + x.indices
    y.view(-1).index_add_(0, places, x.values.to(y.dtype), alpha=-1.0)
    return y


def _split(pairs: Rows, counts: list[int]) -> list[Rows]:
    """The rows of each expert."""
    if not isinstance(pairs, SparseRows):
        return list(pairs.split(counts))
    first = [0, *itertools.accumulate(counts)]
    bounds = pairs.offsets[first].tolist()
    return [
        SparseRows(
            pairs.offsets[a : b + 1] - at, pairs.indices[at:end], pairs.values[at:end], pairs.n_features
        )
        for a, b, at, end in zip(first[:-1], first[1:], bounds[:-1], bounds[1:], strict=True)
    ]


def asked_by(log_p: Tensor, threshold: float, limit: int = 0) -> Tensor:
    """The experts that each row asks (B, K) bool: those of a gate probability above `threshold`, at most
    `limit` of them (0: any number), and always the most probable one."""
    best = log_p.amax(1, keepdim=True)
    asked = (log_p.exp() > threshold) | (log_p == best)
    if 0 < limit < log_p.shape[1]:
        chosen = torch.zeros_like(asked).scatter_(1, log_p.topk(limit, dim=1).indices, True)
        asked &= chosen
    return asked


def worst_case(log_p: Tensor, asked: Tensor, loss: Tensor, tau: Tensor | float) -> Tensor:
    """The bound (B,) on L_S - L, from the gate (B, K), who was asked (B, K) and L_S (B,): all experts that
    were left out could have had no error at all."""
    left_out = log_p.masked_fill(asked, -torch.inf).logsumexp(1)  # (B,) log r
    return tau * F.softplus(left_out + loss / tau)
