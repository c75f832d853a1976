"""Training under Ray on one machine: the same as without, killed workers, errors that end it, resources that
are not there."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from distclust.config import ClusterConfig, RunConfig
from distclust.corpus.shards import Corpus
from distclust.errors import ClusterError, DataError
from distclust.training.cluster import connect, run_training

pytestmark = pytest.mark.slow
Config = Callable[..., RunConfig]


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    with connect(ClusterConfig(workers=3)):
        yield


def state_of(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "training" / name).read_text())
    return found


def same_weights(a: Path, b: Path) -> bool:
    one, other = runs.final_weights({"run": str(a)}), runs.final_weights({"run": str(b)})
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_one_ray_worker_and_no_ray_at_all_give_the_same(config: Config, corpus: Path, tmp_path: Path) -> None:
    losses: dict[int, dict[int, float]] = {0: {}, 1: {}}
    for workers, seen in losses.items():

        def watch(progress: dict[str, Any], seen: dict[int, float] = seen) -> None:
            if "loss" in progress["metrics"]:
                seen[progress["global_step"]] = progress["metrics"]["loss"]

        asked = config(workers, cluster={"memory_per_worker_gb": 0.1})
        outcome = run_training(asked, corpus, tmp_path / str(workers), on_progress=watch)
        assert outcome.global_steps == 32
    assert same_weights(tmp_path / "0", tmp_path / "1")
    both = losses[0].keys() & losses[1].keys()
    assert 32 in both
    assert all(losses[0][step] == losses[1][step] for step in both)
    assert state_of(tmp_path / "1", "workers.json")["workers"][0]["node"]
    assert not list((tmp_path / "1").glob("*snapshot*"))  # Ray leaves nothing that could stop the next start


def test_a_worker_killed_in_each_phase_changes_nothing(
    config: Config, corpus: Path, tmp_path: Path, killer: Callable[..., Any]
) -> None:
    more = {"checkpoint": {"every_steps": 50, "keep": 2}, "tracking": {"log_every": 50}}
    # phases last seconds, so that somebody outside can hit each in its middle
    asked = config(2, epochs=100, initialise={"restarts": 4000}, cluster={"max_failures": 5}, **more)
    whole = runs.job(asked, corpus, tmp_path / "whole", 2)
    runs.run_jobs([whole], tmp_path)  # uninterrupted, two gloo processes without Ray
    run = tmp_path / "killed"
    run.mkdir()
    plan = [(phase, phase % 2) for phase in range(5)]
    hits = killer(run, plan, after_epoch=15)  # 60 steps, so that a checkpoint of the phase is there
    outcome = run_training(asked, corpus, run)
    assert [kill["phase"] for kill in hits.kills] == [0, 1, 2, 3, 4], hits.kills
    assert state_of(run, "workers.json")["starts"] == 6
    # each start went on where the one before it had stood, but for the steps since its last checkpoint
    resumed = re.findall(r"resuming from \S+/(\d+)-", (run / "training" / "workers.log").read_text())
    for step, kill in zip(resumed, hits.kills, strict=True):
        assert int(step) > kill["step"] - 100
    assert outcome.global_steps == 1600
    assert same_weights(run, tmp_path / "whole")
    assert torch.equal(labels(asked, corpus, run), labels(asked, corpus, tmp_path / "whole"))


def labels(config: RunConfig, corpus: Path, run: Path) -> torch.Tensor:
    """Every document's cluster, in the order of the corpus."""
    from distclust.corpus.order import Order
    from distclust.corpus.stream import Stream
    from distclust.mixture.model import MixtureModel
    from distclust.mixture.sparse import SparseRows

    opened = Corpus.open(str(corpus))
    model = MixtureModel(config.row, config.model, opened.n_features, config.clusters)
    model.load_state_dict(runs.final_weights({"run": str(run)}))
    batch = Stream(opened, Order(opened.shard_rows, config.order, 0), []).gather(list(range(opened.n_rows)))
    assert batch.offsets is not None
    assert batch.indices is not None
    rows = SparseRows(batch.offsets, batch.indices, batch.values, opened.n_features)
    with torch.no_grad():
        return model.predict(rows).argmax(1)


def test_a_damaged_shard_ends_the_run_at_once_with_the_worker_s_own_words(
    config: Config, corpus: Path, tmp_path: Path
) -> None:
    import shutil

    damaged = tmp_path / "corpus"
    shutil.copytree(corpus, damaged)
    shard = damaged / "shard-00002.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00002\.arrow"):
        run_training(config(2), damaged, tmp_path / "run")
    assert state_of(tmp_path / "run", "workers.json")["starts"] == 1
    assert state_of(tmp_path / "run", "error.json")["type"] == "DataError"


def test_more_than_the_cluster_has_is_an_error_with_both_numbers(
    config: Config, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = time.monotonic()
    asked = config(2, cluster={"cpus_per_worker": 100, "start_timeout_s": 2.0})
    monkeypatch.setattr("distclust.training.cluster._alone", False)  # nodes might still come
    with pytest.raises(
        ClusterError, match=r"asked: 2 workers with 100 CPU each; available: 5 CPU .*after 2 s"
    ):
        run_training(asked, corpus, tmp_path / "run")
    assert 2 < time.monotonic() - before < 20
    monkeypatch.undo()
    before = time.monotonic()
    with pytest.raises(ClusterError, match="1 CPU, 1 GPU each; available: .* 0 GPU .*after 0 s"):
        run_training(config(1, cluster={"gpus_per_worker": 1}), corpus, tmp_path / "run")
    assert time.monotonic() - before < 10


def test_lost_more_often_than_allowed_is_an_error_that_says_how_to_go_on(
    config: Config, corpus: Path, tmp_path: Path, killer: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    asked = config(1, epochs=200, cluster={"max_failures": 0})
    hits = killer(run, [(0, 0)], after_epoch=0)
    with pytest.raises(
        ClusterError, match=r"after 1 start, more than cluster.max_failures allows.*goes on from"
    ):
        run_training(asked, corpus, run)
    assert len(hits.kills) == 1
