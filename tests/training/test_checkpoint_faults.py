"""Checkpoints through cut-off writes, damage and full disks: the last good one stays, the rest is named."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from checkpoints import FILES, everything, save_number, value
from distclust.errors import CheckpointError
from distclust.training.checkpoint import CheckpointStore


def flip(path: Path, byte: int = 0, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


# --- cut-off writes


def in_a_fork(work: Callable[[], object]) -> int:
    """Run in a forked process, which may die of it; returns minus the signal, or the exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("calls", range(len(FILES)))
@pytest.mark.parametrize("name", ["step-000000001", "step-000000002"])
def test_a_kill_at_any_point_of_a_write_keeps_the_one_before(tmp_path: Path, name: str, calls: int) -> None:
    store = CheckpointStore(str(tmp_path))
    save_number(store, 1)
    replace, left = os.replace, [calls]

    def killed() -> None:
        def counted(source: str, target: str) -> None:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            replace(source, target)

        os.replace = counted
        save_number(store, 2, name)

    assert in_a_fork(killed) == -signal.SIGKILL
    litter = set(everything(tmp_path)) - {f"step-000000001/{file}" for file in FILES}
    assert len(litter) == calls + 1  # what was renamed, and what was about to be
    store = CheckpointStore(str(tmp_path))
    assert value(store, store.latest()) == 1
    store.prune(1)
    if name == "step-000000002":
        assert set(everything(tmp_path)) == {f"step-000000001/{file}" for file in FILES}
        assert not (tmp_path / name).exists()
    assert value(store, save_number(store, 2, name)) == 2
    assert value(store, store.latest()) == 2
    assert len(everything(tmp_path / name)) == len(FILES)


@pytest.mark.parametrize("present", [[], FILES[:1], FILES[:3], ["model.safetensors.part"]])
def test_a_partial_folder_is_passed_over_and_pruned(
    tmp_path: Path, present: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path))
    save_number(store, 1)
    partial = tmp_path / "step-000000002"
    partial.mkdir()
    for file in present:
        (partial / file).write_bytes(b"half")
    assert value(store, store.latest()) == 1
    assert not caplog.records
    with pytest.raises(CheckpointError, match=r"step-000000002/COMMIT is missing"):
        store.load(str(partial))
    store.prune(5)
    assert not partial.exists()
    assert value(store, store.latest()) == 1


@pytest.mark.parametrize("when", ["before COMMIT", "after COMMIT"])
def test_an_interrupt_leaves_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    store = CheckpointStore(str(tmp_path))
    save_number(store, 1, "same")
    replace = os.replace

    def interrupted(source: str, target: str) -> None:
        if target.endswith("COMMIT" if when == "after COMMIT" else "state.2.json"):
            replace(source, target)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_number(store, 2, "same")
    monkeypatch.undo()
    assert value(store, store.latest()) == (2 if when == "after COMMIT" else 1)
    if when == "before COMMIT":
        assert sorted(everything(tmp_path / "same")) == sorted(FILES)


# --- damage


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        flip(path, byte=len(path.read_bytes()) // 2, bit=3)


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "longer", "bit flipped"])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named_and_the_one_before_is_taken(
    tmp_path: Path, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path))
    save_number(store, 1)
    path = Path(save_number(store, 2))
    damage(path / file, how)
    with pytest.raises(CheckpointError, match=f"{path / file} is (damaged|missing)"):
        store.load(str(path))
    assert value(store, store.latest()) == 1
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    if (file, how) == ("COMMIT", "missing"):
        assert warned == []  # indistinguishable from a write that was cut off
    else:
        assert len(warned) == 1
        assert str(path / file) in warned[0]
        assert "falling back" in warned[0]


def test_no_bit_of_commit_can_flip_unseen(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    path = Path(save_number(store, 1))
    size = (path / "COMMIT").stat().st_size
    for byte in range(size):
        flip(path / "COMMIT", byte, bit=byte % 8)
        with pytest.raises(CheckpointError, match="COMMIT"):
            store.load(str(path))
        flip(path / "COMMIT", byte, bit=byte % 8)
    assert value(store, str(path)) == 1


def test_when_all_are_damaged_there_is_none_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path))
    for number in (1, 2):
        flip(Path(save_number(store, number)) / "state.json")
    assert store.latest() is None
    assert "none of the 2 checkpoints" in caplog.messages[-1]


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    first, second = (Path(save_number(store, number)) for number in (1, 2))
    (second / "model.safetensors").write_bytes((first / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="step-000000002/model.safetensors is damaged"):
        store.load(str(second))


class FailingReads(LocalFileSystem):
    """A local file system whose reads of data files fail as told."""

    error = 0

    def open(self, path: str, mode: str = "rb", **options):
        if "r" in mode and path.endswith("step-000000002/model.safetensors"):
            raise OSError(self.error, os.strerror(self.error), path)
        return super().open(path, mode, **options)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ETIMEDOUT])
