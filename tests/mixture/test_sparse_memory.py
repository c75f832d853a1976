"""The sparse forms allocate nothing of the size of a dense batch, in forward or backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distclust.mixture import sparse
from distclust.mixture.experts import AutoencoderExperts
from distclust.mixture.networks import Autoencoder
from distclust.mixture.routing import Routes
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import SparseRows

B, D, H, K = 512, 20_000, 16, 4
DENSE_BATCH = 4 * B * D  # bytes: 41 MB
NONZEROS = 20


def batch() -> SparseRows:
    g = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(D, generator=g)[:NONZEROS].sort().values for _ in range(B)])
    offsets = torch.arange(0, B * NONZEROS + 1, NONZEROS)
    return SparseRows(offsets, indices.flatten(), torch.rand(B * NONZEROS, generator=g), D)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that the function's tensors take at a time, beside what was there before."""
    function()  # whatever is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert changes
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def autoencoder_step() -> None:
    net = Autoencoder(D, ModelSettings(hidden=(H,), code_size=4))
    x = batch()
    net.recon_error(net.encode(x), x).sum().backward()


def experts_step() -> None:
    AutoencoderExperts(D, K, (H // K,), 4).errors(batch()).sum().backward()


def routed_step() -> None:
    """Each row asks one of the experts: 128 rows an expert of width 4, the Gram form."""
    routes = Routes.to_own(torch.arange(B) % K, K)
    AutoencoderExperts(D, K, (H // K,), 4).errors_of(batch(), routes).sum().backward()


EXPERTS, EACH = 16, 3


def routed_to_many_step() -> None:
    """Three rows an expert of width 4: the dense form, an expert at a time."""
    x, rows = batch(), EXPERTS * EACH
    x = SparseRows(x.offsets[: rows + 1], x.indices[: rows * NONZEROS], x.values[: rows * NONZEROS], D)
    routes = Routes.to_own(torch.arange(rows) % EXPERTS, EXPERTS)
    AutoencoderExperts(D, EXPERTS, (4,), 4).errors_of(x, routes).sum().backward()


def test_experts_that_few_rows_ask_hold_the_dense_rows_of_one_at_a_time() -> None:
    layer = 4 * D * EXPERTS * 4  # bytes; all dense rows would be 0.75 of it
    assert peak_bytes(routed_to_many_step) < 4.9 * layer


@pytest.mark.parametrize("step", [autoencoder_step, experts_step, routed_step])
def test_a_step_allocates_less_than_one_dense_batch(step: Callable[[], None]) -> None:
    weights = 4 * D * H  # bytes of one layer; two of them, their gradients and what is added up to them
    assert peak_bytes(step) < 8 * weights + DENSE_BATCH / 10 < 0.4 * DENSE_BATCH


def test_the_dense_form_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "gram_is_cheaper", lambda *sizes: False)
    assert peak_bytes(autoencoder_step) > 2 * DENSE_BATCH


def test_the_non_zeros_are_ordered_by_column_once() -> None:
    x = batch()
    weight = torch.randn(D, 2, requires_grad=True)
    x.matmul(weight).sum().backward()
    order = x.by_column()
    other = x.with_values(x.values * 2)
    assert other.by_column() is order
    assert x.by_column() is order


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_backward_product_is_that_of_embedding_bag(dtype: torch.dtype) -> None:
    x = batch()
    x = SparseRows(x.offsets.to(dtype), x.indices.to(dtype), x.values.double(), D)
    weight = torch.randn(D, 8, dtype=torch.float64, requires_grad=True)
    g = torch.randn(B, 8, dtype=torch.float64)
    mine = torch.autograd.grad(x.matmul(weight), weight, g)[0]
    bags: Tensor = sparse._bag_sums(weight, x.indices, x.offsets, x.values)
    torch.testing.assert_close(mine, torch.autograd.grad(bags, weight, g)[0], rtol=1e-12, atol=1e-12)


def test_values_that_want_a_gradient_get_one() -> None:
    x = batch()
    values = x.values.clone().requires_grad_()
    rows = SparseRows(x.offsets, x.indices, values, D)
    weight = torch.randn(D, 3)
    rows.matmul(weight).sum().backward()
    torch.testing.assert_close(values.grad, weight[x.indices].sum(1))
