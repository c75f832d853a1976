"""What changes from epoch to epoch: refreshes, the stop rule, annealing, step sizes, the mean of weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from corpora import make_corpus
from distclust.corpus.shards import Corpus
from distclust.mixture.settings import Phase
from distclust.training.checkpoint import CheckpointStore
from distclust.training.engine import Trainer
from distclust.training.hooks import NoHooks, Position
from distclust.training.schedules import dkm_alpha
from distclust.training.world import World

STEPS = 4
"""Steps of an epoch."""


class Watch(NoHooks):
    """Looks at the trainer after each step; stops after one when told."""

    def __init__(self, look: Any = lambda trainer: None, stop: int | None = None):
        self.look, self.stop = look, stop
        self.seen: list[Any] = []
        self.phases: dict[str, int] = {}
        self.trainer: Trainer

    def log(self, position: Position, phase: str, metrics: dict[str, float]) -> None:
        self.phases[phase] = self.phases.get(phase, 0) + 1

    def after_step(self, position: Position) -> None:
        self.seen.append(self.look(self.trainer))
        if position.global_step == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus", shard_rows=runs.SHARD_ROWS, n_features=30)


def run(corpus: Corpus, folder: Path, method: str, watch: Watch, **changes: Any) -> Trainer:
    config = runs.tiny_config(method, **changes)
    watch.trainer = Trainer(config, corpus, CheckpointStore(str(folder / "checkpoints")), World(), watch)
    watch.trainer.run()
    return watch.trainer


def phases(method: str, **joint: Any) -> dict[str, Any]:
    from distclust.mixture.methods import METHODS

    fast = {"epochs": 2, "optimizer": {"name": "adam", "learning_rate": 0.01}}
    found: dict[str, Any] = {p.name: fast for p in METHODS[method].phases if p.epochs}
    found["joint"] = {**fast, **joint}
    return found


def test_a_phase_ends_when_its_labels_have_settled_and_a_resumed_one_at_the_same_step(
    corpus: Corpus, tmp_path: Path
) -> None:
    settled = phases("dec", epochs=6, refresh_steps=3, stop_label_change=0.999)
    whole = Watch()
    trainer = run(corpus, tmp_path / "whole", "dec", whole, phases=settled)
    # the refresh before the first step has nothing to compare with; the one after three steps ends it
    assert whole.phases["joint"] == 3
    cut = Watch(stop=2 * STEPS + 2)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "cut", "dec", cut, phases=settled)
    again = run(corpus, tmp_path / "cut", "dec", Watch(), phases=settled)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name

    restless = Watch()
    run(corpus, tmp_path / "restless", "dec", restless, phases=phases("dec", epochs=6, refresh_steps=3))
    assert restless.phases["joint"] == 6 * STEPS


def test_the_target_is_of_the_last_refresh_and_not_of_today(corpus: Corpus, tmp_path: Path) -> None:
    def look(trainer: Trainer) -> Any:
        return (
            trainer.model.teacher["energy"].centroids.clone() if hasattr(trainer.model, "teacher") else None
        )

    watch = Watch(look)
    run(corpus, tmp_path, "dec", watch, phases=phases("dec", epochs=2, refresh_steps=3))
    teachers = watch.seen[2 * STEPS :]
    changed = [not torch.equal(a, b) for a, b in zip(teachers[:-1], teachers[1:], strict=True)]
    assert changed == [False, False, True, False, False, True, False]


def test_dkm_anneals_by_its_schedule(corpus: Corpus, tmp_path: Path) -> None:
    assert dkm_alpha(1) == 0.1
    assert dkm_alpha(2) == pytest.approx(0.1 * 2 ** (1 / 0.6931472**2), rel=1e-5)
    assert dkm_alpha(40) > dkm_alpha(39) > 1
    watch = Watch(lambda trainer: float(trainer.model.gate.alpha))
    run(corpus, tmp_path, "dkm-annealed", watch, phases={"joint": {"epochs": 4, "anneal_epochs": 2}})
    expected = [dkm_alpha(1)] * 2 * STEPS + [dkm_alpha(2)] * 2 * STEPS
    assert watch.seen == pytest.approx(expected)


def test_a_row_measures_its_temperature_where_it_is_told_to(corpus: Corpus, tmp_path: Path) -> None:
    watch = Watch(lambda trainer: float(trainer.model.tau))
    changes = phases("damic", begin=["temperature"])
    run(corpus, tmp_path, "damic", watch, phases=changes, model={"tau_spread": 0.5})
    joint = watch.seen[-STEPS * changes["joint"]["epochs"] :]
    assert watch.seen[0] == 1.0 and len(set(joint)) == 1 and joint[0] not in (0.0, 1.0)


def test_tau_falls_to_its_value(corpus: Corpus, tmp_path: Path) -> None:
    watch = Watch(lambda trainer: float(trainer.model.tau / trainer.model.base_tau))
    changes = phases("damic-annealed", epochs=3, anneal_from=4.0)
    trainer = run(corpus, tmp_path, "damic-annealed", watch, phases=changes)
    assert watch.seen[-3 * STEPS :: STEPS] == pytest.approx([4.0, 2.0, 1.0])
    assert float(trainer.model.base_tau) != 1.0  # measured, not the default


def test_a_phase_may_be_hotter_than_the_others(corpus: Corpus, tmp_path: Path) -> None:
    watch = Watch(lambda trainer: float(trainer.model.tau / trainer.model.base_tau))
    changes = phases("damic-consolidated", epochs=2) | {"consolidate": {"epochs": 2, "tau_factor": 5.0}}
    run(corpus, tmp_path, "damic-consolidated", watch, phases=changes)
    assert watch.seen[-4 * STEPS :] == pytest.approx([1.0] * 2 * STEPS + [5.0] * 2 * STEPS)
    for factor in (0, float("inf")):
        with pytest.raises(ValueError, match=r"phases\.hot\.tau_factor is \w+; expected a finite number"):
            Phase(name="hot", epochs=0, tau_factor=factor)
    # of a phase by EM, too
    em = Watch(lambda trainer: float(trainer.model.tau))
    run(corpus, tmp_path / "em", "bregman", em, phases={"em": {"epochs": 2, "tau_factor": 5.0}})
    assert em.seen == [5.0, 5.0]


def test_a_phase_that_decays_uses_the_epochs_step_size(corpus: Corpus, tmp_path: Path) -> None:
    watch = Watch(lambda trainer: trainer.optimizer.param_groups[0]["lr"])
    optimizer = {"learning_rate": 0.01, "decay": 0.5, "decay_epochs": 1, "floor": 0.004}
    run(corpus, tmp_path, "damic-joint", watch, phases={"joint": {"epochs": 3, "optimizer": optimizer}})
    assert watch.seen[::STEPS] == pytest.approx([0.01, 0.005, 0.004])


def test_the_weights_become_their_mean_over_the_last_epoch(corpus: Corpus, tmp_path: Path) -> None:
    watch = Watch(lambda trainer: trainer.model.energy.centroids.detach().clone())
    trainer = run(corpus, tmp_path, "cm", watch)
    assert len(watch.seen) == 2 * STEPS
    expected = torch.stack(watch.seen[STEPS:]).mean(0)
    torch.testing.assert_close(trainer.model.energy.centroids.detach(), expected)
    assert not torch.allclose(expected, watch.seen[-1])


def test_a_soft_gate_under_mix_is_warned_of_once(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(corpus, tmp_path / "soft", "dmae", Watch(), model={"alpha": 0.1})
        soft = [r for r in caplog.records if "a soft gate gives MIX" in r.message]
        assert len(soft) == 1
        caplog.clear()
        run(corpus, tmp_path / "sharp", "dmae", Watch(), model={"alpha": 1e5})
        assert not [r for r in caplog.records if "a soft gate gives MIX" in r.message]
