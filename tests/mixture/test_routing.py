"""Rows that ask some of the experts: the same numbers as asking all, and what leaving experts out costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import runs
from corpora import make_corpus
from distclust.config import resolve
from distclust.corpus.shards import Corpus
from distclust.errors import ConfigError
from distclust.mixture.diagnostics import diagnostics
from distclust.mixture.experts import AutoencoderExperts
from distclust.mixture.methods import METHODS
from distclust.mixture.model import MixtureModel
from distclust.mixture.noise import Noise
from distclust.mixture.routing import LEFT_OUT, Routes, asked_by, worst_case
from distclust.mixture.settings import Phase
from distclust.mixture.sparse import Rows, SparseRows
from distclust.mixture.terms import Scene, lse
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.hooks import NoHooks, Position
from distclust.training.world import World

B, D, K = 60, 40, 7


def sparse_rows(dtype: torch.dtype, rows: int = B) -> SparseRows:
    """Rows of 0 to 9 non-zeros."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 10, (rows,), generator=generator)
    columns = [torch.randperm(D, generator=generator)[:n].sort().values for n in counts.tolist()]
    values = torch.rand(int(counts.sum()), generator=generator, dtype=dtype)
    return SparseRows(
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]), torch.cat(columns), values, D
    )


def soft_gate(dtype: torch.dtype = torch.float64, rows: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.log_softmax(3.0 * torch.randn(rows, K, dtype=dtype, generator=generator), dim=1)


def gradients(value: Tensor, module: torch.nn.Module) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(module.parameters()))
    return {name: grad for (name, _), grad in zip(module.named_parameters(), found, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("rows", [B, 600])  # few rows an expert: dense inside; many: the Gram form
def test_pairs_have_the_errors_and_gradients_of_all_experts(
    dtype: torch.dtype, norm: str, form: str, rows: int
) -> None:
    torch.manual_seed(0)
    experts = AutoencoderExperts(D, K, [9], 4, norm=norm).to(dtype)
    x: Rows = sparse_rows(dtype, rows)
    x = x.to_dense() if form == "dense" and isinstance(x, SparseRows) else x
    asked = asked_by(soft_gate(dtype, rows), 0.1)
    asked[:, 3] = False  # an expert that nobody asks
    routes = Routes.of(asked)
    weights = torch.linspace(0.5, 2.0, routes.rows.shape[0], dtype=dtype)
    every = experts.errors(x)[routes.rows, routes.experts]
    some = experts.errors_of(x, routes)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(some, every, **close)
    expected, found = gradients((every * weights).sum(), experts), gradients((some * weights).sum(), experts)
    for name in expected:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, **close)
    assert not found["out_weight"][:, 3].any()


def test_who_is_asked() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    assert asked_by(p.log(), 0.1).tolist() == [
        [True, True, True, False],
        [True] * 4,
        [True, False, False, False],
    ]
    assert asked_by(p.log(), 0.6).sum(1).tolist() == [1, 4, 1]  # the most probable one always, ties too
    assert asked_by(p.log(), 0.1, limit=2).sum(1).tolist() == [2, 2, 1]


def test_the_objective_is_above_the_full_one_by_no_more_than_the_bound() -> None:
    log_p = soft_gate()
    energies = torch.rand(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 4.0
    for tau in (0.3, 1.0, 5.0):
        for threshold in (1e-12, 0.02, 0.1, 0.5):
            asked = asked_by(log_p, threshold)
            some = torch.where(asked, energies, torch.full_like(energies, LEFT_OUT))
            loss, full = lse(log_p, some, tau), lse(log_p, energies, tau)
            bound = worst_case(log_p, asked, loss, tau)
            assert (loss - full >= -1e-12).all()
            assert (loss - full <= bound + 1e-12).all()
            if threshold == 1e-12:
                assert asked.all()
                assert torch.equal(loss, full)
                assert not bound.any()
            else:
                assert (bound[~asked.all(1)] > 0).all()
    # the bound is reached where the experts that were left out have no error
    energies[~asked] = 0.0
    torch.testing.assert_close(worst_case(log_p, asked, loss, tau), loss - lse(log_p, energies, tau))


def small_model(method: str, **settings: Any) -> MixtureModel:
    torch.manual_seed(0)
    row = METHODS[method]
    sizes: dict[str, Any] = {"hidden": (8,), "code_size": 6, "expert_hidden": (5,), "gate_hidden": (7,)}
    changed = dataclasses.replace(row.settings, **(sizes | settings))
    return MixtureModel(dataclasses.replace(row, settings=changed), changed, D, K).double()


def phase_of(model: MixtureModel, name: str) -> Phase:
    return next(phase for phase in model.method.phases if phase.name == name)


def scene_of(model: MixtureModel, x: Rows, phase: str) -> Scene:
    return model.scene(x, phase_of(model, phase), {}, Noise(0, 0, [0], [B], "cpu"))


def test_an_experts_phase_asks_each_rows_own_expert_and_changes_nothing() -> None:
    x, model = sparse_rows(torch.float64), small_model("damic")
    model.pseudo_centroids.copy_(model.codes(x)[:K])
    phase = phase_of(model, "experts")
    assert model.asks(phase) == "own"
    scene = scene_of(model, x, "experts")
    own = model.term_values(scene, phase)["pseudo_energy"]
    labels = model.pseudo_labels(x)
    every = model.energies(x, None).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(own, every)
    found, expected = gradients(own.sum(), model.experts), gradients(every.sum(), model.experts)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("space", ["rows", "codes"])
def test_with_all_asked_it_is_damic(space: str) -> None:
    x = sparse_rows(torch.float64)
    full, top = (
        small_model("damic", expert_space=space),
        small_model("damic-topm", expert_space=space, expert_threshold=1e-30),
    )
    top.load_state_dict(full.state_dict())
    losses = []
    for model in (full, top):
        scene = scene_of(model, x, "joint")
        loss = model.term_values(scene, phase_of(model, "joint"))["lse"].mean()
        losses.append((loss, gradients(loss, torch.nn.ModuleList([model.experts, model.gate]))))
    torch.testing.assert_close(losses[0], losses[1])
    assert full.asks(phase_of(full, "joint")) == "all"


def test_the_work_follows_the_pairs_and_not_the_number_of_experts() -> None:
    """Multiplications of the dense products, counted; the pairs are the same 100 rows' own experts."""
    rows = torch.rand(100, D)
    counts = {}
    for k in (10, 100):
        experts = AutoencoderExperts(D, k, [9], 4)
        routes = Routes.to_own(torch.arange(100) % k, k)
        for name in ("some", "all"):
            with FlopCounterMode(display=False) as counter:
                (experts.errors_of(rows, routes) if name == "some" else experts.errors(rows)).sum().backward()
            counts[name, k] = counter.get_total_flops()
    assert counts["some", 100] == counts["some", 10]
    assert counts["all", 100] == 10 * counts["all", 10]
    assert counts["all", 10] > 8 * counts["some", 10]  # the backward of some makes their residuals again


@pytest.mark.parametrize("threshold", [1e-30, 0.999])
def test_sums_for_the_log_are_those_of_all_experts(threshold: float) -> None:
    x, model = sparse_rows(torch.float64), small_model("damic-topm", expert_threshold=threshold, tau=3.0)
    scene = scene_of(model, x, "joint")
    sums = diagnostics(scene, 0)
    assert scene.view.log_p is not None
    log_p, energies = scene.view.log_p, model.energies(x, None)
    asked = asked_by(log_p, threshold)
    best = torch.zeros_like(asked).scatter_(1, energies.argmin(1, keepdim=True), True)
    w = (log_p - energies / 3.0).argmax(1, keepdim=True)
    assert int(sums["topm/experts_asked"]) == int(asked.sum())
    assert int(sums["topm_checked/rows"]) == B
    assert int(sums["topm_checked/best_left_out"]) == int((best & ~asked).sum())
    assert int(sums["topm_checked/most_responsible_left_out"]) == B - int(asked.gather(1, w).sum())
    some = torch.where(asked, energies, torch.full_like(energies, LEFT_OUT))
    error = (lse(log_p, some, 3.0) - lse(log_p, energies, 3.0)).sum()
    torch.testing.assert_close(sums["topm_checked/exact_error"], error, atol=1e-9, rtol=1e-6)
    assert bool(error > 0.1) == (threshold > 0.5)


class Log(NoHooks):
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, float]]] = []

    def log(self, position: Position, phase: str, metrics: dict[str, float]) -> None:
        self.lines.append((phase, metrics))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("topm")
    make_corpus(folder / "corpus", shard_rows=runs.SHARD_ROWS, n_features=30)
    config = runs.tiny_config("damic-topm", model={"expert_threshold": 0.34, "expert_check_steps": 3})
    log = Log()
    Trainer(config, Corpus.open(folder / "corpus"), CheckpointStore(folder / "run"), World(), log).run()
    return log.lines