def test_a_storage_that_refuses_is_not_taken_for_damage(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path))
    for step in (1, 2):
        save_number(store, step)
    store._fs = FailingReads(skip_instance_cache=True)
    store._fs.error = number
    if number == errno.EIO:  # a bad place on the disk is damage
        path = store.latest()
        assert path is not None
        assert path.endswith("step-000000001")
        assert "model.safetensors cannot be read" in caplog.text
    else:  # falling back would throw away work that may be whole
        with pytest.raises(
            CheckpointError, match=r"could not read .*step-000000002/model.safetensors.*rights"
        ):
            store.latest()


@pytest.mark.parametrize("same_process", [True, False])
def test_prune_does_not_count_damaged_ones(tmp_path: Path, same_process: bool) -> None:
    store = CheckpointStore(str(tmp_path))
    paths = [Path(save_number(store, number)) for number in (1, 2, 3, 4)]
    damage(paths[3] / "model.safetensors", "truncated")
    damage(paths[1] / "model.safetensors", "truncated")
    (store if same_process else CheckpointStore(str(tmp_path))).prune(1)
    assert sorted(os.listdir(tmp_path)) == ["step-000000003", "step-000000004"]
    assert value(store, store.latest()) == 3


def test_prune_after_a_restart_never_leaves_only_flipped_bits(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    paths = [Path(save_number(store, number)) for number in (1, 2)]
    flip(paths[1] / "model.safetensors", byte=-1)
    CheckpointStore(str(tmp_path)).prune(1)
    assert value(store, store.latest()) == 1


# --- full disks


@pytest.mark.parametrize("name", ["step-000000001", "step-000000002"])
def test_a_write_that_the_system_refuses_leaves_no_trace(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(str(tmp_path / "root"))
    save_number(store, 1)
    before = everything(tmp_path)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.save(name, {"model": {}, "optimizer": {"m": torch.ones(50_000)}}, {})
        except CheckpointError as error:
            (tmp_path / "message").write_text(str(error))

    assert in_a_fork(limited) == 0
    message = (tmp_path / "message").read_text()
    (tmp_path / "message").unlink()
    assert f"could not write checkpoint {tmp_path / 'root' / name} (0.2 MiB)" in message
    assert "File too large" in message
    assert "free space or choose another storage" in message
    assert everything(tmp_path) == before
    assert os.listdir(tmp_path / "root") == ["step-000000001"]
    assert value(store, store.latest()) == 1


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_good_one(small_disk: Path) -> None:
    store = CheckpointStore(str(small_disk / "checkpoints"))
    save_number(store, 1)
    before = everything(small_disk)
    large = {"model": {"a": torch.ones(1_000)}, "optimizer": {"m": torch.ones(100_000)}}
    for name in ("step-000000002", "step-000000001"):
        with pytest.raises(CheckpointError, match="No space left on device.*free space"):
            store.save(name, large, {"step": 2})
        assert everything(small_disk) == before
        assert os.listdir(small_disk / "checkpoints") == ["step-000000001"]
        assert value(store, store.latest()) == 1
    # what other programs wrote fills it to the brim; with room again the run goes on
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as out:
        while out.write(b"x" * 4096):
            pass
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_number(store, 2)
    assert value(store, store.latest()) == 1
    filler.unlink()
    assert value(store, save_number(store, 2)) == 2


class SmallMemoryFile(MemoryFile):
    def write(self, data: bytes) -> int:
        SmallMemory.room -= len(data)
        if SmallMemory.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


class SmallMemory(MemoryFileSystem):
    """Remote storage with room for so many bytes; what came before the error stays, as on some stores."""

    protocol = "smallmemory"
    store: dict = {}
    pseudo_dirs = [""]
    room = 10**9

    def _open(self, path: str, mode: str = "rb", **options):
        if mode != "wb":
            return super()._open(path, mode, **options)
        file = SmallMemoryFile(self, self._strip_protocol(path), b"")
        file.commit()
        return file


def test_remote_storage_that_fills_up_at_any_file() -> None:
    fsspec.register_implementation("smallmemory", SmallMemory, clobber=True)
    store = CheckpointStore("smallmemory://bucket/run")
    save_number(store, 1)
    sizes = [len(data.getvalue()) for data in SmallMemory.store.values()]
    for name in ("step-000000002", "step-000000001"):
        for room in (0, sizes[0], sum(sizes[:2]) + 1, sum(sizes) - sizes[-1] - 5):
            before = {path: data.getvalue() for path, data in SmallMemory.store.items()}
            SmallMemory.room = room
            if name == "step-000000001" and room > sum(sizes[:2]) + 1:
                continue  # an object store replaces COMMIT whole or not at all; this one would not
            with pytest.raises(CheckpointError, match=r"smallmemory://.*No space left on device"):
                save_number(store, 2, name)
            assert {path: data.getvalue() for path, data in SmallMemory.store.items()} == before
            assert value(store, store.latest()) == 1
    # in a folder that a killed write left, too, no half of COMMIT stays
    SmallMemory.room = 10**9
    with fsspec.open("smallmemory://bucket/run/step-000000003/model.safetensors", "wb") as out:
        out.write(b"half")
    SmallMemory.room = sum(sizes) - 5
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_number(store, 3)
    assert not any(path.endswith("step-000000003/COMMIT") for path in SmallMemory.store)
    SmallMemory.room = 10**9
    assert value(store, save_number(store, 2)) == 2
