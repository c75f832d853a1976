"""The identities and the traps of the rows beyond DAMIC and DMAE (float64 where a formula is compared)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from distclust.mixture import terms
from distclust.mixture.convolutional import ConvolutionalAutoencoder
from distclust.mixture.energies import CentroidEnergy, DissimilarityOptions, GaussianEnergy, StudentEnergy
from distclust.mixture.experts import LowRankExperts
from distclust.mixture.gates import TiedGate
from distclust.mixture.layers import LaneBatchNorm, Lanes
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.mixture.networks import cross_entropy
from distclust.mixture.noise import Noise
from distclust.mixture.settings import ModelSettings
from distclust.mixture.statistics import STATISTICS
from distclust.mixture.terms import Scene, View

B, K, J = 24, 4, 6


def model_of(method: str, n_features: int = J, **settings: Any) -> MixtureModel:
    torch.manual_seed(0)
    row = METHODS[method]
    sizes: dict[str, Any] = {"hidden": (8,), "code_size": J, "expert_hidden": (5,), "gate_hidden": (7,)}
    changed = dataclasses.replace(row.settings, **(sizes | settings))
    return MixtureModel(dataclasses.replace(row, settings=changed), changed, n_features, K)


def scene_of(model: MixtureModel, view: View, **totals: Tensor) -> Scene:
    return Scene(model, torch.zeros(B, J), view, totals)


def value(name: str, scene: Scene) -> Tensor:
    return terms.TERMS[name].function(scene)


@pytest.fixture
def rows() -> Tensor:
    return torch.rand(B, J, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1


# ---- CM and AE-CM


def test_cm_is_the_expected_squared_distance_of_its_three_terms(rows: Tensor) -> None:
    """E1 + E2 + E3 of the paper, from its own formulas."""
    model = model_of("cm").double()
    logits = torch.randn(B, K, dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(logits, 1)
    p, m = log_p.exp(), model.energy.centroids  # type: ignore[union-attr]
    e1 = (rows - p @ m).square().sum(1)
    e2 = (p * (1 - p) * m.square().sum(1)).sum(1)
    gram = m @ m.t()
    pairs = p[:, :, None] * p[:, None, :] * gram
    e3 = -(pairs.sum((1, 2)) - torch.diagonal(pairs, dim1=1, dim2=2).sum(1))
    energies = model.energies(rows, rows)
    mine = value("exp", scene_of(model, View(energies=energies, log_p=log_p)))
    torch.testing.assert_close(mine, e1 + e2 + e3)
    for wrt in (logits, m):
        ours = torch.autograd.grad(mine.sum(), wrt, retain_graph=True)[0]
        theirs = torch.autograd.grad((e1 + e2 + e3).sum(), wrt, retain_graph=True)[0]
        torch.testing.assert_close(ours, theirs)


def test_ae_cm_is_the_expected_distance_for_orthonormal_centroids(rows: Tensor) -> None:
    model = model_of("ae-cm").double()
    basis = torch.linalg.qr(torch.randn(J, K, dtype=torch.float64)).Q.t()
    model.energy.centroids.data.copy_(basis)  # type: ignore[union-attr]
    log_p = torch.log_softmax(torch.randn(B, K, dtype=torch.float64), 1)
    mine = value("exp_orthonormal", scene_of(model, View(z=rows, log_p=log_p)))
    distance = torch.cdist(rows, basis).square()
    torch.testing.assert_close(mine, terms.expected(log_p, distance))
    assert float(value("orthonormality", scene_of(model, View(log_p=log_p))).max()) < 1e-12
    model.energy.centroids.data.mul_(2.0)  # type: ignore[union-attr]
    assert float(value("orthonormality", scene_of(model, View(log_p=log_p)))[0]) == pytest.approx(3.0 * K)


def test_orthonormal_centroids_need_as_many_directions() -> None:
    with pytest.raises(ValueError, match="set model.code_size to at least 4"):
        model_of("ae-cm", code_size=3)


# ---- terms of global means: the value, and the exact gradient without a collective


@pytest.mark.parametrize("name", ["usage_prior", "batch_entropy"])
def test_a_prior_over_the_global_batch_has_the_exact_gradient_on_every_share_of_it(name: str) -> None:
    model = model_of("cm")
    logits = torch.randn(B, K, dtype=torch.float64, requires_grad=True)

    def direct(a: Tensor) -> Tensor:
        g = torch.log_softmax(a, 1).exp().mean(0)
        return -g.log().sum() if name == "usage_prior" else (g * g.log()).sum()

    expected = torch.autograd.grad(direct(logits), logits)[0]
    log_p = torch.log_softmax(logits, 1)
    totals = {"step_usage": log_p.exp().sum(0).detach(), "step_rows": torch.tensor(float(B)).double()}
    parts = [
        value(name, scene_of(model, View(log_p=log_p[share]), **totals))
        for share in (slice(0, 5), slice(5, B))
    ]
    together = torch.cat(parts)
    torch.testing.assert_close(together.double(), direct(logits).expand(B).detach(), atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(together.sum() / B, logits)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_usage_prior_pulls_a_cluster_back_whose_gate_underflows() -> None:
    model = model_of("cm")
    logits = torch.zeros(B, K)
    logits[:, 0] = -200.0  # exp(-200) is 0 in float32
    logits.requires_grad_()
    log_p = torch.log_softmax(logits, 1)
    assert float(log_p.exp()[:, 0].max()) == 0.0
    usage = STATISTICS["step_usage"].collect(scene_of(model, View(log_p=log_p.detach())))
    prior = value("usage_prior", scene_of(model, View(log_p=log_p), **usage))
    assert math.isfinite(float(prior[0].detach()))
    prior.mean().backward()
    assert float(logits.grad[:, 0].max()) < 0  # descent raises the logit
    torch.testing.assert_close(logits.grad[:, 0].sum(), torch.tensor(-1.0), atol=1e-3, rtol=0)


# ---- DEC and its family


@pytest.mark.parametrize("degrees", [1.0, 3.0])
def test_decs_gradients(degrees: float) -> None:
    torch.manual_seed(5)
    energy = StudentEnergy(K, J, degrees).double()
    gate = TiedGate(K, alpha=1.0).double()
    z = torch.randn(B, J, dtype=torch.float64, requires_grad=True)
    log_q = gate.log_p_of(energy.pairwise(z))
    log_t = terms.sharpened_target(log_q, log_q.exp().sum(0).log(), 2.0, 1.0).detach()
    terms.kl_from_target(log_t, log_q).sum().backward()
    diff = z.detach()[:, None] - energy.centroids.detach()  # (B, K, J)
    scale = (log_t.exp() - log_q.detach().exp()) / (1 + diff.square().sum(2) / degrees)
    pulls = (degrees + 1) / degrees * scale[:, :, None] * diff
    torch.testing.assert_close(z.grad, pulls.sum(1))
    torch.testing.assert_close(energy.centroids.grad, -pulls.sum(0))


def test_targets_use_the_frequencies_of_the_whole_data_and_not_the_batchs() -> None:
    model = model_of("dec")
    log_p = torch.log_softmax(torch.randn(B, K), 1)
    whole = torch.tensor([1000.0, 10.0, 10.0, 10.0])
    scene = scene_of(model, View(log_p=log_p, teacher_log_p=log_p), gate_usage=whole)
    t = log_p.exp() ** 2 / whole
    expected = (t / t.sum(1, keepdim=True)).log()
    torch.testing.assert_close(value("target_teacher", scene), terms.kl_from_target(expected, log_p))
    of_the_batch = log_p.exp() ** 2 / log_p.exp().sum(0)
    wrong = terms.kl_from_target((of_the_batch / of_the_batch.sum(1, keepdim=True)).log(), log_p)
    assert not torch.allclose(value("target_teacher", scene), wrong)


def test_the_teacher_is_the_model_of_the_last_refresh_and_counts_moved_labels() -> None:
    model = model_of("dec")
    x = torch.randn(B, J)
    model.freeze_teacher()
    before = model.view(x, ("gate",)).log_p
    with torch.no_grad():
        model.energy.centroids.copy_(model.energy.centroids.flip(0))  # type: ignore[union-attr]
    view = model.view(x, ("gate", "teacher"))
    torch.testing.assert_close(view.teacher_log_p, before)
    torch.testing.assert_close(view.log_p, before.flip(1))  # type: ignore[union-attr]
    counted = STATISTICS["teacher"].collect(Scene(model, x, view, {}))
    assert float(counted["moved"]) == float((before.argmax(1) != K - 1 - before.argmax(1)).sum())  # type: ignore[union-attr]
    assert float(counted["moved_rows"]) == B
    STATISTICS["teacher"].apply(model, counted)
    torch.testing.assert_close(model.view(x, ("teacher",)).teacher_log_p, view.log_p)


def test_dcn_running_means_are_those_of_one_row_after_the_other() -> None:
    model = model_of("dcn")
    x = torch.randn(B, J)
    view = model.view(x, ("codes", "energies"))
    centroids = model.energy.centroids.detach().clone()  # type: ignore[union-attr]
    counts = torch.full((K,), 100.0)
    for z, k in zip(view.z.detach(), view.energies.argmin(1), strict=True):  # type: ignore[union-attr]
        counts[k] += 1
        centroids[k] += (z - centroids[k]) / counts[k]
    statistic = STATISTICS["running_means"]
    statistic.apply(model, statistic.collect(Scene(model, x, view, {})))
    torch.testing.assert_close(model.energy.centroids.detach(), centroids, atol=1e-6, rtol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(model.cluster_counts.float(), counts)


def test_dkm_at_a_large_alpha_is_dcns_clustering_term() -> None:
    energy = CentroidEnergy(K, J, "squared_euclidean", DissimilarityOptions()).double()
    e = energy.pairwise(torch.randn(B, J, dtype=torch.float64))
    log_p = TiedGate(K, alpha=1e5).double().log_p_of(e)
    torch.testing.assert_close(terms.expected(log_p, e), e.amin(1))


# ---- VaDE


def test_vade_bound_is_the_published_sum() -> None:
    model = model_of("vade").double()
    with torch.no_grad():
        model.energy.log_variances.normal_()  # type: ignore[union-attr]
        model.gate.logits.normal_()  # type: ignore[union-attr, operator]
    x = torch.randn(B, J, dtype=torch.float64)
    phase = METHODS["vade"].phases[-1]
    noise = Noise(0, 0, [0], [B], "cpu")
    scene = model.scene(x, phase, {}, noise)
    found = value("free", scene) + value("variational_entropy", scene)
    m, log_v = scene.view.layers["mean"], scene.view.layers["log_variance"]
    mu, log_s2 = model.energy.centroids, model.energy.log_variances  # type: ignore[union-attr]
    log_pi = torch.log_softmax(model.gate.logits, 0)  # type: ignore[union-attr, arg-type]
    z = scene.view.z
    normal = -0.5 * (math.log(2 * math.pi) + log_s2 + (z[:, None] - mu).square() / log_s2.exp()).sum(2)  # type: ignore[index]
    gamma = torch.softmax(log_pi + normal, 1)
    nll = 0.5 * (
        math.log(2 * math.pi) + log_s2 + (log_v.exp()[:, None] + (m[:, None] - mu).square()) / log_s2.exp()
    )
    published = (
        (gamma * nll.sum(2)).sum(1)
        - 0.5 * (1 + log_v).sum(1)
        - (gamma * log_pi).sum(1)
        + (gamma * gamma.log()).sum(1)
    )
    torch.testing.assert_close(found, published - 0.5 * J * math.log(2 * math.pi), atol=1e-5, rtol=1e-5)


def test_gaussian_energy_is_the_negative_log_likelihood() -> None:
    energy = GaussianEnergy(K, J).double()
    energy.log_variances.data.normal_()
    z = torch.randn(B, J, dtype=torch.float64)
    for k in range(K):
        normal = torch.distributions.Normal(energy.centroids[k], (0.5 * energy.log_variances[k]).exp())
        torch.testing.assert_close(energy.pairwise(z)[:, k], -normal.log_prob(z).sum(1))


# ---- what a row is refused, and what it keeps


def test_a_balance_that_nothing_would_use_is_refused() -> None:
    with pytest.raises(ValueError, match="lse_clean_teacher.*damic-text"):
        model_of("damic", balance=1.0).method.check_training(4)


def test_a_floor_that_nothing_would_use_is_refused() -> None:
    with pytest.raises(ValueError, match="usage_floor is 0.1, and no phase counts"):
        model_of("damic-text", usage_floor=0.1).method.check_training(4)
    for name in ("self-training", "dec", "damic-consolidated", "damic-sharp"):
        model_of(name, usage_floor=0.1).method.check_training(4)


def test_batch_norm_of_a_frozen_network_keeps_its_running_values() -> None:
    """The experts' phase must see the pseudo-labels that k-means made."""
    model = model_of("damic", norm="batch")
    phase = next(p for p in METHODS["damic"].phases if p.name == "experts")
    assert "batch_norm" not in model.method.statistics_of(phase)
    x, noise = torch.randn(B, J), Noise(0, 0, [0, 1], [B // 2, B // 2], "cpu")
    labels = model.scene(x, phase, {}, noise).view.pseudo_labels
    assert torch.equal(labels, model.pseudo_labels(x))  # type: ignore[arg-type]
    norms = [m for m in model.modules() if isinstance(m, LaneBatchNorm)]
    assert norms
    assert not any(m.seen for m in norms)
    model.scene(x, METHODS["damic"].phases[0], {}, noise)
    assert all(m.seen for m in model.network.encoder.norms)


@pytest.mark.parametrize("image", [{}, {"image": (1, 12, 12), "conv": ((4, 5, 1, 2), (6, 3, 1, 1))}])
def test_batch_norm_of_a_decoder_is_by_lanes_too(image: dict[str, Any]) -> None:
    """The terms that decode run after the encoder's pass, and normalise as it does."""
    d = 144 if image else J
    model = model_of("aljalbout", d, hidden=(8, 5), norm="batch", **image)
    phase = METHODS["aljalbout"].phases[0]
    x, halves = torch.rand(B, d), Noise(0, 0, [0, 1], [B // 2, B // 2], "cpu")
    scene, values = model.loss_terms(x, phase, {}, halves)
    norms = {n: m for n, m in model.trained_modules() if isinstance(m, LaneBatchNorm)}
    assert len(norms) >= 4 - bool(image)
    assert all(len(m.seen) == 1 for m in norms.values()), [n for n, m in norms.items() if len(m.seen) != 1]
    parts = [
        model.loss_terms(x[at : at + B // 2], phase, {}, Noise(0, 0, [0], [B // 2], "cpu"))[1]
        for at in (0, B // 2)
    ]
    for name, together in values.items():
        torch.testing.assert_close(together, torch.cat([part[name] for part in parts]))
    STATISTICS["batch_norm"].apply(model, STATISTICS["batch_norm"].collect(scene))
    for norm in norms.values():
        assert bool((norm.running_mean != 0).any())
    assert model.lanes.counts is None  # nothing is normalised by lanes outside a step


@pytest.mark.parametrize(
    ("method", "part", "function", "times"),
    [
        ("depict", "network", "encode_with_layers", 2),  # disturbed and undisturbed
        ("mixae", "experts", "_first", 1),
    ],
)
def test_nothing_is_computed_twice_in_a_step(method: str, part: str, function: str, times: int) -> None:
    model = model_of(method, conv=())
    owner, calls = getattr(model, part), []
    original = getattr(owner, function)
    setattr(owner, function, lambda *given: (calls.append(1), original(*given))[1])
    phase = METHODS[method].phases[-1]
    view = model.scene(torch.randn(B, J), phase, {}, Noise(0, 0, [0], [B], "cpu")).view
    assert view.log_p is not None
    assert len(calls) == times


# ---- traps that the reference names


def test_a_precision_shrinks_without_its_determinant_and_does_not_with_it() -> None:
    """MIX with a free precision can always fall by making it smaller; the log-determinant stops that."""
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for log_det in (0.0, 1.0):
        torch.manual_seed(0)
        energy = CentroidEnergy(1, 3, "mahalanobis", DissimilarityOptions(), log_det)
        optimizer = torch.optim.Adam(energy.parameters(), lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            energy.pairwise(z).mean().backward()
            optimizer.step()
        sizes[log_det] = float(energy.factors.detach().abs().max())  # type: ignore[union-attr]
    assert sizes[0.0] < 0.05
    assert sizes[1.0] > 0.5


def test_an_empty_cluster_stays_where_it_is_and_is_not_made_nan() -> None:
    model = model_of("aljalbout-kmeans", norm="none", conv=())
    far = torch.full((J,), 1e3)
    model.energy.centroids.data[0] = far  # type: ignore[union-attr]
    x = torch.randn(B, J)
    statistic = STATISTICS["recentre"]
    statistic.apply(model, statistic.collect(Scene(model, x, model.view(x, statistic.needs), {})))
    assert torch.equal(model.energy.centroids[0].detach(), far)  # type: ignore[union-attr]
    assert torch.isfinite(model.energy.centroids).all()  # type: ignore[union-attr]


def test_balance_correction_divides_the_gate_by_the_frequencies() -> None:
    log_p = torch.log_softmax(torch.randn(B, K), 1)
    energies, f = torch.rand(B, K), torch.tensor([60.0, 20.0, 15.0, 5.0])
    view = View(energies=energies, log_p=log_p.clone().requires_grad_(), clean_log_p=log_p)
    grads = []
    for eta in (0.0, 1.0):
        model = model_of("damic-text", balance=eta)
        scene = scene_of(model, view, gate_usage=f)
        grads.append(torch.autograd.grad(value("lse_clean_teacher", scene).sum(), view.log_p)[0])  # type: ignore[arg-type]
        w = torch.softmax(log_p - eta * f.log() - energies / model.tau, 1)
        torch.testing.assert_close(grads[-1], -model.tau * w)
    assert float(-grads[1][:, 0].sum()) < float(-grads[0][:, 0].sum())  # the big cluster teaches less


def test_a_sharpened_teacher_is_self_training_where_the_experts_say_nothing() -> None:
    log_p = torch.log_softmax(torch.randn(B, K), 1)
    f = torch.tensor([60.0, 20.0, 15.0, 5.0])
    view = View(energies=torch.rand(B, K), log_p=log_p.clone().requires_grad_(), clean_log_p=log_p)
    model = model_of("damic-sharp")
    for tau in (0.2, 1e9):
        model.tau.fill_(tau)
        loss = value("lse_clean_teacher", scene_of(model, view, gate_usage=f)).sum()
        taught = torch.autograd.grad(loss, view.log_p)[0]  # type: ignore[arg-type]
        assert view.energies is not None
        t = (log_p - view.energies / tau).exp().square() / f
        torch.testing.assert_close(taught / -tau, t / t.sum(1, keepdim=True))
    alone = value("target_clean", scene_of(model_of("self-training"), view, gate_usage=f)).sum()
    torch.testing.assert_close(taught / tau, torch.autograd.grad(alone, view.log_p)[0])  # type: ignore[arg-type]


def test_consolidation_teaches_the_gate_what_the_sharpened_responsibilities_say() -> None:
    log_p = torch.log_softmax(torch.randn(B, K), 1)
    f = torch.tensor([60.0, 20.0, 15.0, 5.0])
    energies = torch.rand(B, K, requires_grad=True)
    view = View(energies=energies, log_p=log_p.clone().requires_grad_(), clean_log_p=log_p.flip(0))
    model = model_of("damic-consolidated")
    model.tau.fill_(0.3)
    loss = value("target_responsibility", scene_of(model, view, gate_usage=f))
    t = (log_p.flip(0) - energies.detach() / 0.3).exp().square() / f
    t = t / t.sum(1, keepdim=True)
    torch.testing.assert_close(loss, (t * (t.log() - log_p)).sum(1))
    (taught,) = torch.autograd.grad(loss.sum(), view.log_p, retain_graph=True)  # type: ignore[arg-type]
    torch.testing.assert_close(taught, -t)
    # the experts are evidence, and learn nothing from it
    assert torch.autograd.grad(loss.sum(), energies, allow_unused=True)[0] is None


def test_a_decoder_of_unit_codes_sees_what_the_energies_see() -> None:
    """Their directions alone. A decoder of the codes as they are can take back a move of all of them, which
    draws them together on the unit sphere."""
    model = model_of("dmae-exp", hidden=(8,), code_size=J)
    model.code_radius.fill_(1.5)
    x, z = torch.rand(B, J), torch.randn(B, J)
    moved = z + 50.0 * torch.eye(J)[0]

    def errors(codes: Tensor) -> tuple[float, ...]:
        scene = Scene(model, x, View(z=codes), {})
        with torch.no_grad():
            return tuple(
                float(value(name, scene).mean()) for name in ("reconstruction", "unit_reconstruction")
            )

    at_length = 1.5 * z / z.norm(dim=1, keepdim=True)
    assert errors(z)[1] == pytest.approx(errors(at_length)[0], rel=1e-5)
    assert errors(3.0 * z)[1] == pytest.approx(errors(z)[1], rel=1e-5)
    first, before = model.network.decoder.layers[0], errors(z)
    with torch.no_grad():
        first.bias -= 50.0 * first.weight[0]
    assert errors(moved)[0] == pytest.approx(before[0], rel=1e-3)
    assert errors(moved)[1] != pytest.approx(before[1], rel=1e-2)


# ---- networks and experts


def test_low_rank_experts_are_the_distance_to_a_principal_subspace() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, J)
    experts = LowRankExperts(J, 1, 2)
    pca = PCA(2).fit(x.numpy())
    experts.means.data.copy_(torch.tensor(pca.mean_)[:, None])
    experts.directions.data.copy_(
        torch.tensor(pca.components_.T)[None] * 3.0
    )  # not of length 1: QR makes them so
    back = pca.inverse_transform(pca.transform(x.numpy()))
    np.testing.assert_allclose(
        experts.errors(x)[:, 0].detach().numpy(), ((x.numpy() - back) ** 2).sum(1), atol=1e-4
    )


def test_batch_norm_by_lanes_is_batch_norm_of_each_lane() -> None:
    lanes = Lanes()
    norm = LaneBatchNorm(5, lanes)
    x = torch.randn(11, 5, 3, 3)
    lanes.counts = (4, 0, 7)
    found = norm(x)
    reference = torch.nn.BatchNorm2d(5)
    parts = [reference(part) for part in (x[:4], x[4:])]
    torch.testing.assert_close(found, torch.cat(parts), atol=1e-5, rtol=1e-4)
    norm.update(*norm.sums())
    expected = 0.1 * (4 * x[:4].mean((0, 2, 3)) + 7 * x[4:].mean((0, 2, 3))) / 11
    torch.testing.assert_close(norm.running_mean, expected, atol=1e-5, rtol=1e-4)
    lanes.counts = None
    torch.testing.assert_close(norm(x[:3]), norm(x)[:3])  # running values: no row depends on another


IMAGE = ModelSettings(
    image=(1, 12, 12), conv=((4, 5, 1, 2), (6, 3, 2, 1)), code_size=5, activation="elu", output="sigmoid"
)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_convolutional_autoencoder_comes_back_to_the_size_it_began_with(padding: str) -> None:
    torch.manual_seed(0)
    net = ConvolutionalAutoencoder(dataclasses.replace(IMAGE, conv_padding=padding))
    x = torch.rand(7, 144)
    z, layers = net.encode_with_layers(x)
    assert z.shape == (7, 5)
    error = net.recon_error(z, x, layers)
    y = net._maps(z, layers)[-1].flatten(1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(y, x, reduction="none").sum(1)
    torch.testing.assert_close(error, expected)
    assert net.decode(z).shape == (7, 144)  # without the encoder's switches too
    assert net.layer_errors(z, layers).shape == (7,)


def test_cross_entropy_of_sparse_rows_is_that_of_dense_ones() -> None:
    from distclust.mixture.sparse import SparseRows

    x = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    sparse = SparseRows(torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0]), torch.tensor([1.0, 0.5]), 3)
    h, w, b = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(h @ w.t() + b, x, reduction="none").sum(1)
    torch.testing.assert_close(cross_entropy(x, h, w, b), expected)
    torch.testing.assert_close(cross_entropy(sparse, h, w, b), expected)


def test_the_frequency_of_a_dying_cluster_has_a_floor() -> None:
    """A target is of the gate as it is, f of the last count."""
    usage = torch.tensor([80.0, 20.0, 1e-4, 0.0], dtype=torch.float64)
    for floor, least in ((0.0, 1e-12), (0.1, 0.1 * 100 / 4)):
        totals = {"gate_usage": usage.clone()}
        STATISTICS["gate_usage"].apply(model_of("self-training", usage_floor=floor), totals)
        expected = torch.tensor([80.0, 20.0, max(1e-4, least), least])
        torch.testing.assert_close(totals["gate_usage"], expected.float())
    # a row of which the dying cluster has a hundredth: without a floor all of it is to be that cluster's
    log_p = torch.tensor([[0.69, 0.3, 0.01, 1e-9]]).log()
    drawn = terms.sharpened_target(log_p, usage.clamp_min(1e-12).float().log(), 2.0, 1.0).exp()
    assert drawn[0, 2] > 0.9
    kept = terms.sharpened_target(log_p, totals["gate_usage"].log(), 2.0, 1.0).exp()
    assert kept[0, 2] < 0.01
