"""Two runs on one folder, dead holders, damaged files: the folder's own faults."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from distclust import run_folder
from distclust.config import load_recipe
from distclust.errors import ConfigError


def hold_in_child(run: Path, seconds: float) -> tuple[int, int]:
    """(pid, pipe) of a forked process that holds the folder, says "held" through the pipe, and sleeps."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with run_folder.hold(run):
                os.write(write, b"held")
                time.sleep(seconds)
        finally:
            os._exit(0)
    os.close(write)
    return pid, read


class Holder:
    """A process that holds a folder."""

    def __init__(self, run: Path):
        self.pid, self._pipe = hold_in_child(run, 60)
        assert os.read(self._pipe, 9) == b"held"

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._pipe)
            self.killed, self.pid = self.pid, 0


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path / "run"."""
    process = Holder(tmp_path / "run")
    yield process
    process.kill()


def test_a_second_run_is_refused_and_the_holder_named(holder, tmp_path):
    run = tmp_path / "run"
    before = sorted(run.iterdir()), (run / "lock").read_text()
    with (
        pytest.raises(
            ConfigError,
            match=rf"held by process {holder.pid} on {os.uname().nodename}, since "
            "20",
        ),
        run_folder.hold(run),
    ):
        pytest.fail("two holders")
    assert (sorted(run.iterdir()), (run / "lock").read_text()) == before


def test_a_stopped_holder_is_still_one(holder, tmp_path):
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(ConfigError, match="held by"), run_folder.hold(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path, caplog):
    holder.kill()
    run = tmp_path / "run"
    assert json.loads((run / "lock").read_text())["pid"] == holder.killed, "the dead process left its lock"
    with run_folder.hold(run):
        assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
    assert f"from process {holder.killed}" in caplog.text
    assert not (run / "lock").exists()


def test_a_reused_pid_does_not_hold(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    mine = {"host": os.uname().nodename, "pid": os.getppid(), "start": "2020-01-01T00:00:00"}
    (run / "lock").write_text(json.dumps(mine))
    with run_folder.hold(run):
        pass


@pytest.mark.parametrize("text", ["", "not json", "[1]"])
def test_a_lock_without_sense_is_nobodys(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with run_folder.hold(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_another_machine_holds_as_long_as_it_gives_signs_of_life(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "node-7", "pid": 12, "start": "2020-01-01T00:00:00"}))
    with pytest.raises(ConfigError, match="process 12 on node-7"), run_folder.hold(tmp_path):
        pass
    old = time.time() - run_folder.DEAD_AFTER_S - 5
    os.utime(lock, (old, old))
    with run_folder.hold(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "BEAT_S", 0.02)
    with run_folder.hold(tmp_path):
        lock = tmp_path / "lock"
        os.utime(lock, (1, 1))
        deadline = time.monotonic() + 10
        while lock.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_without_kernel_locks_the_word_of_the_file_counts(holder, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with pytest.raises(ConfigError, match=f"process {holder.pid}"), run_folder.hold(tmp_path / "run"):
        pass
    holder.kill()
    with run_folder.hold(tmp_path / "run"):
        pass


def test_many_at_once_after_a_death_give_one_holder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "start": "-"}))
    children = [hold_in_child(run, 2.0) for _ in range(6)]
    said = [os.read(pipe, 9) for _, pipe in children]
    for pid, pipe in children:
        os.waitpid(pid, 0)
        os.close(pipe)
    assert sorted(said) == [b""] * 5 + [b"held"]


def test_a_lock_that_was_removed_while_we_took_it_is_no_lock(tmp_path, monkeypatch):
    """Its holder ended, and a third process was faster with a new one."""
    lock = tmp_path / "lock"
    lock.write_text("{}")
    flock, others = run_folder.fcntl.flock, []

    def race(handle, operation):
        if not others:
            lock.unlink()
            others.append(os.open(lock, os.O_RDWR | os.O_CREAT))
            flock(others[0], operation)
            os.write(others[0], b'{"host": "here", "pid": 77}')
        flock(handle, operation)

    monkeypatch.setattr(run_folder.fcntl, "flock", race)
    with pytest.raises(ConfigError, match="process 77 on here"), run_folder.hold(tmp_path):
        pass
    os.close(others[0])


def test_a_failed_run_leaves_no_empty_folder(tmp_path):
    with pytest.raises(RuntimeError), run_folder.hold(tmp_path / "a" / "run"):
        raise RuntimeError
    assert not (tmp_path / "a" / "run").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--run"), run_folder.hold(tmp_path / "file" / "run"):
        pass


# ---- the same run, or another one


def test_only_the_same_configuration_continues(tmp_path):
    config = load_recipe("smoke")
    assert not run_folder.check_same_run(tmp_path, config)
    run_folder.remember_run(tmp_path, config, {"corpus": "a", "vocabulary": "b"})
    assert run_folder.check_same_run(tmp_path, config)
    with pytest.raises(ConfigError) as caught:
        run_folder.check_same_run(
            tmp_path,
            load_recipe("smoke", ["clusters=6", "vocabulary.max_features=200", "phases.joint.epochs=3"]),
        )
    message = str(caught.value)
    for part in (
        "clusters: 5 there, 6 asked",
        "vocabulary.max_features: 300 there, 200 asked",
        "epochs",
        "--run",
    ):
        assert part in message


@pytest.mark.parametrize(
    "change",
    [
        "cluster.workers=2",
        "checkpoint.every_steps=7",
        "tracking.experiment=other",
        "cache.max_bytes=10000000",  # what a full cache asks for
        "stream.prefetch=1",
    ],
)
def test_what_does_not_change_the_result_may_change(tmp_path, change):
    run_folder.remember_run(tmp_path, load_recipe("smoke"), {})
    assert run_folder.check_same_run(tmp_path, load_recipe("smoke", [change]))


def test_other_data_are_refused(tmp_path):
    run_folder.check_same_data(tmp_path, {"corpus": "x"})
    run_folder.remember_run(tmp_path, load_recipe("smoke"), {"corpus": "a", "vocabulary": "b"})
    run_folder.check_same_data(tmp_path, {"corpus": "a", "vocabulary": "b"})
    with pytest.raises(ConfigError, match="vocabulary: b there, c asked"):
        run_folder.check_same_data(tmp_path, {"corpus": "a", "vocabulary": "c"})


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {')
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        run_folder.check_same_run(tmp_path, load_recipe("smoke"))


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    run_folder.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run_folder.write_json(path, {"a": object()})
    assert run_folder.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
