"""Pictures: what experts give back, what is drawn of which run, and that a picture never costs a run."""

from __future__ import annotations

import pytest
import torch
from scipy.sparse import csr_matrix

from distclust.mixture.experts import build_experts
from distclust.mixture.settings import ModelSettings
from distclust.mixture.sparse import SparseRows

SETTINGS = {
    "autoencoder": {},
    "autoencoder, layer norm": {"norm": "layer"},
    "constant": {"experts": "constant"},
    "low_rank": {"experts": "low_rank"},
    "convolutional": {"experts": "convolutional", "image": (1, 6, 4), "expert_conv": ((3, 3, 1, 2),)},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_energy_is_the_distance_to_what_the_experts_give_back(kind: str) -> None:
    torch.manual_seed(0)
    s = ModelSettings(expert_hidden=(7,), expert_code_size=3, **SETTINGS[kind])
    experts = build_experts(24, 5, s)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
        x = torch.rand(6, 24) * (torch.rand(6, 24) < 0.5)
        found = experts.reconstruct(x)
        assert found.shape == (6, 5, 24)
        torch.testing.assert_close((x[:, None] - found).square().sum(2), experts.errors(x))
        csr = csr_matrix(x.numpy())
        parts = (torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data))
        rows = SparseRows(*parts, 24)
        torch.testing.assert_close(experts.reconstruct(rows), found)
