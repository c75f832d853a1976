"""Several nodes on this machine: one that does not see the storage, one that is lost."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import runs
from distclust.config import RunConfig
from distclust.errors import ClusterError
from distclust.training.cluster import run_training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head with one CPU and a cache of its own; tests add the second node."""
    cache = tmp_path_factory.mktemp("cache-head")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    head = {
        "num_cpus": 1,
        "include_dashboard": True,
        "dashboard_port": port,
        "env_vars": {"DISTCLUST_CACHE": str(cache)},
    }
    started = Cluster(initialize_head=True, head_node_args=head)
    started.cache = cache
    ray.init(address=started.address, log_to_driver=False)
    yield started
    ray.shutdown()
    started.shutdown()


def wait_for_nodes(count: int) -> None:
    until = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) != count:
        assert time.monotonic() < until, ray.nodes()
        time.sleep(0.2)


@pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0 or subprocess.call(["unshare", "-m", "true"]) != 0,
    reason="needs a mount namespace of its own (root) for a node that does not see a folder",
)
def test_a_node_that_does_not_see_the_run_folder_is_named(
    cluster: Cluster, config: Callable[..., RunConfig], corpus: Path, tmp_path: Path
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    command = f"{Path(sys.executable).with_name('ray')} start --block --num-cpus=1"
    start = f"mount -t tmpfs none {hidden} && exec {command}"
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"{start} --address={cluster.address} --disable-usage-stats"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_nodes(2)
        known = {n["NodeID"][:8] for n in ray.nodes() if n["Alive"]} - {cluster.head_node.node_id[:8]}
        with pytest.raises(ClusterError, match="1 of 2 workers do not see the storage") as raised:
            run_training(config(2), corpus, hidden / "run")
        (blind,) = known
        assert f"node {blind}) does not see the run folder {hidden}/run" in str(raised.value)
        assert not (hidden / "run" / "checkpoints").exists()  # before any training
    finally:
        os.killpg(node.pid, 15)
        node.wait(30)
    wait_for_nodes(1)


def test_an_elastic_run_loses_a_node_and_ends_on_what_is_left(
    cluster: Cluster, config: Callable[..., RunConfig], corpus: Path, tmp_path: Path
) -> None:
    """Each node copies what it reads of a remote corpus to its own cache."""
    cache = tmp_path / "cache-second"
    second = cluster.add_node(num_cpus=1, env_vars={"DISTCLUST_CACHE": str(cache)})
    asked = config([1, 2], epochs=150, checkpoint={"every_steps": 50, "keep": 2})
    alone = runs.job(asked, corpus, tmp_path / "alone", 1)
    runs.run_jobs([alone], tmp_path)
    run = tmp_path / "run"
    lost: list[dict[str, Any]] = []

    def lose() -> None:
        while not lost:
            time.sleep(0.05)
            try:
                where = json.loads((run / "training" / "progress.json").read_text())
                who = json.loads((run / "training" / "workers.json").read_text())
            except (FileNotFoundError, ValueError):
                continue
            if where["state"] == "training" and where["phase_index"] == 2 and where["epoch"] > 10:
                lost.append(where | who)
                cluster.remove_node(second, allow_graceful=False)

    watcher = threading.Thread(target=lose, daemon=True)
    watcher.start()
    outcome = run_training(asked, f"file://{corpus}", run)
    watcher.join()
    assert len({worker["node"] for worker in lost[0]["workers"]}) == 2  # two nodes worked
    assert lost[0]["phase_index"] == 2
    after = json.loads((run / "training" / "workers.json").read_text())
    assert after["starts"] == 2
    assert len(after["workers"]) == 1
    assert outcome.global_steps == 2400
    # the sums of two workers are added in another order than those of one, and steps let the difference grow
    one, other = runs.final_weights(alone), runs.final_weights({"run": str(run)})
    for name in one:
        assert (other[name] - one[name]).norm() <= 0.05 * one[name].norm() + 1e-3, name
    final = json.loads((run / "training" / "progress.json").read_text())["metrics"]
    assert final["loss"] == pytest.approx(runs.losses(alone)[2400]["loss"], rel=0.02)
    # the second node fetched only shards of its own lanes; the head, which ended the run alone, all that have
    # rows
    shards = {p.name for p in corpus.glob("*.arrow")}
    fetched = {p.name for p in cache.rglob("*.arrow")}
    assert fetched
    assert fetched <= shards
    assert {p.name for p in cluster.cache.rglob("*.arrow")} >= fetched
