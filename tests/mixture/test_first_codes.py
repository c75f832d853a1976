"""Codes that an encoder can learn first: spectral ones, on landmarks and any other row; Fourier features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons

from distclust.config import resolve
from distclust.errors import ConfigError, DataError
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.mixture.sparse import SparseRows
from distclust.mixture.spectral import SpectralMap


def fitted(
    rows: torch.Tensor, n_codes: int, gamma: float | None, landmarks: int | None = None
) -> SpectralMap:
    spectral = SpectralMap(landmarks or len(rows), rows.shape[1], n_codes, gamma)
    spectral.fit(rows)
    return spectral


def moons(n: int = 200, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    x, y = make_moons(n, noise=0.05, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), y


def test_landmarks_have_the_codes_of_ng_jordan_and_weiss() -> None:
    rows, _ = moons()
    square = ((rows[:, None] - rows).double().numpy() ** 2).sum(2)
    affinity = np.exp(-5.0 * square)
    degree = affinity.sum(1)
    _, vectors = np.linalg.eigh(affinity / np.sqrt(np.outer(degree, degree)))
    expected = vectors[:, ::-1][:, :4]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    codes = fitted(rows, 4, 5.0)(rows).numpy()
    signs = np.sign((codes * expected).sum(0))
    np.testing.assert_allclose(codes * signs, expected, atol=2e-3)


def test_rows_that_are_no_landmarks_have_the_codes_of_their_cluster() -> None:
    rows, labels = moons(400)
    spectral = fitted(rows[:200], 2, 30.0)
    codes = spectral(rows)
    assert torch.allclose(codes.norm(dim=1), torch.ones(400), atol=1e-5)
    first = codes[labels == 0].mean(0)
    same = (codes @ first > codes @ codes[labels == 1].mean(0)).numpy()
    assert (same == (labels == 0)).mean() > 0.99
    # so far that every affinity underflows: the nearest landmark's
    far = rows[:1] + torch.tensor([[0.0, 1e4]])
    nearest = rows[:200][(rows[:200] - far).norm(dim=1).argmin()][None]
    torch.testing.assert_close(spectral(far), spectral(nearest), atol=1e-2, rtol=0)


def test_sparse_rows_have_the_codes_of_dense_ones() -> None:
    dense = torch.randn(60, 7).relu()
    row, column = dense.nonzero(as_tuple=True)
    offsets = torch.cat((torch.zeros(1), torch.bincount(row, minlength=60).cumsum(0))).int()
    rows = SparseRows(offsets, column.int(), dense[row, column], dense.shape[1])
    spectral = fitted(dense[:40], 3, 0.5)
    torch.testing.assert_close(spectral(rows), spectral(dense), atol=1e-5, rtol=0)


def test_a_measured_width_follows_the_scale_of_the_data() -> None:
    rows, _ = moons()
    small, large = fitted(rows, 3, None), fitted(100.0 * rows, 3, None)
    assert float(small.gamma / large.gamma) == pytest.approx(1e4, rel=1e-4)
    torch.testing.assert_close(small(rows).abs(), large(100.0 * rows).abs(), atol=1e-2, rtol=0)
    # the fourth neighbour of 200 is one in fifty
    square = torch.cdist(rows, rows).square().sort(1).values[:, 4].median()
    assert float(torch.exp(-small.gamma * square)) == pytest.approx(np.exp(-0.5), rel=1e-3)


def test_fewer_rows_than_landmarks_and_rows_that_repeat_change_nothing() -> None:
    rows, _ = moons(50)
    alone = fitted(rows, 2, 5.0)
    roomy = fitted(torch.cat((rows, rows)), 2, 5.0, landmarks=120)
    torch.testing.assert_close(alone(rows), roomy(rows), atol=1e-5, rtol=0)
    # a landmark that is not there is no neighbour, wherever it would lie
    away = fitted(rows + 100.0, 2, 5.0, landmarks=60)
    assert float(away(torch.zeros(1, 2)).norm()) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(
        DataError, match=r"spectral codes of 3 clusters .* found 2 among 18 .* model.landmarks"
    ):
        fitted(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(9, 1), 3, 5.0)


def test_the_map_is_no_part_of_a_model_that_predicts() -> None:
    row = METHODS["dmae-spectral"]
    model = MixtureModel(row, replace(row.settings, hidden=(8,), landmarks=20), 6, 3)
    assert not [name for name in model.prediction_state() if name.startswith("spectral")]
    assert {"spectral.landmarks", "spectral.directions"} < set(model.state_dict())
    # nor asked for when such a model is read: the same row without its first phase has neither
    small = replace(row.settings, hidden=(8,), code_size=2)
    reread = MixtureModel(row, small, 6, 3, for_training=False)
    assert reread.state_dict().keys() == model.prediction_state().keys()
    codes = model.spectral_codes(torch.randn(5, 6))
    assert codes.shape == (5, 10)
    assert not codes[:, 3:].any()


def test_a_row_without_neighbours_takes_no_code_from_the_others() -> None:
    rows, labels = moons(300)
    alone = torch.tensor([[0.5, 1.9], [-3.0, -3.0], [4.0, 4.0]])
    spectral = SpectralMap(303, 2, 2, None)
    assert spectral.fit(torch.cat((rows, alone))) == 300
    codes = spectral(rows)
    first = codes[labels == 0].mean(0)
    same = (codes @ first > codes @ codes[labels == 1].mean(0)).numpy()
    assert (same == (labels == 0)).all()


def test_rows_far_from_the_origin_have_the_same_codes() -> None:
    away = moons()[0] + 1e5
    rows = away - 1e5  # as they are after rounding
    near, far = fitted(rows, 8, 30.0), fitted(away, 8, 30.0)
    a, b = near(rows), far(away)
    torch.testing.assert_close(a @ a.t(), b @ b.t(), atol=4e-2, rtol=0)


def test_rows_too_small_for_a_measured_width_are_refused() -> None:
    with pytest.raises(DataError, match="measured gamma is .*; expected .*vocabulary.scale"):
        fitted(moons()[0].double() * 1e-22, 3, None)


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        (
            1e7,
            r"at model.spectral_gamma 1e\+07 only \d+ of 200 landmarks that .*set it lower, or leave it",
        ),
        (1e-3, r"all landmarks are near each other: the eigenvalue of the last of 5 .*set it higher"),
    ],
)
def test_a_width_that_tells_nothing_apart_is_refused(gamma: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fitted(moons()[0], 5, gamma)


def test_a_measured_width_is_not_to_be_left_out() -> None:
    rows = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.4], [0.4, 0.5], [9.0, 9.0], [-9.0, 5.0]])
    with pytest.raises(
        DataError, match=r"of 6 landmarks that differ \(of 54\) .*lower, or ask for fewer clusters$"
    ):
        fitted(rows.repeat(9, 1), 6, None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"landmarks": 0}, "model.landmarks is 0; expected at least 1"),
        ({"landmarks": 2}, "model.landmarks is 2, and the spectral codes of 9 clusters need as many"),
        ({"spectral_gamma": 0.0}, "model.spectral_gamma is 0.0; expected a finite number above 0"),
        ({"spectral_gamma": float("inf")}, "model.spectral_gamma is inf; expected a finite number"),
        ({"fourier_gamma": 5.0}, "model.fourier_gamma is 5.0, and no phase has the term fourier_regression"),
    ],
)
def test_settings_that_cannot_be_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"method": "dmae-spectral", "clusters": 9, "model": model})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"phases": {"pretrain": {"begin": []}}}, r"say phases.pretrain.begin=\[spectral_map\]"),
        (
            {"phases": {"pretrain": {"terms": [["reconstruction", 1.0]]}}},
            "no phase from there on learns them; add the term spectral_regression",
        ),
        (
            {"method": "dmae-fourier", "model": {"landmarks": 40}},
            "model.landmarks is 40, and no phase has the term spectral_regression",
        ),
        ({"phases": {"pretrain": {"statistics": ["spectral_map"]}}}, "statistic"),
        ({"method": "dmae-exp", "model": {"unit_codes": False}}, "say reconstruction in its place"),
        (
            {"method": "dmm", "phases": {"joint": {"terms": [["mix", 1.0], ["unit_reconstruction", 1.0]]}}},
            "nothing to reconstruct",
        ),
    ],
)
def test_phases_that_do_not_go_together_are_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"method": "dmae-spectral", "clusters": 9, **recipe})


def test_codes_of_fewer_numbers_than_clusters_are_refused() -> None:
    row = METHODS["dmae-spectral"]
    with pytest.raises(ValueError, match="codes of 2 numbers hold no spectral codes of 3 clusters"):
        MixtureModel(row, replace(row.settings, code_size=2), 6, 3)


def test_random_fourier_features_are_a_gaussian_kernel() -> None:
    row = METHODS["dmae-fourier"]
    model = MixtureModel(row, replace(row.settings, hidden=(8,), code_size=4000, fourier_gamma=0.7), 2, 4)
    x = torch.randn(20, 2)
    kernel = torch.exp(-0.7 * torch.cdist(x, x).square())
    features = model.fourier_features(x)
    torch.testing.assert_close(features @ features.t(), kernel, atol=0.08, rtol=0)


@pytest.mark.parametrize("conv", [(), ((6, 3, 2, 1), (8, 3, 1, 2))])
@pytest.mark.parametrize("method", ["dmae-fourier", "dmae-spectral"])
def test_the_first_phases_train_the_encoder_and_then_all_the_rest(method: str, conv: Any) -> None:
    """Whatever the network calls the parts of its decoder."""
    row = METHODS[method]
    settings = replace(row.settings, image=(1, 8, 8), conv=conv, code_size=10, norm="layer")
    model = MixtureModel(row, settings, 64, 10)
    network = {name for name, _ in model.named_parameters() if name.startswith("network.")}
    encoder, decoder = (set(model.trained_in(phase)) for phase in row.phases[:2])
    assert encoder == {name for name in network if name.startswith("network.encoder.")} != set()
    assert decoder == network - encoder != set()
    last = "network.weights.1" if conv else "network.out_weight"
    assert set(model.trained_in(replace(row.phases[1], trains=("network.out_weight",)))) == {last}


@pytest.mark.parametrize(
    ("part", "there"),
    [("network.encodr", "network.encoder"), ("network.log_variance", "network.decoder"), ("experts", "gate")],
)
def test_a_part_that_is_not_there_cannot_be_trained(part: str, there: str) -> None:
    row = METHODS["dmae-text"]
    row = replace(row, phases=(*row.phases[:2], replace(row.phases[2], trains=("network", part))))
    with pytest.raises(ValueError, match=rf"phase joint: it trains {part}, .* expected some of .*{there}\b"):
        MixtureModel(row, row.settings, 6, 3)
    MixtureModel(row, row.settings, 6, 3, for_training=False)  # what predicts has no phases
