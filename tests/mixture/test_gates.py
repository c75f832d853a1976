"""The starts of a linear gate."""

from __future__ import annotations

import torch

from distclust.mixture.gates import LinearGate

B, K, J = 24, 4, 6


def test_pinv_gate_gives_one_on_the_own_centroid_and_zero_elsewhere() -> None:
    gate = LinearGate(J, K)
    centroids = torch.randn(K, J)
    gate.start_from(centroids)
    torch.testing.assert_close(gate.layer(centroids), torch.eye(K), atol=1e-5, rtol=0)


def test_e_step_gate_is_the_posterior_of_an_isotropic_mixture_and_labels_as_k_means() -> None:
    gate = LinearGate(J, K).double()
    centroids, z = torch.randn(K, J, dtype=torch.float64), torch.randn(B, J, dtype=torch.float64)
    gate.start_at_e_step(centroids)
    squared = torch.cdist(z, centroids).square()
    among = torch.cdist(centroids, centroids).square()
    b = 10.0 / among[~torch.eye(K, dtype=torch.bool)].mean()
    torch.testing.assert_close(gate.log_p(z), torch.log_softmax(-b * squared, dim=1))
    assert torch.equal(gate.log_p(z).argmax(1), squared.argmin(1))
