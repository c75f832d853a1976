"""One worker, several workers, resumed workers: the same training. One process tree runs every method on
every world size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from corpora import make_corpus
from safetensors.torch import load_file

from distclust.mixture.methods import METHODS

ROWS: dict[str, dict[str, Any]] = {
    "damic": {},
    "damic-text": {},
    "dmae": {"model": {"alpha": 5.0}},
    # precisions of 61 rows are large: at 0.01 rounding errors grow from step to step
    "dmae-text": {"model": {"dissimilarity": "mahalanobis"}, "learning_rate": 0.001},
}
"""Every row of the table, with changes of its configuration."""
Runs = dict[tuple[str, str], dict[str, Any]]


def trained_phases(method: str) -> list[str]:
    return [p.name for p in METHODS[method].phases if p.epochs]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, shard_rows=runs.SHARD_ROWS, n_features=30)
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every method, uninterrupted, on 1, 2 and 3 workers."""
    folder = tmp_path_factory.mktemp("whole")
    jobs: Runs = {}
    for method, changes in ROWS.items():
        for world in (1, 2, 3):
            run = folder / f"{method}-{world}"
            jobs[method, str(world)] = runs.job(
                runs.tiny_config(method, **changes), corpus, run, world, rows=method == "damic-text"
            )
    runs.run_jobs(list(jobs.values()), folder)
    return jobs


def test_every_row_of_the_table_is_here() -> None:
    assert set(ROWS) == set(METHODS)


@pytest.mark.parametrize("method", ROWS)
def test_losses_do_not_depend_on_the_number_of_workers(whole: Runs, method: str) -> None:
    alone = runs.losses(whole[method, "1"])
    assert len(alone) > 10
    for world in "23":
        shared = runs.losses(whole[method, world])
        assert shared.keys() == alone.keys()
        for step in alone:
            assert shared[step]["loss"] == pytest.approx(alone[step]["loss"], rel=2e-3, abs=1e-5), step


def test_the_sequence_of_rows_is_the_same_for_1_2_and_3_workers(whole: Runs) -> None:
    alone = runs.row_sequence(whole["damic-text", "1"])
    assert sum(len(v) for (step, _), v in alone.items() if step < 4) == 61  # each row once in the first epoch
    for world in "23":
        assert runs.row_sequence(whole["damic-text", world]) == alone


@pytest.mark.parametrize("method", ROWS)
def test_gradients_of_every_phase_are_the_same_on_1_2_and_4_workers(
    whole: Runs, corpus: Path, tmp_path: Path, method: str
) -> None:
    """From the same checkpoint, the first step of each phase; float32 sums in another order, so 1e-4
    relative."""
    config = runs.tiny_config(method, **ROWS[method])
    kept = sorted(Path(whole[method, "1"]["run"], "checkpoints").glob("*-after-*"))
    starts: dict[str, Path | None] = {"pretrain": None}
    names = [p.name for p in METHODS[method].phases]
    for folder in kept:
        done = folder.name.split("-after-")[1]
        following = names[names.index(done) + 1 :]
        if following:
            starts[following[0]] = folder
    jobs = []
    for phase in trained_phases(method):
        for world in (1, 2, 4):
            run = tmp_path / f"{phase}-{world}"
            start = starts[phase]
            if start is not None:
                shutil.copytree(start, run / "checkpoints" / start.name)
            jobs.append(runs.job(config, corpus, run, world, grads=str(run) + ".grads"))
    runs.run_jobs(jobs, tmp_path)
    for phase in trained_phases(method):
        alone = load_file(tmp_path / f"{phase}-1.grads")
        assert max(float(g.abs().max()) for g in alone.values()) > 0
        for world in (2, 4):
            shared = load_file(tmp_path / f"{phase}-{world}.grads")
            for name, expected in alone.items():
                scale = float(expected.abs().max())
                torch.testing.assert_close(
                    shared[name],
                    expected,
                    rtol=1e-4,
                    atol=max(1e-4 * scale, 1e-7),
                    msg=lambda m, where=f"{phase} {name}": f"{where}: {m}",
                )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_killed_in_every_phase_and_resumed_is_equal_to_the_last_bit(
    whole: Runs, corpus: Path, tmp_path: Path, world: int
) -> None:
    """SIGKILL of one worker, once in the middle of each phase of each method, then the same job again."""
    jobs, finals = [], []
    for method, changes in ROWS.items():
        config = runs.tiny_config(method, **changes)
        run = tmp_path / f"{method}-{world}"
        steps = len(runs.losses(whole[method, "1"]))
        per_phase = steps // len(trained_phases(method))
        for index in range(len(trained_phases(method))):
            victim = [index % world, index * per_phase + per_phase // 2 + 1]
            jobs.append(runs.job(config, corpus, run, world, kill=victim, out=f"{run}-{index}.jsonl"))
        finals.append((method, runs.job(config, corpus, run, world)))
        jobs.append(finals[-1][1])
    runs.run_jobs(jobs, tmp_path, expect_success=False)
    for one in jobs:
        codes = runs.exit_codes(one)
        if "kill" in one:
            assert codes[one["kill"][0]] == -9, (one["run"], codes)  # the kill happened
        else:
            assert set(codes) == {0}, (one["run"], codes)
    for method, final in finals:
        expected, found = runs.final_weights(whole[method, str(world)]), runs.final_weights(final)
        assert expected.keys() == found.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), (method, name)


def test_resumed_at_every_step_sees_the_same_rows_and_ends_the_same(
    whole: Runs, corpus: Path, tmp_path: Path
) -> None:
    config = runs.tiny_config("damic-text", checkpoint={"every_steps": 1, "keep": 1})
    run = tmp_path / "run"
    steps = len(runs.losses(whole["damic-text", "1"]))
    jobs = [runs.job(config, corpus, run, 1, stop=s, rows=True) for s in range(1, steps + 1)]
    jobs.append(runs.job(config, corpus, run, 1, rows=True))
    runs.run_jobs(jobs, tmp_path)
    assert runs.row_sequence(jobs[-1]) == runs.row_sequence(whole["damic-text", "1"])
    found, expected = runs.final_weights(jobs[-1]), runs.final_weights(whole["damic-text", "1"])
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("method", ["damic-text", "dmae"])
def test_a_checkpoint_of_two_workers_goes_on_with_one_and_three(
    whole: Runs, corpus: Path, tmp_path: Path, method: str
) -> None:
    config = runs.tiny_config(method, **ROWS[method])
    steps = len(runs.losses(whole[method, "1"]))
    start = runs.job(config, corpus, tmp_path / "start", 2, stop=steps - 2)
    runs.run_jobs([start], tmp_path)
    jobs = []
    for world in (1, 3):
        shutil.copytree(start["run"], tmp_path / f"on-{world}")
        jobs.append(runs.job(config, corpus, tmp_path / f"on-{world}", world))
    runs.run_jobs(jobs, tmp_path, name="on")
    expected = runs.final_weights(whole[method, "2"])
    for one in jobs:
        found = runs.final_weights(one)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_a_loss_that_explodes_stops_all_workers_with_the_reason(corpus: Path, tmp_path: Path) -> None:
    config = runs.tiny_config("damic", learning_rate=1e30)
    one = runs.job(config, corpus, tmp_path / "run", 2)
    runs.run_jobs([one], tmp_path, expect_success=False)
    assert runs.exit_codes(one) == [3, 3]
    for rank in (0, 1):
        reason = Path(f"{one['out']}.error-{rank}").read_text()
        assert "not finite at step" in reason
        assert "phase pretrain" in reason
