"""Noise of a step: draws that a row has wherever it is trained, and images that they turn and shift."""

from __future__ import annotations

import pytest
import torch

from distclust.mixture.convolutional import augment
from distclust.mixture.noise import Noise


def test_images_are_turned_and_shifted_as_far_as_asked_and_no_farther() -> None:
    image = torch.zeros(1, 16, 16)
    image[0, 6:10, 6:10] = 1.0
    x = image.flatten()[None].repeat(200, 1)
    noise = Noise(0, 3, [0], [200], "cpu")
    still = augment(x, (1, 16, 16), 0.0, 0.0, noise)
    torch.testing.assert_close(still, x, atol=1e-5, rtol=0)
    moved = augment(x, (1, 16, 16), 0.0, 2.0, noise).view(-1, 16, 16)
    mass = moved.sum((1, 2))
    torch.testing.assert_close(mass, torch.full((200,), 16.0), atol=1e-3, rtol=0)
    rows = (moved.sum(2) * torch.arange(16.0)).sum(1) / mass - 7.5
    assert 1.5 < float(rows.abs().max()) <= 2.0 + 1e-4
    nobody = augment(x[:0], (1, 16, 16), 0.3, 2.0, Noise(0, 3, [0], [0], "cpu"))
    assert nobody.shape == (0, 256)  # a worker without rows in a step
    turned = augment(x, (1, 16, 16), 0.3, 0.0, noise).view(-1, 16, 16)
    assert float((turned - moved).abs().max()) > 0.1
    again = augment(x, (1, 16, 16), 0.3, 2.0, Noise(0, 3, [0], [200], "cpu"))
    torch.testing.assert_close(again, augment(x, (1, 16, 16), 0.3, 2.0, noise), atol=0, rtol=0)


def test_draws_are_normal_and_keyed() -> None:
    draws = Noise(1, 2, [0, 1], [300, 300], "cpu").normal("z", 50)
    assert abs(float(draws.mean())) < 0.02
    assert float(draws.std()) == pytest.approx(1.0, abs=0.02)
    one_lane = Noise(1, 2, [1], [300], "cpu").normal("z", 50)
    assert torch.equal(draws[300:], one_lane)
