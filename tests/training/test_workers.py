"""One worker, several workers, resumed workers: the same training.

One process tree runs every row of the table on every world size; the tests read what it left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import runs
from corpora import make_corpus
from distclust.mixture.methods import METHODS

CHANGES: dict[str, dict[str, Any]] = {
    "dmae": {"model": {"alpha": 5.0}},
    "ae-dmm": {"model": {"alpha": 5.0}},
    "dmm": {"model": {"alpha": 5.0}},
    "dkm": {"model": {"alpha": 5.0}},
    # precisions of 61 rows are large: at 0.01 rounding errors grow from step to step
    "dmae-text": {"model": {"dissimilarity": "mahalanobis"}, "learning_rate": 0.001},
    "dmae-lse": {"learning_rate": 0.001},
    "dmae-spectral": {"learning_rate": 0.001},
    "vade": {"learning_rate": 0.001},
}
"""Changes of a row's configuration."""
ROWS = tuple(METHODS)
KILLED_EVERYWHERE = ("damic", "damic-text", "dmae", "dmae-text")
"""Rows that lose a worker in each phase on 1, 2 and 3 workers."""
KILLED = ("damic-consolidated", "idec", "dcn", "ae-cm", "aljalbout", "vade", "bregman")
"""Rows with other state (target, teacher, running means, weight average, batch norm, EM): one of two is
lost."""
STEPS = 8
"""Two epochs of four steps a phase."""
Job = dict[str, Any]


def trained_phases(method: str) -> list[str]:
    return [p.name for p in METHODS[method].phases if p.epochs]


def total_steps(method: str) -> int:
    """Steps of all phases; an epoch without an optimiser counts as one."""
    return sum(2 if p.by_sweeps else STEPS for p in METHODS[method].phases if p.epochs)


def worlds_of(method: str) -> tuple[int, ...]:
    return (1, 2, 3) if method in KILLED_EVERYWHERE else (2,) if method in KILLED else ()


def gradient_phases(method: str) -> list[str]:
    """Every phase of the rows that this began with, the last one of the others: the first are the same."""
    found = [p.name for p in METHODS[method].phases if p.epochs and not p.by_sweeps]
    return found if method in KILLED_EVERYWHERE else found[-1:]


