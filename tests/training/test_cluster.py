"""Running training, without a cluster: the run folder's signals, one worker in this process, and what is
refused at once."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import runs
from corpora import make_corpus
from distclust.config import ClusterConfig
from distclust.errors import CheckpointError, ClusterError, ConfigError, DataError, DistclustError
from distclust.training import cluster, run_state
from distclust.training.cluster import connect, run_training
from distclust.training.hooks import Outcome, Position
from distclust.training.metric_sink import PointQueue
from distclust.training.run_state import (
    RunHooks,
    RunState,
    describe,
    log_to_file,
    pass_warnings_on,
    revive,
    watching,
)
from distclust.training.worker import check_storage, make_job, settle, token_of
from distclust.training.world import World


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, shard_rows=runs.SHARD_ROWS, n_features=30)
    return folder


def state(tmp_path: Path, command: str = "this") -> RunState:
    made = RunState(tmp_path, command)
    made.clear()
    return made


# ---- the run folder's signals


def test_an_error_comes_back_as_it_was_raised() -> None:
    for error in (CheckpointError("damaged: x"), DataError("no rows"), ClusterError("2 asked")):
        again = revive(describe(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
    strange = revive(describe(KeyError("x")))
    assert type(strange) is DistclustError
    assert "KeyError" in str(strange)
    assert type(revive({"type": "annotations", "message": "not an error class"})) is DistclustError


def test_files_of_another_command_say_nothing_to_this_one(tmp_path: Path) -> None:
    earlier = state(tmp_path, "earlier")
    earlier.write_error(DataError("old"))
    earlier.write_workers("a", [{"rank": 0}])
    earlier.write_progress({"state": "training"})
    this = RunState(tmp_path, "this")
    assert this.error() is None
    assert this.workers() == {}
    assert this.progress() == {}
    assert earlier.error() == {"command": "earlier", "type": "DataError", "message": "old"}


def test_the_first_error_stays_and_an_echo_waits_for_the_cause(tmp_path: Path) -> None:
    this = state(tmp_path)
    late = threading.Timer(0.3, lambda: this.write_error(CheckpointError("the cause")))
    late.start()
    this.write_error(
        DistclustError("worker 0 failed: CheckpointError: the cause")
    )  # another worker heard of it
    late.join()
    found = this.error()
    assert found is not None
    assert found["type"] == "CheckpointError"
    this.write_error(DataError("a later one"))
    assert this.error() == found


def test_starts_are_counted_and_older_workers_are_superseded(tmp_path: Path) -> None:
    this = state(tmp_path)
    assert not this.superseded("first")  # nobody has written yet
    this.write_workers("first", [{"rank": 0}])
    assert not this.superseded("first")
    this.write_workers("second", [{"rank": 0}])
    assert this.workers()["starts"] == 2
    assert this.superseded("first")
    assert not this.superseded("second")
    RunState(tmp_path, "next command").write_workers("third", [])
    assert this.superseded("second")


def be_watched(folder: Path, happens: str) -> None:
    """A worker's process, to which something happens that only its watch can see."""
    run_state.BEAT_S, run_state.GRACE_S = 0.1, 0.5
    this = state(folder)
    this.write_workers("first", [])
    with watching(this, "first"):
        if happens == "superseded":
            this.write_workers("second", [])
        elif happens == "given up":
            this.write_error({"type": "ClusterError", "message": "no nodes", "by": "driver"})
        elif happens.startswith("error"):
            this.write_error({"type": "DataError", "message": "another worker's"})
        time.sleep(0.3 if happens.endswith("noticed") else 2)


def test_a_worker_that_should_not_go_on_ends(tmp_path: Path) -> None:
    expected = {"superseded": 4, "given up": 3, "error": 3, "error, noticed": 0, "nothing": 0}
    context = multiprocessing.get_context("fork")
    children = {}
    for happens in expected:
        folder = tmp_path / happens
        folder.mkdir()
        children[happens] = context.Process(target=be_watched, args=(folder, happens))
        children[happens].start()
    for child in children.values():
        child.join(30)
    assert {happens: child.exitcode for happens, child in children.items()} == expected


