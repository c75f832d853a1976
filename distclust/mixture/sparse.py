"""Sparse rows on their way through a network, without ever making them dense.

Two operations carry a sparse batch: a sparse-times-dense product for a first layer, and the exact
squared error of a linear last layer against a sparse target (Vincent, de Brebisson & Bouthillier 2015,
"Efficient exact gradient update for training deep networks with very large sparse targets"). Both have
backward passes of their own: autograd's would take a few times the time of the one, half as much again as
the other needs. What they gain is in docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ByColumn(NamedTuple):
    """Where the non-zeros of a batch stand when they are read column by column."""

    places: Tensor
    """(nnz,) int64 the place of each in the order by rows."""
    rows: Tensor
    """(nnz,) their rows."""
    offsets: Tensor
    """(D+1,) the bounds of the columns, or (U+1,) of those that `columns` names."""
    columns: Tensor | None
    """(U,) the columns that are not empty, where most are; else None."""


@dataclass(frozen=True, slots=True)
class SparseRows:
    """A batch of B sparse rows of D features, in CSR form.

    `offsets` (B+1,), `indices` (nnz,) with the same integer type, `values` (nnz,).
    """

    offsets: Tensor
    indices: Tensor
    values: Tensor
    n_features: int
    _found: list[_ByColumn] = field(default_factory=list, repr=False, compare=False)
    """The transposed order once it has been found: several layers need it, with the same places."""

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
        if self.values.device.type == "cpu" and not self.values.requires_grad:
            product: Tensor = _Product.apply(weight, self)
            return product
        return _bag_sums(weight, self.indices, self.offsets, self.values)

    def dot(self, vector: Tensor) -> Tensor:
        """Rows times `vector` (D,) -> (B,)."""
        products = self.values.to(vector.dtype) * vector.index_select(0, self.indices)
        return vector.new_zeros(self.n_rows).index_add(0, self.row_numbers(), products)

    def by_column(self) -> _ByColumn:
        """The non-zeros column by column, rows rising within a column."""
        if not self._found:
            columns, places = torch.sort(self.indices, stable=True)
            named = None
            if self.values.shape[0] < self.n_features:
                named, counts = torch.unique_consecutive(columns, return_counts=True)
                offsets = F.pad(counts.cumsum(0), (1, 0)).to(self.offsets.dtype)
            else:
                bounds = torch.arange(self.n_features + 1, dtype=columns.dtype, device=columns.device)
                offsets = torch.searchsorted(columns, bounds).to(self.offsets.dtype)
            rows = self.row_numbers().to(offsets.dtype)[places]
            self._found.append(_ByColumn(places, rows, offsets, named))
        return self._found[0]

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
        return SparseRows(self.offsets, self.indices, values, self.n_features, self._found)


def _bag_sums(weight: Tensor, indices: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
    """The weighted sum of `weight`'s rows that each bag names: a sparse-times-dense product."""
    return F.embedding_bag(
        indices,
        weight,
        offsets,
        mode="sum",
        per_sample_weights=values.to(weight.dtype),
        include_last_offset=True,
    )


class _Product(torch.autograd.Function):
    """X W, whose backward X'G is the same kernel with the non-zeros read column by column.

    Measured on a CPU (4,096 rows of 77 non-zeros, 500 wide): 18 ms for 2,000 columns, 73 ms for 47,236, where
    embedding_bag's own backward takes 67 and 102; ordering the non-zeros takes 9 ms, once a batch.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: SparseRows) -> Tensor:
        ctx.x = x
        return _bag_sums(weight, x.indices, x.offsets, x.values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return columns_times(ctx.x, grad.contiguous()), None


def columns_times(x: SparseRows, grad: Tensor) -> Tensor:
    """x' (D, B) times `grad` (B, H) -> (D, H)."""
    order = x.by_column()
    sums = _bag_sums(grad, order.rows, order.offsets, x.values[order.places])
    if order.columns is None:
        return sums
    return sums.new_zeros(x.n_features, sums.shape[1]).index_copy_(0, order.columns.long(), sums)


