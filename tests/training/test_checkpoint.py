"""Checkpoints: what is saved comes back, nothing else is read, files of others stay, pruning, differences."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import save as to_safetensors

from checkpoints import FILES, everything, save_number, value
from distclust.errors import CheckpointError
from distclust.training.checkpoint import CheckpointStore, differences

TENSORS = {"model": {"w": torch.arange(12.0).reshape(3, 4)}, "optimizer": {"step": torch.tensor(7)}}


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "checkpoints") if request.param == "local" else f"memory://{uuid.uuid4()}/checkpoints"
    )


# --- what is saved comes back


def test_tensors_and_state_come_back_to_the_bit(root: str) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "model": {
            "plain": base,
            "transposed": base.t(),
            "strided": base[::2, 1:3],
            "expanded": torch.tensor([1.5]).expand(3, 5),
            "tied": base,
            "row": base[2],
            "parameter": torch.nn.Parameter(torch.randn(3)),
            "scalar": torch.tensor(3),
            "no rows": torch.empty(0, 4),
            "half": torch.randn(5).to(torch.bfloat16),
            "flags": torch.tensor([True, False]),
            "odd": torch.tensor([math.nan, math.inf, -0.0]),
        },
        "optimizer": {"counts": torch.arange(5)},
        "teacher": {},
    }
    state = {
        "epoch": 3,
        "names": ("ä", "b", None, True),
        "loss": math.nan,
        "nested": {"large": 2**62, "small": 1e-300, "empty": {}},
    }
    store = CheckpointStore(root)
    path = store.save("step-000000001", tensors, state)
    found, found_state = CheckpointStore(root).load(path)
    assert list(found) == ["model", "optimizer", "teacher"]
    for group, named in tensors.items():
        assert set(found[group]) == set(named)
        for name, tensor in named.items():
            other = found[group][name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(
                other.contiguous().view(-1).view(torch.uint8) if other.numel() else other,
                tensor.detach().contiguous().view(-1).view(torch.uint8) if other.numel() else tensor,
            )
    assert math.isnan(found_state.pop("loss"))
    assert found_state == {
        "epoch": 3,
        "names": ["ä", "b", None, True],
        "nested": {"large": 2**62, "small": 1e-300, "empty": {}},
    }
    # what came back can be trained on
    found["model"]["plain"].add_(1)
    assert not torch.equal(found["model"]["plain"], found["model"]["tied"])


def test_no_groups_at_all(root: str) -> None:
    store = CheckpointStore(root)
    assert store.load(store.save("start", {}, {})) == ({}, {})


def test_nothing_is_there_before_the_first_save(root: str) -> None:
    store = CheckpointStore(root)
    assert store.latest() is None
    store.prune(1)
    fs, path = fsspec.core.url_to_fs(root)
    assert not fs.exists(path)


def test_a_relative_root_gives_a_path_that_holds_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore("runs/demo/checkpoints")
    path = save_number(store, 1)
    monkeypatch.chdir("/")
    assert path == str(tmp_path / "runs/demo/checkpoints/step-000000001")
    assert store.latest() == path
    assert value(CheckpointStore("/elsewhere"), path) == 1


def test_latest_is_the_last_by_name(root: str) -> None:
    store = CheckpointStore(root)
    for number in (5, 1000, 20):
        save_number(store, number)
    path = store.latest()
    assert path is not None
    assert path.endswith("step-000001000")
    assert value(store, path) == 1000
    assert value(CheckpointStore(root), CheckpointStore(root).latest()) == 1000


def test_files_are_the_groups_the_state_and_commit(tmp_path: Path) -> None:
    path = Path(save_number(CheckpointStore(str(tmp_path)), 3))
    assert sorted(everything(path)) == sorted(FILES)
    commit = json.loads((path / "COMMIT").read_text())
    for file in FILES[:-1]:
        data = (path / file).read_bytes()
        assert commit["files"][file] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# --- replacement


def test_saving_under_the_same_name_replaces(root: str) -> None:
    store = CheckpointStore(root)
    for number in (1, 2, 3):
        path = save_number(store, number, "same")
        assert value(CheckpointStore(root), path) == number
    fs, folder = fsspec.core.url_to_fs(path)
    assert len(fs.ls(folder)) == len(FILES)


def test_replacing_leaves_a_strangers_file(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    path = Path(save_number(store, 1, "same"))
    (path / "notes.txt").write_text("mine")
    (path / "model.safetensors.part").write_text("litter of a killed write")
    save_number(store, 2, "same")
    assert (path / "notes.txt").read_text() == "mine"
    assert len(everything(path)) == len(FILES) + 1


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_one_can_be_saved_again(tmp_path: Path, file: str) -> None:
    store = CheckpointStore(str(tmp_path))
    path = Path(save_number(store, 1, "same"))
    (path / file).write_bytes(b"{}")
    assert store.latest() is None
    assert value(store, save_number(store, 2, "same")) == 2
    assert store.latest() == str(path)
    assert len(everything(path)) == len(FILES)


# --- nothing but safetensors and JSON is read


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def sign(content: dict) -> bytes:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}).encode()


def entry(data: bytes) -> dict:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_pickle_beside_the_files_is_never_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Canary(canary))
    store = CheckpointStore(str(tmp_path / "root"))
    path = Path(save_number(store, 1))
    for file in ("model.pt", "state.pkl", "extra.safetensors", "__init__.py"):
        (path / file).write_bytes(bomb)
    assert value(store, store.latest()) == 1
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists(), "the canary does not sing"


@pytest.mark.parametrize(
    "file", ["model.pt", "../model.safetensors", "/etc/model.safetensors", "COMMIT", "sub/a.json"]
)
def test_a_commit_that_leads_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Canary(canary))
    store = CheckpointStore(str(tmp_path / "root"))
    path = Path(save_number(store, 1))
    (path / "model.pt").write_bytes(bomb)
    (tmp_path / "root" / "model.safetensors").write_bytes(to_safetensors({}))
    (path / "COMMIT").write_bytes(sign({"version": 1, "generation": 1, "files": {file: entry(bomb)}}))
    with pytest.raises(CheckpointError, match="expected files of this folder"):
        store.load(str(path))
    assert store.latest() is None
    assert not canary.exists()


@pytest.mark.parametrize("file", FILES[:3])
def test_a_pickle_under_a_listed_name_is_refused(tmp_path: Path, file: str) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Canary(canary))
    store = CheckpointStore(str(tmp_path / "root"))
    path = Path(save_number(store, 1))
    commit = json.loads((path / "COMMIT").read_text())
    del commit["sha256"]
    commit["files"][file] = entry(bomb)
    (path / file).write_bytes(bomb)
    (path / "COMMIT").write_bytes(sign(commit))
    with pytest.raises(CheckpointError, match=f"{file} matches COMMIT but does not parse"):
        store.load(str(path))
    assert not canary.exists()


def test_another_format_version_is_refused_not_skipped(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    path = Path(save_number(store, 1))
    (path / "COMMIT").write_bytes(sign({"version": 2, "generation": 1, "files": {}}))
    for read in (lambda: store.load(str(path)), store.latest):
        with pytest.raises(CheckpointError, match="format version 2; this distclust reads version 1"):
            read()


def test_what_is_no_checkpoint_is_refused(root: str) -> None:
    store = CheckpointStore(root)
    with pytest.raises(CheckpointError, match=r"nowhere/COMMIT is missing.*take an earlier checkpoint"):
        store.load(f"{root}/nowhere")


# --- what cannot be saved


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_impossible_names_are_refused(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(str(tmp_path / "root"))
    with pytest.raises(CheckpointError, match="checkpoint name"):
        store.save(name, TENSORS, {})
    with pytest.raises(CheckpointError, match="tensor group"):
        store.save("good", {name: {}}, {})
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [1, torch.tensor(2)]}}, r"torch\.Tensor at 'a\.b\[1\]'"),
        ({"a": {3: "x"}}, r"the key 3 at 'a'"),
        ({"path": Path("x")}, r"Path at 'path'"),
        ({"raw": b"x"}, r"builtins\.bytes at 'raw'"),
        ({"set": {1}}, r"builtins\.set at 'set'"),
    ],
)
def test_a_state_that_would_not_come_back_is_refused(tmp_path: Path, state: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(str(tmp_path / "root")).save("name", TENSORS, state)
    assert not (tmp_path / "root").exists()


def test_tensors_that_cannot_be_saved_are_named_and_leave_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "root"))
    with pytest.raises(CheckpointError, match=r"'w' of group 'model' is torch\.sparse_coo"):
        store.save("name", {"first": {"a": torch.ones(2)}, "model": {"w": torch.eye(3).to_sparse()}}, {})
    assert everything(tmp_path) == {}
    assert not (tmp_path / "root" / "name").exists()


# --- pruning


def test_prune_keeps_the_newest_and_the_named(root: str) -> None:
    store = CheckpointStore(root)
    paths = {number: save_number(store, number) for number in range(1, 7)}
    store.prune(2, keep_names={"step-000000002"})
    fs, folder = fsspec.core.url_to_fs(root)
    kept = sorted(path.rstrip("/").rsplit("/", 1)[1] for path in fs.ls(folder, detail=False))
    assert kept == ["step-000000002", "step-000000005", "step-000000006"]
    for number in (2, 5, 6):
        assert value(store, paths[number]) == number
    CheckpointStore(root).prune(1)
    assert value(store, store.latest()) == 6


def test_prune_removes_nobody_elses_folder(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save_number(store, 1)
    for file in ("corpus/shard.arrow", "photos/state.json.jpg", "deep/state.json/x"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("mine")
    (tmp_path / "a.file").write_text("mine")
    store.prune(1)
    assert len(everything(tmp_path)) == len(FILES) + 4
    assert value(store, store.latest()) == 1


def test_prune_survives_a_failed_delete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class NoDeletes(LocalFileSystem):
        def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
            if path.endswith("step-000000001"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            super().rm(path, recursive, maxdepth)

    store = CheckpointStore(str(tmp_path))
    for number in (1, 2, 3):
        save_number(store, number)
    store._fs = NoDeletes(skip_instance_cache=True)
    store.prune(1)
    assert "could not remove the old checkpoint" in caplog.text
    assert "step-000000001" in caplog.text
    # what is left of it is partial, not damaged
    assert sorted(os.listdir(tmp_path)) == ["step-000000001", "step-000000003"]
    assert not (tmp_path / "step-000000001" / "COMMIT").exists()
    assert value(store, CheckpointStore(str(tmp_path)).latest()) == 3


def test_prune_to_nothing_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    save_number(store, 1)
    with pytest.raises(ValueError, match="keep=0; expected 1 or more"):
        store.prune(0)
    assert value(store, store.latest()) == 1


# --- differences


def test_differences_are_readable_lines() -> None:
    saved = {
        "clusters": 9,
        "method": {"name": "damic", "tau": 1.0, "layers": [500, 10]},
        "phases": [{"lr": 0.1}, {"lr": 0.2}],
        "seed": 1,
        "old": None,
        "loss": math.nan,
    }
    current = {
        "clusters": 10,
        "method": {"name": "dmae", "tau": 1, "layers": (500, 10)},
        "phases": ({"lr": 0.1}, {"lr": 0.3}),
        "seed": True,
        "loss": math.nan,
        "new": [1, 2],
    }
    assert differences(saved, current) == [
        "clusters: 9 in the checkpoint, 10 asked",
        "method.name: damic in the checkpoint, dmae asked",
        "phases[1].lr: 0.2 in the checkpoint, 0.3 asked",
        "seed: 1 in the checkpoint, True asked",
        "old: null in the checkpoint, not set now",
        "new: not in the checkpoint, [1, 2] asked",
    ]
    assert differences(saved, json.loads(json.dumps(saved))) == []


def test_differences_of_kinds_and_lengths() -> None:
    assert differences({"a": [1, 2]}, {"a": [1]}) == ["a: [1, 2] in the checkpoint, [1] asked"]
    assert differences({"a": {"b": 1}}, {"a": 1}) == ['a: {"b": 1} in the checkpoint, 1 asked']
    assert differences({"a": 0}, {"a": None}) == ["a: 0 in the checkpoint, null asked"]
    assert differences({"a": "1"}, {"a": 1}) == ['a: "1" in the checkpoint, 1 asked']
    assert differences({}, {}) == []


def test_long_values_that_differ_late_still_look_different() -> None:
    (line,) = differences({"terms": ["a"] * 500}, {"terms": ["a"] * 501})
    assert len(line) < 300
    first, second = "x" * 300 + "1" + "y" * 300, "x" * 300 + "2" + "y" * 300
    (line,) = differences({"text": first}, {"text": second})
    saved, asked = line.removeprefix("text: ").removesuffix(" asked").split(" in the checkpoint, ")
    assert len(line) < 300
    assert saved != asked