def test_what_leaving_experts_out_costs_is_logged(logged: list[tuple[str, dict[str, float]]]) -> None:
    joint = [metrics for phase, metrics in logged if phase == "joint"]
    assert joint
    assert not any(
        key.startswith("topm/") for phase, metrics in logged if phase != "joint" for key in metrics
    )
    for metrics in joint:
        assert 1.0 <= metrics["topm/experts_asked"] < 3.0
        assert metrics["topm/bound"] >= 0.0
    checked = [metrics for metrics in joint if "topm/exact_error" in metrics]
    assert 0 < len(checked) < len(joint)  # every third step
    for metrics in checked:
        assert -1e-5 <= metrics["topm/exact_error"] <= metrics["topm/bound"] + 1e-5
        assert 0.0 <= metrics["topm/most_responsible_left_out"] <= 1.0
        assert 0.0 <= metrics["topm/best_left_out"] <= 1.0
    assert any(metrics["topm/exact_error"] > 0 for metrics in checked)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("damic-text", {"expert_threshold": 0.01}, "only experts: autoencoder"),
        ("mixae", {"expert_threshold": 0.01}, "gate network"),
        ("damic", {"expert_limit": 2}, "expert_threshold is 0"),
        ("damic", {"expert_threshold": 1.0}, "expert_threshold is .*a share in"),
        ("damic", {"expert_threshold": 0.1, "expert_check_steps": 0}, "at least 1"),
    ],
)
def test_what_cannot_leave_experts_out_is_refused(
    method: str, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve({"method": method, "clusters": 3, "model": settings})


@pytest.mark.parametrize("other", ["exp", "pseudo_energy"])
def test_a_term_that_reads_every_energy_is_refused_beside_it(other: str) -> None:
    phases = {"joint": {"terms": [["lse", 1.0], [other, 1.0]]}}
    with pytest.raises(ConfigError, match=f"leave out {other}"):
        resolve({"method": "damic-topm", "clusters": 3, "phases": phases})
