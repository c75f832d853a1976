"""Sparse rows on their way through a network, without ever making them dense.

Two operations carry a sparse batch: a sparse-times-dense product for a first layer, and the exact
squared error of a linear last layer against a sparse target (Vincent, de Brebisson & Bouthillier 2015,
"Efficient exact gradient update for training deep networks with very large sparse targets").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparseRows:
    """A batch of B sparse rows of D features, in CSR form.

    `offsets` (B+1,), `indices` (nnz,) with the same integer type, `values` (nnz,).
    """

    offsets: Tensor
    indices: Tensor
    values: Tensor
    n_features: int

    @property
    def n_rows(self) -> int:
        return self.offsets.shape[0] - 1

    def row_numbers(self) -> Tensor:
        """The row (nnz,) of each non-zero."""
        counts = self.offsets[1:] - self.offsets[:-1]
        rows = torch.arange(self.n_rows, device=self.offsets.device)
        return torch.repeat_interleave(rows, counts, output_size=self.values.shape[0])

    def matmul(self, weight: Tensor) -> Tensor:
        """Rows times `weight` (D, H) -> (B, H); the backward makes a (D, H) gradient and no (B, D) one."""
        if self.values.shape[0] == 0:
            # embedding_bag refuses an empty batch; the product with nothing keeps the graph
            return weight[:0].sum(0).expand(self.n_rows, -1) + 0.0
        return F.embedding_bag(
            self.indices,
            weight,
            self.offsets,
            mode="sum",
            per_sample_weights=self.values.to(weight.dtype),
            include_last_offset=True,
        )

    def square_norms(self) -> Tensor:
        """The squared length (B,) of each row."""
        squares = self.values * self.values
        total = torch.zeros(self.n_rows, dtype=squares.dtype, device=squares.device)
        return total.index_add_(0, self.row_numbers(), squares)

    def to_dense(self) -> Tensor:
        """The rows as a (B, D) tensor."""
        dense = torch.zeros(self.n_rows, self.n_features, dtype=self.values.dtype, device=self.values.device)
        dense[self.row_numbers(), self.indices.long()] = self.values
        return dense

    def with_values(self, values: Tensor) -> SparseRows:
        """The same non-zero places with other values (nnz,)."""
        return SparseRows(self.offsets, self.indices, values, self.n_features)


Rows = SparseRows | Tensor
"""A batch: sparse rows, or a dense (B, D) tensor."""


def n_rows(x: Rows) -> int:
    """The number of rows B of a batch."""
    return x.n_rows if isinstance(x, SparseRows) else x.shape[0]


def rows_times(x: Rows, weight: Tensor) -> Tensor:
    """x (B, D) times `weight` (D, H) -> (B, H), x sparse or dense."""
    return x.matmul(weight) if isinstance(x, SparseRows) else x @ weight


def square_norms(x: Rows) -> Tensor:
    """The squared length (B,) of each row, x sparse or dense."""
    return x.square_norms() if isinstance(x, SparseRows) else (x * x).sum(1)


def gram_is_cheaper(n_rows: int, width: int) -> bool:
    """Whether the Gram form of the last layer needs fewer products than the dense form.

    Dense: B*D*H for the output, once more for each of two gradients. Gram: D*H*H for W'W and its gradient
    and B*H*H, independent of D in B. They cross near B = H.
    """
    return n_rows >= width


def squared_error(x: Rows, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`||x - (hidden weight' + bias)||^2` summed over features, (B,).

    `hidden` (B, H), `weight` (D, H), `bias` (D,). For sparse x and a wide batch this is the exact Gram form:
    `||x||^2 - 2 x.y + ||y||^2` with `x.y` over the non-zeros and `||y||^2 = h'(W'W)h + 2 h'(W'b) + b'b`.
    """
    if not isinstance(x, SparseRows):
        return (x - torch.addmm(bias, hidden, weight.t())).square().sum(1)
    if not gram_is_cheaper(x.n_rows, weight.shape[1]):
        y = torch.addmm(bias, hidden, weight.t())  # (B, D)
        return (x.to_dense() - y).square().sum(1)
    xy = (x.matmul(weight) * hidden).sum(1) + x.matmul(bias[:, None]).squeeze(1)
    gram = weight.t() @ weight  # (H, H)
    yy = ((hidden @ gram) * hidden).sum(1) + 2.0 * (hidden @ (weight.t() @ bias)) + bias @ bias
    return (x.square_norms() - 2.0 * xy + yy).clamp_min(0.0)


def expert_squared_errors(x: Rows, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`||x - (hidden_k weight_k' + bias_k)||^2` for each of K experts, (B, K).

    `hidden` (B, K, H), `weight` (D, K, H), `bias` (D, K). The same two forms as `squared_error`.
    """
    d, k, h = weight.shape
    if not isinstance(x, SparseRows) or not gram_is_cheaper(x.n_rows, h):
        dense = x.to_dense() if isinstance(x, SparseRows) else x
        y = torch.einsum("bkh,dkh->bkd", hidden, weight) + bias.t()  # (B, K, D)
        return (dense[:, None, :] - y).square().sum(2)
    xw = x.matmul(weight.reshape(d, k * h)).view(-1, k, h)  # (B, K, H)
    xy = (xw * hidden).sum(2) + x.matmul(bias)  # (B, K)
    by_expert = weight.permute(1, 0, 2)  # (K, D, H)
    gram = by_expert.transpose(1, 2) @ by_expert  # (K, H, H)
    wb = torch.einsum("kdh,dk->kh", by_expert, bias)  # (K, H)
    hg = torch.einsum("bkh,khj->bkj", hidden, gram)  # (B, K, H)
    yy = (hg * hidden).sum(2) + 2.0 * (hidden * wb).sum(2) + (bias * bias).sum(0)  # (B, K)
    return (x.square_norms()[:, None] - 2.0 * xy + yy).clamp_min(0.0)