def test_warnings_of_workers_are_passed_on_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "workers.log"
    ours = logging.getLogger("distclust")
    handlers, level = list(ours.handlers), ours.level
    try:
        log_to_file(file, rank=1)
        logging.getLogger("distclust.some.module").info("not said: rank 1's information")
        logging.getLogger("distclust.some.module").warning("falls back")
        with file.open("a") as out:
            out.write("2026-01-01 worker 0 INFO distclust.x: resuming\n2026-01-01 worker 0 WARNING half a li")
    finally:
        for handler in set(ours.handlers) - set(handlers):
            ours.removeHandler(handler)
            handler.close()
        ours.setLevel(level)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        position = pass_warnings_on(file, 0)
        assert pass_warnings_on(file, position) == position
    assert [r.getMessage() for r in caplog.records] == [file.read_text().splitlines()[0]]
    assert "worker 1 WARNING distclust.some.module: falls back" in file.read_text()
    assert "not said" not in file.read_text()
    assert pass_warnings_on(tmp_path / "absent", 7) == 7


def test_hooks_tell_where_the_run_stands_and_carry_points_through_a_checkpoint(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    sink = PointQueue(None, tmp_path / "spool.jsonl", {}, interval_s=3600)
    config = runs.tiny_config("damic")
    hooks = RunHooks(config, 4, sink, said.append)  # type: ignore[arg-type]
    hooks.tell()
    assert said[-1]["state"] == "starting"
    hooks.log(Position(0, 0, 1, 1), "pretrain", {"loss": 2.0})
    hooks.saved("checkpoints/x", Position(2, 1, 3, 15))
    last = said[-1]
    assert (last["state"], last["phase"], last["phase_index"], last["epochs"]) == (
        "training",
        "experts",
        2,
        2,
    )
    assert (last["epoch"], last["step"], last["global_step"], last["total_steps"]) == (1, 3, 15, 32)
    assert last["metrics"] == {"loss": 2.0}
    assert json.loads(json.dumps(last)) == last
    hooks.saved("checkpoints/y", Position(5, 0, 0, 32))
    assert said[-1]["state"] == "finished"
    points = json.loads(json.dumps(hooks.pending()))
    assert [point[:3] for point in points] == [["loss", 2.0, 1]]
    other = PointQueue(None, tmp_path / "other.jsonl", {}, interval_s=3600)
    again = RunHooks(config, 4, other, said.append)  # type: ignore[arg-type]
    again.offer(points)
    assert again.pending() == points
    sink.close()
    other.close()


def test_a_full_disk_does_not_stop_the_hooks(caplog: pytest.LogCaptureFixture) -> None:
    def full(_: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    hooks = RunHooks(runs.tiny_config("damic"), 4, None, full)
    hooks.saved("checkpoints/x", Position(1, 0, 0, 8))
    assert "No space left" in caplog.text


def test_progress_is_not_written_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    hooks = RunHooks(runs.tiny_config("damic"), 4, None, said.append)
    for step in range(1000):
        hooks.after_step(Position(0, 0, 0, step))
    assert 1 <= len(said) < 20
    monkeypatch.setattr(run_state, "RENEW_S", 0.0)
    hooks.after_step(Position(0, 0, 0, 1000))
    assert said[-1]["global_step"] == 1000


# ---- errors of one worker among several


def settle_one(rank: int, folder: Path, happens: str, answers: Any) -> None:
    """Rank 1 meets something while the others wait for it in a collective."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    world = World.current()

    def train() -> Outcome:
        world.sum({"together": torch.ones(1)})
        if rank == 1 and happens == "damage":
            raise DataError("shard-7 is damaged")
        if rank == 1 and happens == "fault":
            raise TypeError("energy() takes 1 argument\nbut 2 were given")
        if rank == 1 and happens == "loss":
            raise OSError("stale file handle")
        if happens == "echo":
            world.on_first(lambda: (_ for _ in ()).throw(CheckpointError("disk full")))
        world.sum({"together": torch.ones(1)})
        return Outcome("last", {}, 7)

    try:
        found = settle(train, world, RunState(folder, "this"))
        answers.put((rank, found.get("outcome", found.get("error"))))
    except Exception as error:
        answers.put((rank, type(error).__name__))
        answers.close()
        answers.join_thread()
        os._exit(1)  # as Ray ends a worker
    time.sleep(60)  # as Ray keeps it


@pytest.mark.parametrize("happens", ["damage", "echo", "fault", "loss", "nothing"])
def test_all_workers_hear_of_an_error_of_one(tmp_path: Path, happens: str) -> None:
    state(tmp_path)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=settle_one, args=(r, tmp_path, happens, answers)) for r in range(3)]
    for worker in workers:
        worker.start()
    try:
        found = dict(answers.get(timeout=15) for _ in workers)  # nobody waits for ever
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    if happens == "damage":
        expected = {"command": "this", "type": "DataError", "message": "shard-7 is damaged"}
        assert found == dict.fromkeys(range(3), expected)
    elif happens == "echo":
        expected = {"command": "this", "type": "CheckpointError", "message": "disk full"}
        assert found == dict.fromkeys(range(3), expected)
    elif happens == "fault":  # of the code: another start would meet it again
        assert found[0] == found[1] == found[2]
        assert found[1]["type"] == "ClusterError"
        assert "worker 1 of 3 ended with TypeError: energy() takes 1 argument (" in found[1]["message"]
        assert f"{__file__}, line " in found[1]["message"]
        assert "in train)" in found[1]["message"]
    elif happens == "loss":  # may be a fault of the machine: worth another start
        assert found[1] == "OSError"
        assert RunState(tmp_path, "this").error() is None
    else:
        assert found == dict.fromkeys(
            range(3), {"checkpoint": "last", "phase_checkpoints": {}, "global_steps": 7}
        )


# ---- the driver's watch


class StandIn:
    """What the driver needs of Ray's trainer: a `fit` that takes its time, then answers or fails."""

    def __init__(self, seconds: float, answer: Any):
        self.seconds, self.return_value = seconds, answer

    def fit(self) -> StandIn:
        time.sleep(self.seconds)
        if isinstance(self.return_value, Exception):
            raise self.return_value
        return self


def test_the_driver_does_not_wait_for_ever_for_workers_that_do_not_come(tmp_path: Path) -> None:
    this = state(tmp_path)
    before = time.monotonic()
    with pytest.raises(ClusterError, match="no worker has worked for 1 s.*same command again"):
        cluster._fit(StandIn(60, {}), this, None, silence_s=1)
    assert time.monotonic() - before < 5
    found = this.error()
    assert found is not None
    assert found["by"] == "driver"  # a worker that comes after all goes away again


def test_the_driver_waits_while_somebody_works_and_passes_progress_on(tmp_path: Path) -> None:
    this = state(tmp_path)
    seen: list[int] = []
    over = threading.Event()

    def work() -> None:
        this.write_progress({"state": "starting", "beat": 0})
        time.sleep(0.7)
        while not over.wait(0.1):
            this.write_progress({"state": "training", "beat": time.monotonic_ns()})

    worker = threading.Thread(target=work)
    worker.start()
    answer = {"outcome": {"checkpoint": "x"}}
    assert cluster._fit(StandIn(3, answer), this, lambda p: seen.append(p["beat"]), silence_s=1) == answer
    over.set()
    worker.join()
    assert len(seen) > 3
    assert 0 not in seen


def test_an_interrupted_driver_tells_its_workers(tmp_path: Path) -> None:
    def interrupt(_: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    this = state(tmp_path)
    this.write_progress({"state": "training"})
    with pytest.raises(KeyboardInterrupt):
        cluster._fit(StandIn(60, {}), this, interrupt, silence_s=60)
    found = this.error()
    assert found is not None
    assert (found["type"], found["by"]) == ("KeyboardInterrupt", "driver")


def test_ray_s_last_word_becomes_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    this = state(tmp_path)
    this.write_workers("first", [])
    this.write_progress({"state": "training", "global_step": 17})
    with pytest.raises(
        ClusterError, match=r"after 1 start,.* at global step 17; the last words: .*out of memory"
    ):
        cluster._fit(StandIn(0.1, RuntimeError("Training failed:\nout of memory")), this, None, silence_s=60)


# ---- one worker in this process


def test_training_in_this_process_tells_its_progress_and_goes_on_when_given_again(
    corpus: Path, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []
    config = runs.tiny_config("damic", cluster={"workers": 0})
    outcome = run_training(config, corpus, tmp_path / "run", on_progress=seen.append)
    assert outcome.global_steps == 32
    assert seen[-1]["state"] == "finished"
    assert [p["global_step"] for p in seen] == sorted(p["global_step"] for p in seen)
    assert (
        json.loads((tmp_path / "run" / "training" / "workers.json").read_text())["workers"][0]["pid"]
        == os.getpid()
    )
    again = run_training(config, corpus, tmp_path / "run")
    assert again.checkpoint == outcome.checkpoint
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_threads_are_those_of_the_configuration_and_are_given_back(corpus: Path, tmp_path: Path) -> None:
    seen: set[int] = set()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_training(
            runs.tiny_config("damic", cluster={"workers": 0}),
            corpus,
            tmp_path / "run",
            on_progress=lambda _: seen.add(torch.get_num_threads()),
        )
        assert seen == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_in_this_process_is_raised_as_it_is(corpus: Path, tmp_path: Path) -> None:
    config = runs.tiny_config("damic", cluster={"workers": 0})
    run_training(config, corpus, tmp_path / "run")
    other = runs.tiny_config("damic", cluster={"workers": 0}, clusters=4)
    with pytest.raises(CheckpointError, match="clusters: 3 in the checkpoint, 4 asked"):
        run_training(other, corpus, tmp_path / "run")


# ---- refused at once


def test_a_run_folder_must_be_a_path(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/run; expected a path: mount"):
        run_training(runs.tiny_config("damic"), corpus, "s3://bucket/run")


def test_no_corpus_is_found_before_any_worker_starts(tmp_path: Path) -> None:
    before = time.monotonic()
    with pytest.raises(DataError, match="there is no folder"):
        run_training(runs.tiny_config("damic", cluster={"workers": 2}), tmp_path / "none", tmp_path / "run")
    assert time.monotonic() - before < 2


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://head:10001"])
def test_an_address_that_is_not_a_cluster_of_this_machine_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match="ray job submit"), connect(ClusterConfig()):
        pass


def test_an_address_where_nobody_listens_is_found_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        before = time.monotonic()
        said = "no Ray cluster at 127.0.0.1:.*expected"
        with pytest.raises(ClusterError, match=said), connect(ClusterConfig()):
            pass
        assert time.monotonic() - before < 15


def test_storage_that_a_node_does_not_see_is_named(corpus: Path, tmp_path: Path) -> None:
    job = make_job(runs.tiny_config("damic"), corpus, tmp_path, None)
    with pytest.raises(
        ClusterError, match=r"1 of 1 workers .*: node-7 does not see the run folder .*Expected"
    ):
        check_storage(job, World(), "node-7")
    RunState(tmp_path, job["command"]).clear()
    token_of(job).touch()
    check_storage(job, World(), "node-7")
    with pytest.raises(ClusterError, match="node-7 does not see the corpus: there is no folder"):
        check_storage(job | {"corpus": str(tmp_path / "none")}, World(), "node-7")
    with pytest.raises(ClusterError, match="node-7 sees another corpus at"):
        check_storage(job | {"fingerprint": "f" * 64}, World(), "node-7")
