"""Sparse rows give what dense rows give, values and gradients, without a dense batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distclust.mixture import sparse
from distclust.mixture.noise import Noise
from distclust.mixture.sparse import SparseRows

D, H, K = 30, 4, 3


def to_sparse(dense: Tensor) -> SparseRows:
    """CSR rows of a dense matrix (tests only)."""
    mask = dense != 0
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)))
    return SparseRows(offsets, mask.nonzero()[:, 1], dense[mask], dense.shape[1])


def make(n: int, seed: int = 0) -> Tensor:
    """Random sparse rows (n, D) in float64, one of them empty."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, D, generator=g, dtype=torch.float64)
    x = x * (torch.rand(n, D, generator=g) < 0.2)
    if n:
        x[0] = 0
    return x


@pytest.mark.parametrize("n", [0, 1, 3, 50])
def test_products_norms_and_round_trip(n: int) -> None:
    x = make(n)
    rows = to_sparse(x)
    weight = torch.randn(D, H, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rows.to_dense(), x)
    torch.testing.assert_close(rows.square_norms(), x.square().sum(1))
    torch.testing.assert_close(rows.matmul(weight), x @ weight)
    g = torch.randn(n, H, dtype=torch.float64)
    got = torch.autograd.grad((rows.matmul(weight) * g).sum(), weight)[0]
    torch.testing.assert_close(got, x.t() @ g)


@pytest.mark.parametrize("n", [2, 50])  # fewer and more rows than the width: both forms
def test_squared_error_equals_the_dense_form(n: int) -> None:
    torch.manual_seed(1)
    x = make(n)
    parts = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((n, H), (D, H), (D,))]
    hidden, weight, bias = parts
    assert sparse.gram_is_cheaper(n, H) is (n == 50)
    dense = (x - (hidden @ weight.t() + bias)).square().sum(1)
    mine = sparse.squared_error(to_sparse(x), hidden, weight, bias)
    torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(mine.sum(), parts), torch.autograd.grad(dense.sum(), parts), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [2, 50])
def test_expert_errors_equal_the_dense_form(n: int) -> None:
    torch.manual_seed(2)
    x = make(n)
    parts = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((n, K, H), (D, K, H), (D, K))]
    hidden, weight, bias = parts
    dense = torch.stack(
        [(x - (hidden[:, k] @ weight[:, k].t() + bias[:, k])).square().sum(1) for k in range(K)], 1
    )
    mine = sparse.expert_squared_errors(to_sparse(x), hidden, weight, bias)
    torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(mine.sum(), parts), torch.autograd.grad(dense.sum(), parts), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_float32_is_good_to_a_ten_thousandth() -> None:
    """At the scale of real rows (length 44.7) the large terms of the Gram form cancel."""
    torch.manual_seed(3)
    x = make(64)
    x = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-9) * 2000**0.5).float()
    parts = [torch.randn(s, requires_grad=True) for s in ((64, H), (D, H), (D,))]
    mine = sparse.squared_error(to_sparse(x), *parts)
    dense = (x - (parts[0] @ parts[1].t() + parts[2])).square().sum(1)
    torch.testing.assert_close(mine, dense, rtol=1e-5, atol=1e-3)
    for a, b in zip(
        torch.autograd.grad(mine.sum(), parts), torch.autograd.grad(dense.sum(), parts), strict=True
    ):
        assert (a - b).norm() < 1e-4 * b.norm()


def test_noise_is_the_same_on_any_split_and_for_sparse_and_dense() -> None:
    x = make(10, seed=4)
    whole = Noise(7, 3, [0, 1, 2], [4, 3, 3], "cpu").dropout("gate.input", x, 0.5)
    parts = [
        Noise(7, 3, [0], [4], "cpu").dropout("gate.input", x[:4], 0.5),
        Noise(7, 3, [1, 2], [3, 3], "cpu").dropout("gate.input", x[4:], 0.5),
    ]
    assert isinstance(whole, Tensor)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
    as_sparse = Noise(7, 3, [0, 1, 2], [4, 3, 3], "cpu").dropout("gate.input", to_sparse(x), 0.5)
    assert isinstance(as_sparse, SparseRows)
    torch.testing.assert_close(as_sparse.to_dense(), whole, rtol=0, atol=0)


def test_noise_depends_on_everything_it_says_and_has_the_right_rate() -> None:
    def bits(seed: int = 0, step: int = 0, lane: int = 0, name: str = "a") -> Tensor:
        return Noise(seed, step, [lane], [200], "cpu").bits(name, 50)

    base = bits()
    assert torch.equal(base, bits())
    for other in (bits(seed=1), bits(step=1), bits(lane=1), bits(name="b")):
        assert (base == other).float().mean() < 0.01
    kept = Noise(0, 0, [0], [2000], "cpu").dropout("a", torch.ones(2000, 100), 0.3)
    assert isinstance(kept, Tensor)
    assert (kept == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert kept.mean().item() == pytest.approx(1.0, abs=0.01)
    # neither rows nor columns repeat each other
    drawn = (base / 2**31).float() - 0.5
    assert torch.corrcoef(drawn)[~torch.eye(200, dtype=torch.bool)].abs().mean() < 0.2
    assert torch.corrcoef(drawn.t())[~torch.eye(50, dtype=torch.bool)].abs().mean() < 0.1