class Jobs:
    """All jobs of this file, by what they are for."""

    def __init__(self, folder: Path):
        self.folder, self.corpus = folder, folder / "corpus"
        make_corpus(self.corpus, shard_rows=runs.SHARD_ROWS, n_features=30)
        self.all: list[Job] = []
        self.whole: dict[tuple[str, int], Job] = {}
        self.gradients: dict[tuple[str, str, int], Job] = {}
        self.killed: dict[tuple[str, int], list[Job]] = {}
        self.moved: dict[tuple[str, int], Job] = {}

    def add(self, name: str, method: str, world: int, **more: Any) -> Job:
        changes = {**CHANGES.get(method, {}), **more.pop("changes", {})}
        one = runs.job(
            runs.tiny_config(method, **changes),
            more.pop("corpus", self.corpus),
            self.folder / name,
            world,
            rows=True,
            **more,
        )
        self.all.append(one)
        return one

    def plan(self) -> None:
        for method in ROWS:
            for world in sorted({1, 2, 4, *worlds_of(method)}):
                self.whole[method, world] = self.add(f"{method}-{world}", method, world, together=True)
        for method in ROWS:
            self.plan_gradients(method)
            for world in worlds_of(method):
                self.plan_kills(method, world)
        for method in ("damic-text", "dmae"):
            start = self.add(f"start-{method}", method, 2, stop=total_steps(method) - 2)
            for world in (1, 3):
                name = f"moved-{method}-{world}"
                self.moved[method, world] = self.add(name, method, world, copy=[start["run"], name])
        self.exploding = self.add("exploding", "damic", 2, changes={"learning_rate": 1e30})
        few = self.folder / "few"
        make_corpus(few, shard_rows=(5,), n_features=30)
        self.few = {world: self.add(f"few-{world}", "dec", world, corpus=few) for world in (1, 4)}

    def plan_gradients(self, method: str) -> None:
        """The first step of each phase, on each world size from the same checkpoint."""
        names = [p.name for p in METHODS[method].phases]
        whole = self.whole[method, 1]["run"]
        for phase in gradient_phases(method):
            before = names[names.index(phase) - 1] if phase != names[0] else None
            for world in (1, 2, 4):
                name = f"gradients-{method}-{phase}-{world}"
                more: Job = {"grads": str(self.folder / f"{name}.grads"), "together": True}
                if before is not None:
                    more["copy"] = [f"{whole}/checkpoints/*-after-{before}", f"{name}/checkpoints/"]
                self.gradients[method, phase, world] = self.add(name, method, world, **more)

    def plan_kills(self, method: str, world: int) -> None:
        """SIGKILL of one worker in the middle of each phase, then the same job to its end."""
        name = f"killed-{method}-{world}"
        self.killed[method, world] = []
        for index, name_of_phase in enumerate(trained_phases(method)):
            by_sweeps = next(p for p in METHODS[method].phases if p.name == name_of_phase).by_sweeps
            victim = [index % world, index * STEPS + (1 if by_sweeps else STEPS // 2 + 1)]
            out = str(self.folder / f"{name}-{index}.jsonl")
            self.killed[method, world].append(self.add(name, method, world, kill=victim, out=out))
        self.killed[method, world].append(self.add(name, method, world))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Every job, run once."""
    made = Jobs(tmp_path_factory.mktemp("workers"))
    made.plan()
    runs.run_jobs(made.all, made.folder, expect_success=False)
    return made


def test_every_row_of_the_table_is_here_and_every_job_ended_as_it_should(jobs: Jobs) -> None:
    assert set(CHANGES) | set(KILLED) | set(KILLED_EVERYWHERE) <= set(METHODS)
    for one in jobs.all:
        if "kill" not in one and one is not jobs.exploding:
            assert set(runs.exit_codes(one)) == {0}, (one["run"], runs.exit_codes(one))


@pytest.mark.parametrize("method", ROWS)
def test_losses_do_not_depend_on_the_number_of_workers(jobs: Jobs, method: str) -> None:
    alone = runs.losses(jobs.whole[method, 1])
    assert len(alone) == total_steps(method)
    for world in (2, 4):
        shared = runs.losses(jobs.whole[method, world])
        assert shared.keys() == alone.keys()
        for step in alone:
            assert shared[step]["loss"] == pytest.approx(alone[step]["loss"], rel=2e-3, abs=1e-5), step


def test_the_sequence_of_rows_is_the_same_for_1_2_and_3_workers(jobs: Jobs) -> None:
    alone = runs.row_sequence(jobs.whole["damic-text", 1])
    first_epoch = [row for (step, _), rows in alone.items() if step < STEPS // 2 for row in rows]
    assert sorted(first_epoch) == list(range(61))
    for world in (2, 3, 4):
        assert runs.row_sequence(jobs.whole["damic-text", world]) == alone


@pytest.mark.parametrize("method", ROWS)
def test_gradients_of_every_phase_are_the_same_on_1_2_and_4_workers(jobs: Jobs, method: str) -> None:
    """float32 sums in another order: 1e-4 of the largest entry."""
    for phase in gradient_phases(method):
        alone = load_file(jobs.gradients[method, phase, 1]["grads"])
        assert max(float(g.abs().max()) for g in alone.values()) > 0
        for world in (2, 4):
            shared = load_file(jobs.gradients[method, phase, world]["grads"])
            assert shared.keys() == alone.keys()
            # a bias before a normalisation has no gradient, only rounding errors of the others'
            largest = max(float(g.abs().max()) for g in alone.values())
            for name, expected in alone.items():
                slack = max(1e-4 * float(expected.abs().max()), 1e-6 * largest, 1e-7)
                worst = float((shared[name] - expected).abs().max())
                assert worst <= slack, f"{phase} {name} on {world} workers: {worst} > {slack}"


@pytest.mark.parametrize(("method", "world"), [(m, w) for m in ROWS for w in worlds_of(m)])
def test_killed_in_every_phase_and_resumed_is_equal_to_the_last_bit(
    jobs: Jobs, method: str, world: int
) -> None:
    *killed, last = jobs.killed[method, world]
    for one in killed:
        assert runs.exit_codes(one)[one["kill"][0]] == -9, (one["run"], runs.exit_codes(one))  # it happened
    assert_same_bits(runs.final_weights(last), runs.final_weights(jobs.whole[method, world]))


@pytest.mark.parametrize("method", ["damic-text", "dmae"])
def test_a_checkpoint_of_two_workers_goes_on_with_one_and_three(jobs: Jobs, method: str) -> None:
    expected = runs.final_weights(jobs.whole[method, 2])
    before = runs.row_sequence(jobs.whole[method, 2])
    for world in (1, 3):
        one = jobs.moved[method, world]
        rows = runs.row_sequence(one)
        assert rows
        assert rows.items() <= before.items()
        found = runs.final_weights(one)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_workers_without_a_single_row_take_part(jobs: Jobs) -> None:
    """Five documents in six lanes: with four workers one of them never has a row."""
    alone, shared = (runs.losses(jobs.few[world]) for world in (1, 4))
    assert alone.keys() == shared.keys()
    for step, metrics in alone.items():
        assert shared[step]["loss"] == pytest.approx(metrics["loss"], rel=2e-3, abs=1e-5)


def test_a_loss_that_explodes_stops_all_workers_with_the_reason(jobs: Jobs) -> None:
    one = jobs.exploding
    assert runs.exit_codes(one) == [3, 3]
    for rank in (0, 1):
        reason = Path(f"{one['out']}.error-{rank}").read_text()
        assert "not finite at step" in reason
        assert "phase pretrain" in reason
        # what the error keeps alive of DDP may hang the worker as it ends: see world.reducer_freed_first
        assert Path(f"{one['out']}.reducers-{rank}").read_text() == "0"


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