class _SquaredLength(torch.autograd.Function):
    """`||W_k h_k + b_k||^2` by the Gram form: `h'(W'W)h + 2 h'(W'b) + b'b`, for K experts (K, B).

    `hidden` (K, B, H), `weight` (K, D, H), `bias` (K, D). Products a step: 2 D H^2 (W'W) and 2 B H^2 forward;
    `W (h' diag(g) h)` needs as many in the backward, where autograd would make twice that, since it does not
    know that W'W has one argument and is symmetric.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        gram = weight.transpose(1, 2) @ weight  # (K, H, H)
        wb = (bias[:, None, :] @ weight).squeeze(1)  # (K, H)
        half = torch.baddbmm(wb[:, None, :], hidden, gram)  # (K, B, H): W'(W h + b)
        ctx.save_for_backward(hidden, weight, bias, half)
        return ((half + wb[:, None, :]) * hidden).sum(2) + bias.square().sum(1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, bias, half = ctx.saved_tensors
        twice = (2.0 * grad)[:, :, None]  # (K, B, 1)
        weighted = hidden * twice  # (K, B, H)
        moments = weighted.transpose(1, 2) @ hidden  # (K, H, H)
        mean = weighted.sum(1)  # (K, H)
        of_weight = torch.baddbmm(bias[:, :, None] * mean[:, None, :], weight, moments)  # (K, D, H)
        of_bias = (weight @ mean[:, :, None]).squeeze(2) + bias * twice.sum(1)  # (K, D)
        return half * twice, of_weight, of_bias


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


_OUT_OF_CACHE = 1 << 22


def gram_is_cheaper(n_rows: int, width: int, n_outputs: int = 0) -> bool:
    """Whether the Gram form of the last layer takes less time than the dense one; `n_outputs` is D, or K D.

    Operations of a step: 6 B D H dense; 4 D H^2 + 4 B H^2 by the Gram form, and the non-zeros: equal near
    B = 0.7 H. Measured on a CPU (H 256 and 500, forward and backward): equal at 0.9 H for 2,000 outputs, and
    at 0.5 to 0.6 H for 47,236, where the (B, D) tensors of the dense form leave the caches. Not measured on
    a GPU.
    """
    return n_rows >= (0.6 if n_rows * n_outputs > _OUT_OF_CACHE else 0.9) * width


def squared_error(x: Rows, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`||x - (hidden weight' + bias)||^2` summed over features, (B,).

    `hidden` (B, H), `weight` (D, H), `bias` (D,). For sparse x and a wide batch this is the exact Gram form:
    `||x||^2 - 2 x.y + ||y||^2` with `x.y` over the non-zeros and `||y||^2 = h'(W'W)h + 2 h'(W'b) + b'b`.
    """
    if isinstance(x, SparseRows) and gram_is_cheaper(x.n_rows, weight.shape[1], weight.shape[0]):
        return gram_error(x, hidden, weight, bias)
    return dense_error(x, hidden, weight, bias)


def dense_error(x: Rows, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`squared_error` with a (B, D) reconstruction."""
    y = torch.addmm(bias, hidden, weight.t())  # (B, D)
    return ((x.to_dense() if isinstance(x, SparseRows) else x) - y).square().sum(1)


def gram_error(x: SparseRows, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`squared_error` by the Gram form."""
    xy = (x.matmul(weight) * hidden).sum(1) + x.dot(bias)
    yy = _SquaredLength.apply(hidden[None], weight[None], bias[None]).squeeze(0)
    return (x.square_norms() - 2.0 * xy + yy).clamp_min(0.0)


def expert_squared_errors(x: Rows, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`||x - (hidden_k weight_k' + bias_k)||^2` for each of K experts, (B, K).

    `hidden` (B, K, H), `weight` (D, K, H), `bias` (D, K). The same two forms as `squared_error`.
    """
    d, k, h = weight.shape
    if not isinstance(x, SparseRows) or not gram_is_cheaper(x.n_rows, h, d * k):
        dense = x.to_dense() if isinstance(x, SparseRows) else x
        y = torch.einsum("bkh,dkh->bkd", hidden, weight) + bias.t()  # (B, K, D)
        return (dense[:, None, :] - y).square().sum(2)
    xw = x.matmul(weight.reshape(d, k * h)).view(-1, k, h)  # (B, K, H)
    xy = (xw * hidden).sum(2) + x.matmul(bias)  # (B, K)
    yy = _SquaredLength.apply(hidden.transpose(0, 1), weight.transpose(0, 1), bias.t()).t()  # (B, K)
    return (x.square_norms()[:, None] - 2.0 * xy + yy).clamp_min(0.0)
